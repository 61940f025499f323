"""JSON Schema of a dataset's entry, as dataset_info.json and conf/dataset/ have them."""

from __future__ import annotations

from typing import Any

from glmtuner.config.json_schema import DRAFT, closed, described
from glmtuner.data.catalog import NOT_TEXT, TYPES
from glmtuner.data.entry_keys import entry_keys, formattings

SOURCES = ("file_name", "url", "hf_hub_url", "ms_hub_url")
NOTHING = {"type": "null"}, {"const": ""}  # as if the key were left out
TEXT = {"anyOf": [{"type": "string"}, NOTHING[0]]}
TYPED: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer", "minimum": 1},
    bool: {"type": "boolean"},
    list: {"type": "array"},
}


def entry_schemas(language: str) -> dict[str, dict[str, Any]]:
    """The schemas `dataset`, of one entry, and `dataset_info`, of entries by name."""
    entry = _entry(language)
    listed = {"type": "object", "additionalProperties": {"$ref": "#/$defs/entry"}}
    return {
        "dataset": {"$schema": DRAFT, "title": "a dataset", **entry},
        "dataset_info": {"$schema": DRAFT, "title": "datasets by name", "$defs": {"entry": entry}, **listed},
    }


def _entry(language: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {"columns": {}, "tags": {}}
    for key in entry_keys(language):
        _, name, *rest = key.name.split(".")
        if rest:
            values = {"anyOf": [*NOTHING]} if rest[0] in NOT_TEXT else TEXT
            inner[name][rest[0]] = described(values, key.meaning)
        elif name == "formatting":
            properties[name] = described({"anyOf": [{"enum": [*formattings()]}, *NOTHING]}, key.meaning, "alpaca")
        elif name not in inner:
            kinds = [TYPED[kind] for kind in TYPES.get(name, (str,))]
            properties[name] = described({"anyOf": [*kinds, *NOTHING]}, key.meaning)
        else:
            properties[name] = key.meaning
    for name, keys in inner.items():
        properties[name] = described({"anyOf": [closed(keys), *NOTHING]}, properties[name])
    filled = {"type": "string", "minLength": 1}
    has_source = [{"required": [name], "properties": {name: filled}} for name in SOURCES]
    needs_sum = {"if": {"required": ["url"], "properties": {"url": filled}}, "then": {"required": ["sha256"]}}
    return closed(properties, anyOf=has_source, **needs_sum)
