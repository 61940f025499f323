"""The keys of a dataset's entry, in dataset_info.json and in conf/dataset/, as records."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from glmtuner.config.key_meanings import ENTRY, meaning_of
from glmtuner.config.keys import Key
from glmtuner.config.trainer_fields import default_of, shown
from glmtuner.data.catalog import COLUMNS, FOREIGN, INTERNAL, TAGS, TYPES
from glmtuner.data.formats import ALIASES, formats
from glmtuner.data.spec import DatasetSpec

WORDS = {str: "text", int: "whole number", bool: "true or false", dict: "mapping", list: "list of text"}


def entry_keys(language: str) -> list[Key]:
    """The keys of an entry, its columns and its tags, each below `dataset_info`."""
    keys = []
    for declared in fields(DatasetSpec):
        if declared.name not in INTERNAL:
            default = default_of(declared)
            keys.append(_key(declared.name, None if default is MISSING else default, language))
    keys += [_key(name, None, language) for name in FOREIGN]
    keys += [_key(f"{group}.{name}", None, language) for group, names in parts().items() for name in names]
    return keys


def parts() -> dict[str, tuple[str, ...]]:
    """The keys below `columns` and `tags`."""
    return {"columns": COLUMNS, "tags": TAGS}


def formattings() -> tuple[str, ...]:
    """What `formatting` can be."""
    return (*formats(), *ALIASES)


def _key(name: str, default: Any, language: str) -> Key:
    types = TYPES.get(name, (str,))
    choices = formattings() if name == "formatting" else ("true", "false") if types == (bool,) else ()
    kind = "one of the choices" if name == "formatting" else " or ".join(WORDS[kind] for kind in types)
    full = f"{ENTRY}.{name}"
    return Key(full, kind, shown(default), choices, (), meaning_of(full, language))
