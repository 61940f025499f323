"""The YAML files of the config groups: their values, and the class that Hydra types each by."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = re.compile(r"/?schema/(?P<group>\w+)/(?P<name>[\w./-]+?)(?:@\S*)?")
OTHER = re.compile(r"(?:override )?(?P<name>/?[\w./-]+?)(?:@\S*)?")
UNTYPED = ("dataset", "experiment")  # folders of conf/ that hold no group's presets


@dataclass(frozen=True)
class PresetFile:
    """A preset: its group (`hydra/launcher` for Hydra's own), its name, its values, and the preset whose class types it."""

    group: str
    name: str
    path: Path
    values: dict[str, Any]  # of the group, also where the file sets other groups, too
    typed_as: str | None  # None in a group with a single class, or where the file names no class


def preset_files(searched: Sequence[Path]) -> list[PresetFile]:
    """The presets of all groups in the searched folders; a file that is not YAML is left out, since composing it tells why."""
    found: dict[tuple[str, str], Path] = {}
    for folder in searched:
        for path in sorted(folder.rglob("*.yaml")):
            place = path.relative_to(folder).with_suffix("").parts
            if len(place) == 1 or place[0] in UNTYPED or place[0].startswith((".", "_")):
                continue
            depth = len(place) - 1 if place[0] == "hydra" else 1
            key = ("/".join(place[:depth]), "/".join(place[depth:]))
            found.setdefault(key, path)
    contents = {key: content for key, path in found.items() if (content := _content(path)) is not None}
    return [
        PresetFile(group, name, found[group, name], _values(group, content), _typed_as(group, name, contents))
        for (group, name), content in contents.items()
    ]


def _content(path: Path) -> dict[str, Any] | None:
    import yaml
    from omegaconf._utils import get_yaml_loader

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None
    return content if isinstance(content, dict) else {}


def _values(group: str, content: dict[str, Any]) -> dict[str, Any]:
    """The values of the group: all of a file's, or in one for the whole run those below the group's name."""
    inner = content.get(group)
    values = inner if isinstance(inner, dict) else content
    return {key: value for key, value in values.items() if key != "defaults"}


def _typed_as(
    group: str, name: str, contents: dict[tuple[str, str], dict[str, Any]], seen: tuple[str, ...] = ()
) -> str | None:
    """The preset whose class types a preset: named by its defaults, or by those of the presets that it starts from."""
    if name in seen or (content := contents.get((group, name))) is None:
        return None
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else []:
        if not isinstance(entry, str):
            continue
        if (match := SCHEMA.fullmatch(entry)) and match["group"] == group:
            return match["name"]
        if match := OTHER.fullmatch(entry):
            base = match["name"].removeprefix(f"/{group}/")
            if not base.startswith("/") and (found := _typed_as(group, base, contents, (*seen, name))):
                return found
    return None


def default_presets(conf: Path) -> dict[str, str]:
    """The preset that conf/config.yaml chooses in each group that has one."""
    content = _content(conf / "config.yaml") or {}
    pairs = [pair for entry in content.get("defaults", ()) if isinstance(entry, dict) for pair in entry.items()]
    return {
        str(group): str(name) for group, name in pairs if isinstance(name, str) and not group.startswith("override")
    }


def about_file(path: Path) -> str:
    """The first comment of a preset's file, which says what it is; empty without one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("#") and not line.startswith("# @")), "").lstrip("# ")


def description_of(path: Path) -> str:
    """The description of a dataset in its catalogue file; empty where the file has none."""
    return str((_content(path) or {}).get("description") or "")
