"""Placeholders for the secrets of a sweep, in everything that Hydra, its sweepers and its launchers get.

They write the overrides down: in multirun.yaml, in submitit's pickles and scripts, as attributes of a search's trials, in the
names of folders. The values are in an environment variable of this process, which the jobs inherit, and nowhere else.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from glmtuner.config.overrides import parse
from glmtuner.errors import ConfigError
from glmtuner.run_folder.redaction import Replace, is_secret, redact_text, replace_in_override

VARIABLE = "GLMTUNER_SWEEP_SECRETS"  # a JSON list of the values, by the numbers of their placeholders
PLACEHOLDER = re.compile(r"GLMTUNER_SECRET_(\d+)_")


@contextmanager
def placeholders(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides with placeholders for secrets; within the context, `reveal` puts the values back, here and in child processes."""
    values: list[str] = []

    def placeholder(secret: str) -> str:
        if secret not in values:
            values.append(secret)
        return f"GLMTUNER_SECRET_{values.index(secret)}_"

    public = [_public(override, placeholder) for override in overrides]
    before = os.environ.get(VARIABLE)
    if values:
        os.environ[VARIABLE] = json.dumps(values)
    try:
        yield public
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def _public(override: str, placeholder: Replace) -> str:
    """The override with placeholders; each value of a swept secret gets one of its own, so that it is still swept."""
    key, equals, value = override.partition("=")
    if equals and is_secret(key.lstrip("+~"), value):
        (parsed,) = parse([override])
        if parsed.is_choice_sweep():
            return f"{key}={','.join(placeholder(element) for element in parsed.sweep_string_iterator())}"
    return replace_in_override(override, placeholder) if equals else override


def reveal(text: str) -> str:
    """The text with its placeholders replaced by their values; raises ConfigError if this process did not inherit them."""
    if not PLACEHOLDER.search(text):
        return text
    if VARIABLE not in os.environ:
        raise ConfigError(
            f"{redact_text(text)}: the secrets that were typed reach a job by the environment variable {VARIABLE}, and this job did "
            "not get it; let the cluster pass the environment on (sbatch --export=ALL, its default), or set HF_TOKEN and the like in "
            "the job's own environment instead of typing them"
        )
    values = json.loads(os.environ[VARIABLE])
    return PLACEHOLDER.sub(lambda match: str(values[int(match.group(1))]), text)


def without_secrets(config: DictConfig) -> DictConfig:
    """A copy of a Hydra configuration, not resolved, with secrets of YAML files redacted."""
    redacted = copy.deepcopy(config)
    with read_write(redacted), open_dict(redacted):
        _redact_nodes(redacted)
    return redacted


def _redact_nodes(node: DictConfig | ListConfig, name: str = "") -> None:
    keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        path = f"{name}.{key}" if isinstance(node, DictConfig) else name
        if isinstance(value, (DictConfig, ListConfig)):
            _redact_nodes(value, path)
        elif isinstance(value, str) and not PLACEHOLDER.search(value):
            public = redact_text(f"{key}={value}").partition("=")[2] if is_secret(path, value) else redact_text(value)
            if public != value:
                node[key] = public
