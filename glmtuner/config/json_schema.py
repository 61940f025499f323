"""JSON Schema of the configuration's files, for editors: presets of each group, experiments, and conf/config.yaml.

The schemas are of draft 2020-12 and use only words that draft 7 has, too, since editors know that one best. A value may be an
interpolation, `${…}`, or `???` everywhere, as OmegaConf has it. What the values of a run must be together is left to composing it.
"""

import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from hydra.conf import HydraConf

from glmtuner.config.key_meanings import meaning_of
from glmtuner.config.keys import TARGET, UNSET, Key, alternatives, is_enum
from glmtuner.config.preset_files import PresetFile
from glmtuner.config.rewards import GROUP as REWARD
from glmtuner.config.schema import Run, classes_of, groups, hints_of
from glmtuner.config.trainer_arguments import UNIONS, WORDS
from glmtuner.config.trainer_fields import default_of

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
LATER: Schema = {"anyOf": [{"type": "string", "pattern": r"\$\{"}, {"const": "???"}]}  # read when it is used
ONE_OF_LATER = {"$ref": "#/$defs/later"}
YES_AND_NO = ["yes", "no", "on", "off"]  # booleans in Hydra's YAML, and text in that of editors
SIMPLE: dict[Any, Schema] = {
    str: {"type": ["string", "number", "boolean"]},  # OmegaConf makes text of them
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"anyOf": [{"type": "boolean"}, {"enum": YES_AND_NO}]},
    type(None): {"type": "null"},
    Any: {},
}
SHAPES: dict[str, Schema] = {
    "str": {"type": "string"},
    "dict": {"type": "object"},
    "list": {"type": "array"},
    "bool": SIMPLE[bool],
    "null": {"type": "null"},
}
PACKAGE = r"(@[\w.:]+)?"  # behind a name in a defaults list
HYDRA_OWN = {"hydra/launcher": ["basic"], "hydra/sweeper": ["basic"]}  # presets that Hydra brings
OTHER_OF_HYDRA = ("hydra_logging", "job_logging", "help", "hydra_help", "output", "env")


@dataclass(frozen=True)
class Source:
    """What the schemas are made of: presets, keys, the language of descriptions, and more about a class, by group and preset."""

    files: Sequence[PresetFile]
    names: Mapping[str, Sequence[str]]  # of the presets in each group, those without a file included
    hydra: Sequence[Key]
    language: str
    extra: Mapping[tuple[str, str], Callable[[], list[Schema]]] = field(default_factory=dict)


def value_schema(hint: Any) -> Schema:
    """What a value of an annotation can be in YAML."""
    shapes = [_shape(part) for part in alternatives(hint)]
    return {} if {} in shapes else {"anyOf": [*shapes, ONE_OF_LATER]}


def _shape(hint: Any) -> Schema:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_enum(hint):
        words: list[Any] = [member.name for member in hint]
        return {"enum": words}
    if origin is list:
        return {"type": "array", "items": value_schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": value_schema(arguments[1])}
    return {"type": "object"} if is_dataclass(hint) else SIMPLE[hint]


def property_schema(key: str, hint: Any, default: Any, language: str) -> Schema:
    """A key's values, with its meaning and its default."""
    inner = key.removeprefix("trainer.") if key.startswith("trainer.") else ""
    if inner in WORDS:
        schema: Schema = {
            "anyOf": [{"enum": [*WORDS[inner], *([False] if "no" in WORDS[inner] else [])]}, ONE_OF_LATER]
        }
    elif inner in UNIONS:
        schema = {"anyOf": [*(SHAPES[shape] for shape in UNIONS[inner]), ONE_OF_LATER]}
    elif key == "objective":
        names = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2}
        schema = {"anyOf": [{"type": ["string", "null"]}, names]}
    else:
        schema = value_schema(hint)
    return described(schema, meaning_of(key, language), default)


