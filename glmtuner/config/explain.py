"""A composition error of Hydra's or OmegaConf's as one paragraph in our words."""

import re
import typing
from dataclasses import fields, is_dataclass
from enum import Enum

from hydra.errors import HydraException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from glmtuner.config.groups import SCHEMA_CLASSES
from glmtuner.errors import GlmtunerError, did_you_mean


def explain(error: BaseException) -> str:
    """What is wrong, what is legal, what to type, from an error along the `__cause__` chain."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, GlmtunerError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _omegaconf(cause)
    return _first_paragraph(str(error))


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or (
            error.__context__ if isinstance(error, (HydraException, OmegaConfBaseException)) else None
        )


def _omegaconf(error: OmegaConfBaseException) -> str:
    key, owner = str(error.key), error.object_type
    if isinstance(error, InterpolationResolutionError):
        return f"{error.full_key}: {_first_paragraph(str(error))}"
    if not is_dataclass(owner):
        return f"{error.full_key}: {_first_paragraph(str(error))}"
    legal = [declared.name for declared in fields(owner)]
    if key in legal:
        hint = typing.get_type_hints(owner)[key]
        return f"{error.full_key}={_bad_value(error)}: {_expected(hint, error)}"
    told = f"unknown key {error.full_key!r}"
    group = str(error.full_key).partition(".")[0]
    homes = [name for name, cls in SCHEMA_CLASSES.get(group, {}).items() if key in {f.name for f in fields(cls)}]
    here = next((name for name, cls in SCHEMA_CLASSES.get(group, {}).items() if cls is owner), None)
    if homes:
        return (
            f"{told}: it belongs to {group}={' or '.join(homes)}, and this run has {group}={here}; "
            f"type {group}={homes[0]}, or leave {key} out. {group}={here} knows: {', '.join(legal)}"
        )
    return told + did_you_mean(key, legal, f"{group} knows: {', '.join(legal)}")


def _bad_value(error: OmegaConfBaseException) -> str:
    found = re.search(r"[Vv]alue '(.*?)'", str(error))
    return found.group(1) if found else "?"


def _expected(hint: object, error: OmegaConfBaseException) -> str:
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    nullable = type(None) in typing.get_args(hint)
    kind = args[0] if args and typing.get_origin(hint) is not list else hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        legal = [member.name for member in kind]
        return "no such value" + did_you_mean(_bad_value(error), legal, f"legal: {', '.join(legal)}")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = names.get(kind) if isinstance(kind, type) else None
    if expected is None:
        expected = (
            f"a list, such as [{', '.join('ab')}]" if typing.get_origin(hint) is list else f"a value of type {hint}"
        )
    return f"expected {expected}{' or null' if nullable else ''}"


def _first_paragraph(message: str) -> str:
    """The message's sentences on one line, without OmegaConf's key and type trailer and Hydra's advice to append."""
    lines = []
    for line in message.splitlines():
        if line.strip().startswith(
            ("full_key:", "object_type=", "reference_type=", "To append", "See https", "Set the env")
        ):
            continue
        if line.strip():
            lines.append(line.strip())
    return " ".join(lines)
