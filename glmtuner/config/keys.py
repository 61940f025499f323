"""Every key of the configuration as a record: its type, its default, its choices, the presets that have it, and its meaning."""

import fnmatch
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from glmtuner.config.key_meanings import meaning_of
from glmtuner.config.preset_files import PresetFile, default_presets, preset_files
from glmtuner.config.rewards import GROUP as REWARD
from glmtuner.config.schema import Run, classes_of, hints_of
from glmtuner.config.trainer_arguments import UNIONS, WORDS
from glmtuner.config.trainer_fields import default_of, shown
from glmtuner.errors import ConfigError, did_you_mean

SIMPLE = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}
SHAPES = {"str": "text", "dict": "mapping", "list": "list", "bool": "true or false", "null": "null"}  # of UNIONS
UNSET = object()  # the default of a key that has none
TARGET = "_target_"  # the class that a preset of Hydra's own groups is of


@dataclass(frozen=True)
class Key:
    """A key as it is typed, such as trainer.learning_rate.

    `default` is text in the syntax of an override: of the default preset where that has the key, else of its class; where the
    presets differ, all of them with their names; None where the key must be set. `presets` are those that have the key,
    as group=preset; empty where every preset of its group has it. `values` are the defaults by preset.
    """

    name: str
    type: str
    default: str | None
    choices: tuple[str, ...]
    presets: tuple[str, ...]
    meaning: str
    hint: Any = None  # the annotation; None for keys of Hydra's own groups
    values: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The key as --json prints it."""
        names = ("type", "default", "choices", "presets", "meaning")
        return {"key": self.name, **{name: _plain(getattr(self, name)) for name in names}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def all_keys(searched: Sequence[Path], language: str) -> list[Key]:
    """The keys of the run in the order of `Run`, then those of hydra.launcher and hydra.sweeper.

    `searched` are the folders of presets, the first one conf/ itself.
    """
    files = preset_files(searched)
    chosen = default_presets(searched[0])
    keys = [key for declared in fields(Run) for key in _keys_of(declared.name, files, chosen, language)]
    return [*keys, *hydra_keys(files, language)]


def _keys_of(group: str, files: Sequence[PresetFile], chosen: Mapping[str, str], language: str) -> list[Key]:
    """The keys of a root key: itself, or those of the classes of its presets."""
    owners = classes_of(group)
    if not owners:
        declared = next(each for each in fields(Run) if each.name == group)
        hint = hints_of(Run)[group]
        value = default_of(declared)
        return [_key(group, hint, {group: value}, (), language)]
    single = [*owners] == [group]
    own = {each.name: each.values for each in files if each.group == group}
    found: dict[str, tuple[Any, dict[str, Any], list[str]]] = {}
    for preset, cls in owners.items():
        start = own.get(chosen.get(group, "") if single else preset, {})
        for inner in fields(cls):
            name = f"{group}.{preset}.{inner.name}" if group == REWARD else f"{group}.{inner.name}"
            made = default_of(inner)
            value = start.get(inner.name, UNSET if made is MISSING else made)
            hint, values, having = found.setdefault(name, (hints_of(cls)[inner.name], {}, []))
            values[preset] = value
            having.append(preset)
            if hint != hints_of(cls)[inner.name]:
                found[name] = (typing.Union[hint, hints_of(cls)[inner.name]], values, having)  # noqa: UP007
    everyone = len(owners)
    return [
        _key(name, hint, values, () if len(having) == everyone else [f"{group}={each}" for each in having], language)
        for name, (hint, values, having) in found.items()
    ]


def _key(name: str, hint: Any, values: Mapping[str, Any], presets: Iterable[str], language: str) -> Key:
    kind, choices = type_in_words(name, hint)
    meaning = meaning_of(name, language)
    return Key(name, kind, _default_text(values), choices, tuple(presets), meaning, hint, values)


def _default_text(values: Mapping[str, Any]) -> str | None:
    """The default that the presets agree on, or each with the presets that have it; None if none has one."""
    by_text: dict[str, list[str]] = {}
    for preset, value in values.items():
        if value is not UNSET and value is not MISSING and value != "???":
            by_text.setdefault(shown(value), []).append(preset)
    if len(by_text) < 2:
        return next(iter(by_text), None)
    return ", ".join(f"{text} ({', '.join(presets)})" for text, presets in by_text.items())


def type_in_words(name: str, hint: Any) -> tuple[str, tuple[str, ...]]:
    """The type of a key in words, and the words that it takes, if these are all."""
    field = name.removeprefix("trainer.") if name.startswith("trainer.") else ""
    if field in WORDS:
        return "one of the choices", tuple(WORDS[field])
    if field in UNIONS:
        return " or ".join(SHAPES[shape] for shape in UNIONS[field]), ()
    if name == "objective":
        return "text or list of text or null", ()
    parts = alternatives(hint)
    choices = [member.name for part in parts if is_enum(part) for member in part]
    if any(part is bool for part in parts):
        choices += ["true", "false"]
    words = dict.fromkeys("one of the choices" if is_enum(part) else _words(part) for part in parts)
    listed = [word for word in words if word != "null"] + ["null"] * ("null" in words)
    free = any(not is_enum(part) and part not in (bool, type(None)) for part in parts)
    return " or ".join(listed), () if free else tuple(dict.fromkeys(choices))


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {_plural(_words(arguments[0]))}"
    if origin is dict:
        return f"mapping of names to {_plural(_words(arguments[1]))}"
    return "mapping" if is_dataclass(hint) else SIMPLE.get(hint, str(hint))


def _plural(words: str) -> str:
    return f"{words}s" if words.endswith("number") else words


def alternatives(hint: Any) -> list[Any]:
    """The parts of a union, and of the unions in it; the type itself if it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for each in typing.get_args(hint) for part in alternatives(each)]
    return [hint]


