"""Record formats, one file each: `parse(raw, spec)` makes an `Example` of a record or raises `BadRecord`.

A format is selected by the name of its file (`formatting` of a dataset's entry), so a new one is a new file and nothing else.
Besides `parse` it has `COLUMNS`: the names of its columns if an entry names none, the required one first. A plugin adds one with `register_format`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from glmtuner.errors import UnknownName

if TYPE_CHECKING:
    from glmtuner.data.records import Example
    from glmtuner.data.spec import DatasetSpec

    Parser = Callable[[dict[str, Any], DatasetSpec], Example]

ALIASES = {"openai": "messages"}  # LLaMA-Factory's names
_registered: dict[str, ModuleType | SimpleNamespace] = {}  # by plugins


def register_format(name: str, parse: Parser, columns: dict[str, str]) -> None:
    """Add a plugin's format under a name; `columns` are its default columns, the required one first."""
    _registered[name] = SimpleNamespace(parse=parse, COLUMNS=columns, __file__=inspect.getsourcefile(parse))


def format_source(formatting: str) -> str | None:
    """The source file of a plugin's format; None for a format of the package."""
    return getattr(_registered.get(formatting), "__file__", None)


def parser(formatting: str) -> Parser:
    """The `parse` function of a format; raises UnknownName."""
    parse: Parser = format_module(formatting).parse
    return parse


def default_columns(formatting: str) -> dict[str, str]:
    """The columns of a format if an entry names none; raises UnknownName."""
    columns: dict[str, str] = format_module(formatting).COLUMNS
    return dict(columns)


def formats() -> list[str]:
    """The names of the formats, those of plugins included."""
    return [*(module.name for module in pkgutil.iter_modules(__path__)), *_registered]


def format_module(formatting: str) -> ModuleType | SimpleNamespace:
    """The module of a format, or what a plugin registered for it; raises UnknownName."""
    if formatting in _registered:
        return _registered[formatting]
    known = formats()
    name = ALIASES.get(formatting, formatting)
    if name not in known:
        raise UnknownName("formatting", formatting, known, add_one="glmtuner/data/formats/<name>.py with a `parse`")
    return import_module(f"{__name__}.{name}")
