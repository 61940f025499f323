"""Record shapes, one file each: `parse(raw, spec)` makes an `Example` of a record or raises `BadRecord`.

A shape is selected by its file's name (`formatting` of a dataset's entry), so a new one is a new file and nothing else.
Beside `parse` it has `COLUMNS`: what its columns are called when an entry names none, the one it cannot do without
first.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from glmtuner.errors import UnknownName

if TYPE_CHECKING:
    from glmtuner.data.records import Example
    from glmtuner.data.spec import DatasetSpec

    Parser = Callable[[dict[str, Any], DatasetSpec], Example]

ALIASES = {"openai": "messages"}  # the other tools' words


def parser(formatting: str) -> Parser:
    """The `parse` function of a record shape."""
    parse: Parser = shape(formatting).parse
    return parse


def default_columns(formatting: str) -> dict[str, str]:
    """The columns of a record shape when an entry names none."""
    columns: dict[str, str] = shape(formatting).COLUMNS
    return dict(columns)


def shape(formatting: str) -> ModuleType:
    """The module of a record shape."""
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    name = ALIASES.get(formatting, formatting)
    if name not in known:
        raise UnknownName("formatting", formatting, known, add_one="glmtuner/data/formats/<name>.py with a `parse`")
    return import_module(f"{__name__}.{name}")