def is_enum(hint: Any) -> bool:
    """Whether an annotation is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def hydra_keys(files: Iterable[PresetFile], language: str) -> list[Key]:
    """The keys of hydra.launcher, hydra.sweeper and hydra.sweeper.sampler, as conf/hydra has them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in files:
        if file.group.startswith("hydra/"):
            for name, value in file.values.items():
                if name != TARGET:
                    key = f"{file.group.replace('/', '.')}.{name}"
                    found.setdefault(key, (file.group, {}))[1][file.name] = value
    keys = []
    for name, (group, values) in found.items():
        kinds = [SIMPLE.get(type(value), _container(value)) for value in values.values()]
        kind = " or ".join(dict.fromkeys(sorted(kinds, key=lambda word: word == "null")))
        choices = ("true", "false") if kind == "true or false" else ()
        presets = tuple(f"{group}={preset}" for preset in values)
        kind = "any value" if kind == "null" else kind
        keys.append(Key(name, kind, _default_text(values), choices, presets, meaning_of(name, language), values=values))
    return keys


def _container(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping"


def matching(keys: Sequence[Key], pattern: str | None) -> list[Key]:
    """The keys whose name has the pattern, a glob or a part of it; where no name has it, those whose meaning has it.

    Raises ConfigError where nothing matches.
    """
    if pattern is None:
        return [*keys]
    folded = pattern.casefold()
    is_glob = any(sign in pattern for sign in "*?[")
    for texts, glob in (
        ([key.name for key in keys], folded),
        ([key.meaning.casefold() for key in keys], f"*{folded}*"),
    ):
        has_it = [fnmatch.fnmatchcase(text, glob) if is_glob else folded in text for text in texts]
        if any(has_it):
            return [key for key, has in zip(keys, has_it, strict=True) if has]
    names = [key.name for key in keys]
    last = [name.rpartition(".")[2] for name in names]
    hint = did_you_mean(pattern, dict.fromkeys([*names, *last]), "type python -m glmtuner keys for all of them")
    raise ConfigError(f"keys {pattern}: no key and no meaning has it{hint}")
