"""What the form of a board is made of: groups with their presets, keys with their types and meanings, datasets, experiments."""

import json
from pathlib import Path
from typing import Any

from glmtuner.config.compose import presets, searched_dirs
from glmtuner.config.key_meanings import GROUPS, meaning_of
from glmtuner.config.keys import UNSET, Key, all_keys
from glmtuner.config.preset_files import PresetFile, about_file, default_presets, description_of, preset_files

HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler", "hydra/sweeper/pruner")
BASIC = "basic"  # Hydra's own launcher and sweeper


def form(config_dir: str | None) -> dict[str, Any]:
    """`groups`, `keys`, `experiments` and `datasets`; raises ConfigError for a folder of presets that cannot be used."""
    searched = searched_dirs(config_dir)
    files = preset_files(searched)
    chosen = default_presets(searched[0])
    names = {group: [*own] for group, own in presets(searched).items() if group != "experiment"}
    for group in HYDRA_GROUPS:
        own = [file.name for file in files if file.group == group]
        names[group] = [*([BASIC] if group in HYDRA_GROUPS[:2] else []), *own]
    by_name = {(file.group, file.name): file for file in files}
    recipes = [path for folder in searched for path in sorted((folder / "experiment").rglob("*.yaml"))]
    sets = [path for folder in searched for path in sorted((folder / "dataset").glob("*.yaml"))]
    keys = all_keys(searched, "en")
    ordered = [*(group for group in GROUPS if group in names), *(group for group in names if group not in GROUPS)]
    return {
        "groups": [
            {
                "name": group,
                "default": BASIC if group in HYDRA_GROUPS[:2] else chosen.get(group),
                "meaning": GROUPS.get(group, {"en": "", "zh": ""}),
                "presets": [_preset(by_name.get((group, name)), name) for name in names[group]],
            }
            for group in ordered
        ],
        "keys": [_key(key) for key in keys],
        "experiments": [{"name": _name_of(path), "about": about_file(path)} for path in recipes],
        "datasets": [{"name": path.stem, "about": description_of(path)} for path in sets],
    }


def _name_of(path: Path) -> str:
    return path.as_posix().rpartition("/experiment/")[2].removesuffix(".yaml")


def _preset(file: PresetFile | None, name: str) -> dict[str, Any]:
    """A preset with its first comment, and the preset whose class it has, by which its keys are known."""
    if file is None:
        return {"name": name, "about": "", "class": name}
    return {"name": name, "about": about_file(file.path), "class": file.typed_as}


def _key(key: Key) -> dict[str, Any]:
    """A key; `values` are its defaults by preset where these differ."""
    values = {
        preset: json.loads(json.dumps(value, default=str))
        for preset, value in (key.values or {}).items()
        if value is not UNSET
    }
    group = (
        key.name.rpartition(".")[0].replace(".", "/") if key.name.startswith("hydra.") else key.name.partition(".")[0]
    )
    return {
        "key": key.name, "group": group if "." in key.name else "", "type": key.type, "default": key.default,
        "choices": [*key.choices, *(["null"] if key.choices and key.type.endswith("null") else [])],
        "presets": [preset.partition("=")[2] for preset in key.presets],
        "meaning": {"en": key.meaning, "zh": meaning_of(key.name, "zh")},
        "values": values if len({json.dumps(value) for value in values.values()}) > 1 else {},
    }  # fmt: skip
