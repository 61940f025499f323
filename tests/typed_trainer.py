"""Trainer values as they are typed, without Hydra, which takes a tenth of a second a configuration."""

import typing
from enum import Enum
from typing import Any

import yaml

from glmtuner.config.groups import Trainer


def trainer_of(*words: str, **values: Any) -> Trainer:
    """The trainer of a training with `trainer.<name>=<value>` typed; other words are left out."""
    hints = typing.get_type_hints(Trainer)
    typed: dict[str, Any] = {"do_train": True}
    for word in words:
        key, _, text = word.partition("=")
        if key.startswith("trainer."):
            typed[key.removeprefix("trainer.")] = yaml.safe_load(text)
    typed |= values
    for name, value in typed.items():
        parts = {hints[name], *typing.get_args(hints[name])}
        kind = next((part for part in parts if isinstance(part, type) and issubclass(part, Enum)), None)
        if kind is not None:
            typed[name] = kind(value)
        elif float in parts and value is not None:
            typed[name] = float(value)
        elif str in parts and value is not None and not isinstance(value, list):
            typed[name] = str(value)
    return Trainer(**typed)
