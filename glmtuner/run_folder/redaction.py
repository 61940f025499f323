"""Redaction of secrets (tokens, API keys, passwords) from everything that a run writes."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECRETS = ("token", "api_key", "password", "secret")
SECRET_IN_DICT = re.compile(  # {token: …} inside a value
    rf"""((?<![^\W_])(?:{"|".join(SECRETS)})['"]?\s*:\s*)(?:'[^']*'|"[^"]*"|[^,{{}}]+)"""
)
HIDDEN = "<hidden>"  # in place of a secret's value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys; an empty dictionary is kept as a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def redact_config(config: DictConfig) -> DictConfig:
    """A resolved copy of the config in which secrets are null."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    assert isinstance(copy, DictConfig)
    for key, value in flatten(OmegaConf.to_container(copy)).items():
        if isinstance(value, str) and _is_secret(key):
            OmegaConf.update(copy, key, None)
    return copy


def redact_overrides(overrides: list[str]) -> list[str]:
    """The overrides with HIDDEN in place of the values of secrets."""
    redacted = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        redacted.append(
            f"{key}={HIDDEN}" if equals and _is_secret(key) else SECRET_IN_DICT.sub(rf"\1{HIDDEN}", override)
        )
    return redacted


def _is_secret(key: str) -> bool:
    """Whether the last part of a dotted key is the name of a secret, or ends with one (`hub_token`)."""
    leaf = key.rpartition(".")[2]
    return any(leaf == name or leaf.endswith(f"_{name}") for name in SECRETS)
