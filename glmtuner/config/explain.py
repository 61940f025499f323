"""Composition errors of Hydra and OmegaConf as one paragraph in the form of glmtuner's own."""

import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from glmtuner.config.groups import SCHEMA_CLASSES
from glmtuner.config.removed import removed_key, removed_preset
from glmtuner.config.rewards import GROUP as REWARD
from glmtuner.errors import GlmtunerError, did_you_mean

SAMPLER = "hydra/sweeper/sampler"


def explain(error: BaseException) -> str:
    """What is wrong, what is legal, what to type, from the first error along the `__cause__` chain that tells."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, GlmtunerError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _omegaconf(cause)
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            if why := removed_preset(group.removeprefix("schema/"), name):
                file = re.match(r"In '(?!config')[^']*': ", str(cause))  # a preset of the user's own
                return f"{file[0] if file else ''}{why}"
            if cause.options:
                legal = f"legal: {', '.join(cause.options)}"
                return f"{group}={name}: no {group} preset of that name{did_you_mean(name, cause.options, legal)}"
    if SAMPLER in str(error) and "No match in the defaults list" in str(error):
        return f"{SAMPLER}: samplers are of searches, and this sweep is none; type hydra/sweeper=optuna, too"
    if isinstance(error, OverflowError):  # an integer that no float holds; OmegaConf names the key in the message alone
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key.group(1) if key else 'a number'}: expected a number, and this one is too large"
    return _first_paragraph(str(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (
            error.__context__ if isinstance(error, (HydraException, OmegaConfBaseException)) else None
        )


def _omegaconf(error: OmegaConfBaseException) -> str:
    key, owner = str(error.key), error.object_type
    if isinstance(error, InterpolationResolutionError):
        return f"{error.full_key}: {_first_paragraph(str(error))}"
    group, _, rest = str(error.full_key).partition(".")
    if (
        group == REWARD
        and not is_dataclass(owner)
        and (name := rest.partition(".")[0]) in SCHEMA_CLASSES.get(REWARD, {})
    ):
        return f"{error.full_key}: this run has no {REWARD}={name}; type {REWARD}={name}, or {REWARD}=[…,{name}] for several"
    parent = error.parent_node
    if (
        group == "hydra"
        and isinstance(error, (ConfigKeyError, ConfigAttributeError))
        and isinstance(parent, DictConfig)
    ):
        if str(error.full_key).startswith("hydra.sweeper.params."):
            return f"{error.full_key}: on the command line a key has its search space itself; type '{key}=interval(…)', say"
        names = [str(name) for name in parent]
        if not names:  # a dictionary of free keys, such as additional_parameters of SLURM's launcher
            return f"{error.full_key}: a key that is new in a dictionary takes a plus; type +{error.full_key}=…"
        return f"unknown key {error.full_key!r}" + did_you_mean(key, names, f"legal: {', '.join(names)}")
    if not is_dataclass(owner):
        return f"{error.full_key}: {_first_paragraph(str(error))}"
    legal = [declared.name for declared in fields(owner)]
    if key in legal:
        hint = typing.get_type_hints(owner)[key]
        return f"{error.full_key}={_bad_value(error)}: {_expected(hint, error)}"
    if sentence := removed_key(str(error.full_key), "…"):
        return sentence
    message = f"unknown key {error.full_key!r}"
    with_key = [name for name, cls in SCHEMA_CLASSES.get(group, {}).items() if key in {f.name for f in fields(cls)}]
    current = next((name for name, cls in SCHEMA_CLASSES.get(group, {}).items() if cls is owner), None)
    if with_key:
        return (
            f"{message}: it belongs to {group}={' or '.join(with_key)}, and this run has {group}={current}; "
            f"type {group}={with_key[0]}, or leave {key} out. The keys of {group}={current}: {', '.join(legal)}"
        )
    return message + did_you_mean(key, legal, f"the keys of {group}: {', '.join(legal)}")


def _bad_value(error: OmegaConfBaseException) -> str:
    match = re.search(r"[Vv]alue '(.*?)'", str(error))
    return match.group(1) if match else "?"


def _expected(hint: object, error: OmegaConfBaseException) -> str:
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    nullable = type(None) in typing.get_args(hint)
    kind = args[0] if args and typing.get_origin(hint) is not list else hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        legal = [member.name for member in kind]
        return "not a legal value" + did_you_mean(_bad_value(error), legal, f"legal: {', '.join(legal)}")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = names.get(kind) if isinstance(kind, type) else None
    if expected is None:
        expected = (
            f"a list, such as [{', '.join('ab')}]" if typing.get_origin(hint) is list else f"a value of type {hint}"
        )
    return f"expected {expected}{' or null' if nullable else ''}"


def _first_paragraph(message: str) -> str:
    """The message on one line, without OmegaConf's trailer of keys and types and without Hydra's advice to append with `+`."""
    lines = []
    for line in message.splitlines():
        if line.strip().startswith(
            ("full_key:", "object_type=", "reference_type=", "To append", "See https", "Set the env")
        ):
            continue
        if line.strip():
            lines.append(line.strip())
    return " ".join(lines)