def described(schema: Schema, meaning: str, default: Any = UNSET) -> Schema:
    """The schema with a description and a default, where there are any."""
    told = {"description": meaning} if meaning else {}
    return {**schema, **told, **({"default": _as_json(default)} if default is not UNSET else {})}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_as_json(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def closed(properties: Mapping[str, Schema], **more: Any) -> Schema:
    """An object with these keys and no others."""
    return {"type": "object", "properties": dict(properties), "additionalProperties": False, **more}


def class_properties(source: Source, group: str, preset: str, cls: type) -> dict[str, Schema]:
    """The keys of a preset's class."""
    prefix = f"{group}.{preset}" if group == REWARD else group
    own = next((each.values for each in source.files if (each.group, each.name) == (group, preset)), {})
    properties = {}
    for declared in fields(cls):
        made = default_of(declared)
        default = own.get(declared.name, UNSET if made is MISSING else made)
        hint = hints_of(cls)[declared.name]
        properties[declared.name] = property_schema(f"{prefix}.{declared.name}", hint, default, source.language)
    return properties


def merged(variants: Iterable[Mapping[str, Schema]]) -> dict[str, Schema]:
    """The keys of several classes: one that several have takes the values of each, and has a default if they agree."""
    by_key: dict[str, list[Schema]] = {}
    for variant in variants:
        for key, schema in variant.items():
            if schema not in by_key.setdefault(key, []):
                by_key[key].append(schema)
    return {key: found[0] if len(found) == 1 else _either(found) for key, found in by_key.items()}


def _either(found: list[Schema]) -> Schema:
    told = {"description": found[0]["description"]} if "description" in found[0] else {}
    values = [{name: part for name, part in each.items() if name not in ("description", "default")} for each in found]
    unique = [each for index, each in enumerate(values) if each not in values[:index]]
    return {**(unique[0] if len(unique) == 1 else {"anyOf": unique}), **told}


def group_defs(source: Source, group: str, more: Mapping[str, Schema] | None = None) -> dict[str, Schema]:
    """The object of each class of a group, as `<group>.<preset>`, and as `<group>` that of a preset whose class is not known."""
    variants = {preset: class_properties(source, group, preset, cls) for preset, cls in classes_of(group).items()}
    extra = more or {}
    defs = {}
    for preset, properties in variants.items():
        rules = source.extra[group, preset]() if (group, preset) in source.extra else []
        defs[f"{group}.{preset}"] = closed({**properties, **extra}, **({"allOf": rules} if rules else {}))
    if [*variants] == [group]:
        return {group: defs[f"{group}.{group}"]}
    return {**defs, group: closed({**merged(variants.values()), **extra})}


def names_typed_as(source: Source, group: str, preset: str) -> list[str]:
    """The presets that have the class of this one."""
    of_files = [each.name for each in source.files if each.group == group and each.typed_as == preset]
    return list(dict.fromkeys([preset, *of_files]))


def defaults_list(source: Source, own_group: str | None = None) -> Schema:
    """A defaults list: presets by their paths, and choices of presets by group; in a group's file its own presets by name."""
    names = {**source.names, **_hydra_names(source)}
    paths = [rf"/?schema/{group}/({_any_of(classes_of(group))})" for group in groups() if classes_of(group)]
    paths += [rf"/?{group}/({_any_of(known)})" for group, known in names.items() if known]
    paths += [f"({_any_of(names[own_group])})"] if own_group and names.get(own_group) else []
    chosen = {}
    for group, known in names.items():
        one: Schema = {"anyOf": [{"enum": [*known, None]}, ONE_OF_LATER]}
        several: Schema = {"anyOf": [one, {"type": "array", "items": one}]}
        relative = group.removeprefix(f"{own_group}/") if own_group else group
        where = group if relative == group else f"({group}|{relative})"
        chosen[rf"^(override |optional )?/?{where}{PACKAGE}$"] = several if group == REWARD else one
    others = _any_of(OTHER_OF_HYDRA)
    chosen[rf"^(override |optional )?/?hydra/({others}){PACKAGE}$"] = {"type": ["string", "null"]}
    choice = {"type": "object", "patternProperties": chosen, "additionalProperties": False}
    entry = {
        "anyOf": [
            {"enum": ["_self_", "schema/run"]},
            {"type": "string", "pattern": f"^({'|'.join(paths)}){PACKAGE}$"},
            {**choice, "minProperties": 1, "maxProperties": 1},
        ]
    }
    return {"type": "array", "items": entry, "description": "what is composed, in this order (Hydra's defaults list)"}


def _hydra_names(source: Source) -> dict[str, list[str]]:
    names = {group: [*own] for group, own in HYDRA_OWN.items()}
    for file in source.files:
        if file.group.startswith("hydra/"):
            names.setdefault(file.group, []).append(file.name)
    return names


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


def preset_schema(source: Source, group: str) -> Schema:
    """Of conf/<group>/<name>.yaml: the keys of the class that its defaults list names, else those of any class of the group.

    A file for the whole run (`# @package _global_`), known by a key of the group's name, is one for experiments.
    """
    target = "trainer" if group == "kernels" else group
    own = {"defaults": {"$ref": "#/$defs/defaults"}}
    defs = {"later": LATER, "defaults": defaults_list(source, group), **group_defs(source, target, own)}
    rules: list[Schema] = []
    for preset in classes_of(target):
        if (name := f"{target}.{preset}") in defs:
            rules.append({"if": _starts_from(source, group, preset), "then": {"$ref": f"#/$defs/{name}"}})
    known = {"anyOf": [rule["if"] for rule in rules]} if rules else False
    rules.append({"if": known, "then": {}, "else": {"$ref": f"#/$defs/{target}"}})
    return {
        "$schema": DRAFT,
        "title": f"presets of {group}",
        "$defs": defs,
        "if": {"type": "object", "required": [group]},
        "then": {"$ref": "experiment.json"},
        "else": {"allOf": rules},
    }


def _starts_from(source: Source, group: str, preset: str) -> Schema:
    """A file whose defaults list names a class, or a preset with that class."""
    names = names_typed_as(source, group, preset)
    place = rf"(/?schema/{group}/{re.escape(preset)}|(/?{group}/)?({_any_of(names)})){PACKAGE}"
    contains = {"type": "string", "pattern": f"^{place}$"}
    return {
        "type": "object",
        "required": ["defaults"],
        "properties": {"defaults": {"type": "array", "contains": contains}},
    }


def run_schema(source: Source, title: str, prefix: str) -> Schema:
    """Of a file that sets any key of the run; `prefix` stands before the groups of its defaults list (`override /`)."""
    defs: dict[str, Schema] = {"later": LATER, "defaults": defaults_list(source)}
    properties: dict[str, Schema] = {"defaults": {"$ref": "#/$defs/defaults"}, "hydra": {"$ref": "#/$defs/hydra"}}
    rules = []
    for declared in fields(Run):
        group = declared.name
        if not classes_of(group):
            hint, default = hints_of(Run)[group], default_of(declared)
            properties[group] = property_schema(group, hint, UNSET if default is MISSING else default, source.language)
            continue
        found = group_defs(source, group)
        if group == REWARD:
            own = {preset: found[f"{group}.{preset}"] for preset in classes_of(group)}
            properties[group] = closed(own)
            continue
        defs |= found
        properties[group] = {"$ref": f"#/$defs/{group}"}
        for preset in classes_of(group):
            if f"{group}.{preset}" in found:
                chosen = _chooses(source, group, preset, prefix)
                rules.append({"if": chosen, "then": {"properties": {group: {"$ref": f"#/$defs/{group}.{preset}"}}}})
    defs["hydra"] = hydra_schema(source)
    return {"$schema": DRAFT, "title": title, "$defs": defs, **closed(properties, allOf=rules)}


def _chooses(source: Source, group: str, preset: str, prefix: str) -> Schema:
    """A file whose defaults list chooses a preset with this class."""
    names = names_typed_as(source, group, preset)
    key = f"{prefix}{group}"
    choice = {"type": "object", "required": [key], "properties": {key: {"enum": names}}}
    start = {"type": "string", "pattern": rf"^/?{group}/({_any_of(names)})@{group}$"}
    contains = {"anyOf": [choice, start]}
    return {"required": ["defaults"], "properties": {"defaults": {"type": "array", "contains": contains}}}


def hydra_schema(source: Source) -> Schema:
    """Of the key `hydra`: Hydra's own keys, and the values of launchers and sweepers."""
    own: dict[str, Schema] = {declared.name: {} for declared in fields(HydraConf)}
    own["launcher"] = closed(_hydra_properties(source, "hydra/launcher"))
    sampler = closed(_hydra_properties(source, "hydra/sweeper/sampler"))
    of_basic = {"max_batch_size": {"type": ["integer", "null"]}}
    own["sweeper"] = closed({**of_basic, **_hydra_properties(source, "hydra/sweeper"), "sampler": sampler})
    return closed(own)


def _hydra_properties(source: Source, group: str) -> dict[str, Schema]:
    """The keys of all presets of one of Hydra's own groups; a key takes what its presets hold, a null anything."""
    prefix = group.replace("/", ".") + "."
    properties: dict[str, Schema] = {TARGET: {"type": "string", "description": "the class, set by the preset"}}
    for key in source.hydra:
        name = key.name.removeprefix(prefix)
        if key.name.startswith(prefix) and "." not in name:
            values = [*(key.values or {}).values()]
            agreed = values[0] if all(value == values[0] for value in values) else UNSET
            properties[name] = described(_like(values), key.meaning, agreed)
    return properties


def _like(values: Sequence[Any]) -> Schema:
    """What a key can be whose presets have these values; not told where one is null, an interpolation, or a container."""
    plain = {type(value) for value in values}
    if not plain <= {bool, int, float, str} or any(isinstance(value, str) and "${" in value for value in values):
        return {}
    kinds = {float if kind is int and float in plain else kind for kind in plain}
    return {"anyOf": [*(SIMPLE[kind] for kind in sorted(kinds, key=str)), ONE_OF_LATER]}


def hydra_preset_schema(source: Source, group: str) -> Schema:
    """Of conf/hydra/…: the keys of the shipped presets; a preset of another class (`_target_`) has keys of its own."""
    properties = _hydra_properties(source, group)
    ours = sorted({str(each.values[TARGET]) for each in source.files if each.group == group and TARGET in each.values})
    other = {"required": [TARGET], "properties": {TARGET: {"not": {"enum": ours}}}}
    nested = {"sampler": closed(_hydra_properties(source, f"{group}/sampler"))} if group == "hydra/sweeper" else {}
    defs = {"later": LATER, "defaults": defaults_list(source, group)}
    strict = closed({"defaults": {"$ref": "#/$defs/defaults"}, **properties, **nested})
    return {"$schema": DRAFT, "title": f"presets of {group}", "$defs": defs, "if": other, "then": {}, "else": strict}


def config_schemas(source: Source) -> dict[str, Schema]:
    """The schemas by the names of their files: one for each group, and those of experiments and of conf/config.yaml."""
    made = {
        group: preset_schema(source, group)
        for group in (*(name for name in groups() if source.names.get(name)), "kernels")
    }
    for group in dict.fromkeys(file.group for file in source.files if file.group.startswith("hydra/")):
        made[group.replace("/", ".")] = hydra_preset_schema(source, group)
    made["experiment"] = run_schema(source, "experiments", "override /")
    made["config"] = run_schema(source, "the composed run", "")
    return made
