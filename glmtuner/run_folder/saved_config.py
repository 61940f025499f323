"""The config.yaml of a run folder, which may be damaged, of another version, or not of a run at all."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, scan
from yaml.tokens import AliasToken

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.redaction import flatten

# every version has written them, each as a mapping
GROUPS = ("model", "quant", "data", "finetuning", "stage", "trainer", "generation")
MAX_BYTES = 1_000_000  # a run's has 5 kB
LISTS = ("model.checkpoint_dir", "data.dataset")
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not escaped
NAMES = ("model.model_name_or_path", "finetuning.finetuning_type", "stage.name")


def read_config(path: Path, complete: bool = True) -> DictConfig:
    """The resolved config of a run; raises CheckpointError, which names the file and what is wrong with it.

    Unless `complete`, groups may be missing, but none is of another type.
    """
    config = parse_config(path)
    _check(path, _unresolved(config), complete)
    return config


def read_values(path: Path) -> dict[str, Any]:
    """The values of a run's config by dotted key: those of `read_config`, and its errors, in a hundredth of its time.

    It is for hundreds of runs at once, whose files have nearly all lines in common: libyaml parses each entry of a group once.
    """
    text = _text_of(path)
    values = _by_entries(text)
    if values is None:
        try:
            values = yaml.load(text, _fast_loader())
        except RecursionError:
            raise CheckpointError(f"{path} is damaged (it is nested too deeply)") from None
        except (YAMLError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:300]})") from None
        if (
            not isinstance(values, dict) and values is not None
        ):  # an empty file has no groups, which earlier versions lacked, too
            raise CheckpointError(f"{path} is damaged (it is not a mapping)")
        _check(path, values or {}, complete=False)
        return flatten(values or {})
    if "${" in text:
        _check(path, values, complete=False)
    elif wrong := _wrong_keys(values, complete=False):
        raise _not_of_a_run(path, wrong)
    flat: dict[str, Any] = {}
    for group, entries in values.items():
        if not isinstance(entries, dict) or not entries:
            flat[group] = entries
            continue
        for name, value in entries.items():
            if isinstance(value, dict):
                flat |= flatten(value, f"{group}.{name}")
            else:
                flat[_dotted(group, name)] = value
    return flat


# The start of an entry in the YAML that runs write: a key at the top, or one of a group. All else belongs to the entry before it.
ENTRY = re.compile(r"(?:  )?[A-Za-z_]\w*:(?= |$)", re.ASCII)


def _by_entries(text: str) -> dict[str, Any] | None:
    """The file's groups, each entry parsed by itself; None for a file of another shape, and for what is no YAML."""
    values: dict[str, Any] = {}
    group: dict[str, Any] | None = None
    entry: list[str] = []

    def add() -> bool:
        """Parse the entry; whether it is one, and not there already."""
        found = _entry("\n".join(entry))
        if found is None:
            return False
        key, value = found
        place = values if not entry[0].startswith(" ") else group
        if place is None or key in place:
            return False
        place[key] = value
        return True

    for line in text.split("\n"):
        if not ENTRY.match(line):
            if not entry:
                return None
            entry.append(line)
            continue
        if entry and not add():
            return None
        entry = [line]
        if not line.startswith(" ") and line.endswith(":"):
            group = values.setdefault(line[:-1], {})
            entry = []
            if group:  # it is there twice
                return None
        elif not line.startswith(" "):
            group = None
    if entry and not add():
        return None
    return None if {} in (values[name] for name in values if f"{name}:\n" in text) else values


@lru_cache(maxsize=50_000)
def _entry(text: str) -> tuple[str, Any] | None:
    try:
        parsed = yaml.load(text, _fast_loader())
    except (YAMLError, ValueError, RecursionError):
        return None
    return next(iter(parsed.items())) if isinstance(parsed, dict) and len(parsed) == 1 else None


@lru_cache(maxsize=10_000)
def _dotted(group: str, name: str) -> str:
    return f"{group}.{name}"  # one text for all runs


@cache
def _fast_loader() -> Any:
    """OmegaConf's loader, which reads 1e-4 as a number and no dates, on libyaml where PyYAML has it."""
    slow = get_yaml_loader()
    if not hasattr(yaml, "CSafeLoader"):
        return slow

    class Loader(yaml.CSafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            values: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            if len(values) < len(node.value):
                keys = [key.value for key, _ in node.value]
                twice = next((key for key in keys if keys.count(key) > 1), keys[0])
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping", node.start_mark, f"found duplicate key {twice}", node.start_mark
                )
            return values

    Loader.yaml_implicit_resolvers = slow.yaml_implicit_resolvers
    Loader.yaml_constructors = slow.yaml_constructors
    return Loader


