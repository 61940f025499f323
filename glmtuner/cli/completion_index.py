"""What the completion of shells knows: keys with their choices, presets, datasets, verbs and options, as one JSON object."""

import argparse
import json
import sys
from importlib import import_module
from typing import Any

from glmtuner.cli.help import MEANINGS
from glmtuner.cli.options import option_parser
from glmtuner.cli.verbs import NO_FOLDERS, OVERRIDDEN, VERBS
from glmtuner.config.compose import presets, searched_dirs
from glmtuner.config.keys import all_keys
from glmtuner.config.preset_files import PresetFile, about_file, description_of, preset_files
from glmtuner.console import plain
from glmtuner.launch.register import register_presets

KINDS = {  # what options take, by the names that argparse stores them under
    **dict.fromkeys(("config_dir", "folder", "output", "to", "verify"), "DIR"),
    **dict.fromkeys(("markdown", "html"), "FILE"),
    "package": "PACKAGE",
}


def main() -> None:
    """Print the index for a language and, if one is named, a folder with more presets."""
    language, *rest = sys.argv[1:]
    print(plain(json.dumps(make(language, rest[0] if rest else None))))


def make(language: str, config_dir: str | None) -> dict[str, Any]:
    """The index, as complete.py reads it."""
    register_presets()
    searched = searched_dirs(config_dir)
    files = preset_files(searched)
    keys = all_keys(searched, language)
    return {
        "verbs": {verb: about_verb(verb) for verb in VERBS},
        "options": about_options(option_parser()),
        "groups": about_groups(presets(searched), files, {key.name for key in keys}),
        "keys": [
            {
                "name": key.name,
                "choices": [*key.choices, *(["null"] if key.choices and key.type.endswith("null") else [])],
                "classes": [preset.partition("=")[2] for preset in key.presets],
                "meaning": key.meaning,
            }
            for key in keys
        ],
        "datasets": {
            path.stem: description_of(path)
            for folder in searched
            for path in sorted((folder / "dataset").glob("*.yaml"))
        },
    }


def about_verb(verb: str) -> dict[str, Any]:
    """A verb: its help, its options, and what its words are."""
    module = import_module(f"glmtuner.cli.{verb}")
    parser = argparse.ArgumentParser(add_help=False)
    module.arguments(parser)
    words = [action for action in parser._actions if not action.option_strings]
    return {
        "help": module.HELP,
        "options": about_options(parser),
        "choices": [str(choice) for action in words for choice in action.choices or ()],
        "takes_keys": verb == "keys",
        "takes_folders": verb not in NO_FOLDERS,
        "takes_overrides": verb in OVERRIDDEN,
    }


def about_options(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Each option with its help, its choices, and what it takes: nothing, DIR, FILE, PACKAGE, or another VALUE."""
    found = {}
    for action in parser._actions:
        kind = ""
        if action.option_strings and action.nargs not in (0, "?"):
            kind = KINDS.get(action.dest, "VALUE")
        about = {"help": action.help or "", "choices": [str(each) for each in action.choices or ()], "takes": kind}
        found.update({flag: about for flag in action.option_strings})
    return found


def about_groups(known: dict[str, list[str]], files: list[PresetFile], keys: set[str]) -> dict[str, Any]:
    """Each group with its presets, and whether it has keys."""
    names = {group: [*presets] for group, presets in known.items()}
    for file in files:
        if file.group.startswith("hydra/"):
            names.setdefault(file.group, []).append(file.name)
    names.setdefault("benchmark", [])
    by_name = {(file.group, file.name): file for file in files}
    return {
        group: {
            "meaning": MEANINGS.get(group, ""),
            "has_keys": any(key.startswith(f"{group.replace('/', '.')}.") for key in keys),
            "presets": {name: about_preset(by_name.get((group, name)), name) for name in presets},
        }
        for group, presets in names.items()
    }


def about_preset(file: PresetFile | None, name: str) -> dict[str, Any]:
    """A preset: the first comment of its file, and the preset whose class it has."""
    if file is None:
        return {"meaning": "", "class": name}
    return {"meaning": about_file(file.path), "class": file.typed_as}
