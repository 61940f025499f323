"""`keys [PATTERN]`: every key of the configuration, with its type, its default, its choices and its meaning."""

import argparse
import json

from glmtuner.errors import ConfigError

HELP = "the keys of the configuration: type, default, choices, meaning"
TAKES = "[PATTERN]"  # in the help
WIDE = 120  # columns from which on each part has its own


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern", nargs="?", help="a part of the keys, or a glob such as 'trainer.*steps'; else a part of the meanings"
    )
    parser.add_argument("--lang", choices=("en", "zh"), help="language of the meanings; that of the locale by default")
    parser.add_argument("--json", action="store_true", help="one object per key")
    parser.add_argument("--config-dir", "-cd", help="a folder with presets of your own")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.config.compose import searched_dirs
    from glmtuner.config.key_meanings import language_of_locale
    from glmtuner.config.keys import all_keys, matching
    from glmtuner.console import say, table, width
    from glmtuner.data.entry_keys import entry_keys

    load_named_plugins(overrides, "keys [PATTERN]")
    language = arguments.lang or language_of_locale()
    keys = [*all_keys(searched_dirs(arguments.config_dir), language), *entry_keys(language)]
    found = matching(keys, arguments.pattern)
    if arguments.json:
        for key in found:
            say(json.dumps(key.record(), ensure_ascii=False))
        return 0
    is_wide = width() >= WIDE
    rows: list[tuple[str, ...]] = []
    for key in found:
        default = "" if key.default is None else key.default
        listed = [" | ".join(key.choices)] if key.type.startswith("one of the choices") else []
        meaning = "\n".join([key.meaning, *listed, *([", ".join(key.presets)] if key.presets else [])])
        kind = f"{key.type}; default {default}" if default else f"{key.type}; no default"
        rows.append((key.name, key.type, default, meaning) if is_wide else (f"{key.name}\n{kind}", meaning))
    table("", ("key", "type", "default", "meaning") if is_wide else ("key", "meaning"), rows)
    return 0


def load_named_plugins(overrides: list[str], usage: str) -> None:
    """Import the modules of `plugins=…`; raises ConfigError for any other override."""
    from glmtuner.config.plugins import load_plugins

    names: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "plugins":
            raise ConfigError(
                f"{override}: of overrides only plugins=<module> is legal here, for the keys that it adds; type python -m glmtuner {usage}"
            )
        names += [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    load_plugins(names)
