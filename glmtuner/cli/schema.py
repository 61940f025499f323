"""`schema`: JSON Schema of presets, experiments and dataset entries, by which editors complete and check them."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmtuner.cli.keys import load_named_plugins
from glmtuner.errors import ConfigError

HELP = "JSON Schema for editors, which complete and check YAML by it"
TAKES = "[--to DIR]"  # in the help
FOLDER = Path(".glmtuner/schema")
SETTINGS = Path(".vscode/settings.json")
FRAGMENT = "vscode.json"
ENTRIES = "dataset_info.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=Path, default=FOLDER, metavar="DIR", help=f"where to write it; {FOLDER} by default"
    )
    parser.add_argument("--config-dir", "-cd", help="a folder with presets of your own, whose names are legal, too")
    parser.add_argument("--lang", choices=("en", "zh"), help="language of the meanings; that of the locale by default")
    parser.add_argument("--vscode", action="store_true", help=f"also set it in {SETTINGS} of the current folder")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say

    load_named_plugins(overrides, "schema")
    folder: Path = arguments.to
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to {folder}: it is a file; type the name of a folder, such as --to {FOLDER}")
    settings = SETTINGS if arguments.vscode else None
    before = read_settings(settings) if settings else {}  # before anything is written
    schemas = every_schema(arguments.config_dir, arguments.lang)
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas.items():
        write_json(folder / f"{name}.json", schema)
    fragment = vscode_settings(folder, schemas, arguments.config_dir)
    write_json(folder / FRAGMENT, fragment)
    say(f"{folder}: {len(schemas)} schemas")
    if settings:
        settings.parent.mkdir(exist_ok=True)
        write_json(settings, merged_settings(before, fragment))
        say(f"VS Code (with the extension YAML of Red Hat): they are set in {settings}")
    else:
        say(
            f"VS Code (with the extension YAML of Red Hat): {folder / FRAGMENT} is to go into {SETTINGS}; --vscode does it"
        )
    say(f'or one by one, such as "yaml.schemas": {json.dumps(one_line(fragment))}')
    return 0


def every_schema(config_dir: str | None, language: str | None) -> dict[str, dict[str, Any]]:
    """The schemas by name: of the groups, experiments and conf/config.yaml, and of datasets."""
    from glmtuner.config.compose import presets, searched_dirs
    from glmtuner.config.json_schema import Source, config_schemas
    from glmtuner.config.key_meanings import language_of_locale
    from glmtuner.config.keys import hydra_keys
    from glmtuner.config.preset_files import preset_files
    from glmtuner.data.entry_schema import entry_schemas
    from glmtuner.finetuning.peft_schema import peft_rules

    searched = searched_dirs(config_dir)
    files = preset_files(searched)
    language = language or language_of_locale()
    extra = {("finetuning", "peft"): peft_rules}
    source = Source(files, presets(searched), hydra_keys(files, language), language, extra)
    return {**config_schemas(source), **entry_schemas(language)}


def vscode_settings(folder: Path, schemas: Iterable[str], config_dir: str | None) -> dict[str, Any]:
    """The settings that give each file its schema: those of conf/, of folders whose names end in conf, and of `config_dir`."""
    place = folder.as_posix() if folder.is_absolute() else f"./{folder.as_posix()}"
    roots = ["**/*conf"]
    if config_dir is not None and not Path(config_dir).name.endswith("conf"):
        roots.append(f"**/{Path(config_dir).expanduser().resolve().name}")
    globs = {}
    for name in schemas:
        if name != "dataset_info":
            inside = "config.yaml" if name == "config" else f"{name.replace('.', '/')}/*.yaml"
            globs[f"{place}/{name}.json"] = [f"{root}/{inside}" for root in roots]
    entries = {"fileMatch": [f"**/{ENTRIES}"], "url": f"{place}/{ENTRIES}"}
    # YAML 1.1, in which `no` and `off` are false, is that of Hydra
    return {"yaml.yamlVersion": "1.1", "yaml.schemas": globs, "json.schemas": [entries]}


def one_line(fragment: dict[str, Any]) -> dict[str, Any]:
    """The entry for experiments, as an example."""
    return {place: globs for place, globs in fragment["yaml.schemas"].items() if place.endswith("/experiment.json")}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the workspace; raises ConfigError for what is not plain JSON, which is not rewritten."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--vscode: {path} is not plain JSON (comments and commas at an end are not), and is left as it is; leave --vscode "
            f"out, and copy what {FOLDER / FRAGMENT} will hold"
        )
    return content


def merged_settings(before: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of the fragment: other schemas stay, an earlier entry for the same file is replaced."""
    old = before.get("yaml.schemas")
    urls = [each["url"] for each in fragment["json.schemas"]]
    listed = before.get("json.schemas")
    kept = [
        each
        for each in (listed if isinstance(listed, list) else [])
        if not (isinstance(each, dict) and each.get("url") in urls)
    ]
    return {
        **before,
        **fragment,
        "yaml.schemas": {**(old if isinstance(old, dict) else {}), **fragment["yaml.schemas"]},
        "json.schemas": [*kept, *fragment["json.schemas"]],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
