"""Tokens and keys are left out of everything that a run writes."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECRETS = ("token", "api_key", "password", "secret")
IN_DICTIONARY = re.compile(  # {token: …} as a value
    rf"""((?<![^\W_])(?:{"|".join(SECRETS)})['"]?\s*:\s*)(?:'[^']*'|"[^"]*"|[^,{{}}]+)"""
)
HIDDEN = "<hidden>"  # stands for the value of one of them


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def redact_config(config: DictConfig) -> DictConfig:
    """A copy in which tokens and keys are null."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    assert isinstance(copy, DictConfig)
    for key, value in flatten(OmegaConf.to_container(copy)).items():
        leaf = key.rpartition(".")[2]
        if isinstance(value, str) and any(leaf == word or leaf.endswith(f"_{word}") for word in SECRETS):
            OmegaConf.update(copy, key, None)
    return copy


def redact_overrides(overrides: list[str]) -> list[str]:
    """What was typed, with the values of tokens and keys left out."""
    shown = []
    for word in overrides:
        key, equals, _ = word.partition("=")
        leaf = key.rpartition(".")[2]
        secret = equals and any(leaf == name or leaf.endswith(f"_{name}") for name in SECRETS)
        shown.append(f"{key}={HIDDEN}" if secret else IN_DICTIONARY.sub(rf"\1{HIDDEN}", word))
    return shown
