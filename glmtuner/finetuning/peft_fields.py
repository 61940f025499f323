"""The fields of PEFT's configuration classes: their types, of the classes themselves, and of a file that is read without torch.

A type is a list of alternatives: `bool`, `int`, `float`, `str`, `null`, `any`, `dict` (an object whose fields are free), or a
dictionary of one entry: `{"words": […]}` for values of an enumeration, `{"list": type}`, `{"dict": type}` of the values.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from importlib.metadata import version
from typing import Any

from glmtuner.config.paths import ASSETS
from glmtuner.errors import did_you_mean

STORED = ASSETS / "peft_fields.json"  # written by scripts/generate_peft_schema.py
# Fields that say what an adapter is of, not what it computes.
DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip
SIMPLE = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}
WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "any": "any value"}

Kind = list[Any]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of one configuration class that a run can set: name -> type, and name -> default."""

    owner: str
    kinds: Mapping[str, Kind]
    defaults: Mapping[str, Any]


@cache
def stored() -> tuple[str, dict[str, Fields]]:
    """The version of PEFT that the file was written for, and the fields of its methods by their names."""
    content = json.loads(STORED.read_text(encoding="utf-8"))
    found = {
        name: Fields(
            about["class"],
            {field: kind for field, (kind, _) in about["fields"].items()},
            {field: default for field, (_, default) in about["fields"].items()},
        )
        for name, about in content["methods"].items()
    }
    return content["peft"], found


def stored_fields(peft_type: str) -> Fields | None:
    """The fields of a method; None where the installed PEFT is another version, whose fields its own classes tell later."""
    known, methods = stored()
    return methods.get(peft_type) if version("peft") == known else None


def fields_of(cls: Any) -> Fields:
    """The fields of a configuration class of the installed PEFT."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # names that PEFT imports for type checkers alone
        hints = {}
    declared = {each.name: each for each in dataclasses.fields(cls) if each.init and each.name not in DESCRIPTIVE}
    kinds = {name: kind_of(hints.get(name, Any)) for name in declared}
    return Fields(cls.__name__, kinds, {name: _default(each) for name, each in declared.items()})


def kind_of(hint: Any) -> Kind:
    """The alternatives of an annotation; a list stands for a tuple and a set, a dictionary for a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [kind for each in arguments for kind in kind_of(each)]
        unique = [kind for index, kind in enumerate(found) if kind not in found[:index]]
        return sorted(
            unique, key=lambda kind: (kind == "null", str(kind))
        )  # typing gives equal unions the order of the first one
    if origin is typing.Literal:
        return [{"words": list(arguments)}]
    if hint in SIMPLE:
        return [SIMPLE[hint]]
    if hint is None:
        return ["null"]
    kind = origin or hint
    if kind in (list, tuple, set):
        inner = [each for each in arguments if each is not Ellipsis]
        return [{"list": kind_of(typing.Union[tuple(inner)]) if inner else ["any"]}]  # noqa: UP007
    if kind is dict:
        return [{"dict": kind_of(arguments[1]) if arguments else ["any"]}]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [{"words": [member.value for member in kind]}]
    return ["dict"] if dataclasses.is_dataclass(kind) else ["any"]


def _default(declared: "dataclasses.Field[Any]") -> Any:
    """A default as JSON has it; the text `required` where there is none."""
    value = declared.default
    if value is dataclasses.MISSING:
        if declared.default_factory is dataclasses.MISSING:
            return "required"
        value = declared.default_factory()
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value


def field_errors(fields: Fields, values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each value whose field the class does not have, or whose type the field does not take."""
    for name, value in values.items():
        if name not in fields.kinds:
            legal = f"the fields of {fields.owner}: {', '.join(fields.kinds)}"
            yield f"unknown key finetuning.config.{name}{did_you_mean(name, [*fields.kinds], legal)}"
        elif not fits(fields.kinds[name], value):
            default = shown(fields.defaults[name])
            yield (
                f"finetuning.config.{name}={shown(value)}: {fields.owner} takes {described(fields.kinds[name])}; its default is "
                f"{default}"
            )


def fits(kind: Kind, value: Any) -> bool:
    """Whether a value of YAML has one of the alternatives of a type."""
    return any(_fits(each, value) for each in kind)


def _fits(each: Any, value: Any) -> bool:
    if isinstance(each, dict):
        ((name, inner),) = each.items()
        if name == "words":
            return any(value == word and type(value) is type(word) for word in inner)
        if name == "list":
            return isinstance(value, list) and all(fits(inner, item) for item in value)
        return isinstance(value, dict) and all(fits(inner, item) for item in value.values())
    if each == "any":
        return True
    if each == "dict":
        return isinstance(value, dict)
    if each == "float":
        return type(value) in (int, float)
    return SIMPLE.get(type(value)) == each


def described(kind: Kind) -> str:
    """A type in the words of an error."""
    return " or ".join(_described(each) for each in kind)


def _described(each: Any) -> str:
    if isinstance(each, str):
        return {**WORDS, "dict": "a dictionary"}.get(each, each)
    ((name, inner),) = each.items()
    if name == "words":
        return ", ".join(map(shown, inner))
    return (
        f"{'a list' if name == 'list' else 'a dictionary'} of {described(inner)}" if inner != ["any"] else f"a {name}"
    )


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, set)):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
