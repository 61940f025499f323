"""What each key means, in one line, in English and Chinese: glmtuner/assets/keys.yaml."""

import os
from functools import cache

from glmtuner.config.paths import ASSETS

LANGUAGES = ("en", "zh")
MEANINGS = ASSETS / "keys.yaml"
ENTRY = "dataset_info"  # what the keys of a dataset's entry stand below there


@cache
def key_meanings() -> dict[str, dict[str, str]]:
    """Dotted key -> language -> its meaning."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is installed
    meanings: dict[str, dict[str, str]] = yaml.load(MEANINGS.read_text(encoding="utf-8"), Loader=loader)
    return meanings


def meaning_of(key: str, language: str) -> str:
    """The meaning of a key in a language; empty for a key of a plugin."""
    return key_meanings().get(key, {}).get(language, "")


def language_of_locale() -> str:
    """`zh` where the locale is a Chinese one (LC_ALL, else LC_MESSAGES, else LANG), and `en` otherwise."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.lower().startswith("zh") else "en"