def _check(path: Path, values: Mapping[str, Any], complete: bool) -> None:
    if keys := _interpolated_keys(values):
        raise CheckpointError(
            f"{path}: {keys[0]} holds an interpolation (`${{…}}`), which a run never saves and which is not resolved; replace it by "
            "its value, or use another run folder"
        )
    if wrong := _wrong_keys(values, complete):
        raise _not_of_a_run(path, wrong)


def _not_of_a_run(path: Path, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or is not the configuration of a run ({', '.join(wrong[:4])}); restore the file, or use another "
        "run folder"
    )


def parse_config(path: Path) -> DictConfig:
    """The file as a mapping, whatever its keys; raises CheckpointError if it is none."""
    text = _text_of(path)
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise CheckpointError(f"{path} is damaged (it is nested too deeply)") from None
    except (YAMLError, ValueError, OSError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:300]})") from None
    if not isinstance(loaded, DictConfig):
        raise CheckpointError(f"{path} is damaged (it is not a mapping)")
    return loaded


def _text_of(path: Path) -> str:
    """The content of the file. A run's has no YAML aliases, which would let a short file stand for a huge one."""
    if not path.is_file():
        raise CheckpointError(f"{path} is damaged (it is missing, or not a file)")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} is damaged (it has {size:,} bytes, and a run's has about 5,000)")
        text = path.read_text(encoding="utf-8")
        if "*" in text and any(isinstance(token, AliasToken) for token in scan(text)):
            raise CheckpointError(f"{path} is damaged (it has a YAML alias, which glmtuner never writes)")
    except RecursionError:
        raise CheckpointError(f"{path} is damaged (it is nested too deeply)") from None
    except (YAMLError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:300]})") from None
    return text


def wrong_keys(config: DictConfig, complete: bool = True) -> list[str]:
    """What differs from the configuration of a run, each in a few words: groups and values that every version writes."""
    return _wrong_keys(_unresolved(config), complete)


def _unresolved(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _wrong_keys(values: Mapping[str, Any], complete: bool) -> list[str]:
    wrong = [
        f"{group}={_shown(values.get(group))} is not a mapping"
        for group in GROUPS
        if (complete or group in values) and not isinstance(values.get(group), dict)
    ]
    if wrong:
        return wrong
    flat = _some_of(values, (*NAMES, *LISTS, "quant.quantization_bit", "plugins"))
    names, lists = ([key for key in keys if complete or key in flat] for keys in (NAMES, LISTS))
    wrong += [f"{key}={_shown(flat.get(key))} is not a name" for key in names if not _is_name(flat.get(key))]
    wrong += [f"{key}={_shown(flat.get(key))} is not a list of names" for key in lists if not _is_names(flat.get(key))]
    if not _is_names(flat.get("plugins", [])):
        wrong.append(f"plugins={_shown(flat['plugins'])} is not a list of names")
    bits = flat.get("quant.quantization_bit")
    if bits not in (None, 4, 8) or isinstance(bits, float):
        wrong.append(f"quant.quantization_bit={_shown(bits)} is not 4, 8 or null")
    return wrong


def _some_of(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What `flatten` would have under these keys, without the others."""
    found = {}
    for key in keys:
        group, _, name = key.rpartition(".")
        inside = values.get(group) if group else values
        value = inside.get(name) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and name in inside and not (value and isinstance(value, dict)):
            found[key] = value
    return found


def interpolated_keys(config: DictConfig) -> list[str]:
    """The keys whose values hold an interpolation, `${…}`; a run saves its resolved values, which have none."""
    return _interpolated_keys(_unresolved(config))


def _interpolated_keys(values: Mapping[str, Any]) -> list[str]:
    return [key for key, value in flatten(values).items() if _interpolates(value)]


def _interpolates(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_interpolates, value))
    if isinstance(value, dict):
        return any(map(_interpolates, value.values()))
    return isinstance(value, str) and INTERPOLATION.search(value) is not None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _shown(value: Any) -> str:
    text = re.sub(r"\s+", " ", json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else f"{text[:59]}…"
