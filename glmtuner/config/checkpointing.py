"""The options of activation checkpointing: trainer.activation_checkpointing_kwargs, or by its earlier name gradient_…."""

from collections.abc import Iterator
from typing import Any

from glmtuner.config.schedules import dictionary
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.config.trainer_fields import shown
from glmtuner.errors import did_you_mean

KEYS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
FLAGS = ("use_reentrant", "preserve_rng_state", "offload", "early_stop", "debug")
OPTIONS = (*FLAGS, "every_n_layers", "determinism_check")
LISTED = f"legal: {', '.join(OPTIONS)}"
NOT_REENTRANT = ("debug", "determinism_check")  # torch takes them with use_reentrant=False only


def configured_checkpointing(trainer: TrainerArguments) -> bool | None:
    """What trainer.activation_checkpointing says, or its earlier name trainer.gradient_checkpointing; None if neither does."""
    named = (trainer.activation_checkpointing, trainer.gradient_checkpointing)
    return next((value for value in named if value is not None), None)


def checkpointing_options(trainer: TrainerArguments) -> dict[str, Any]:
    """The options under either name; empty if there are none."""
    return next((options for name in KEYS if (options := dictionary(getattr(trainer, name)))), {})


def checkpointing_errors(trainer: TrainerArguments) -> Iterator[str]:
    """A sentence for each option that does not exist, or whose value is illegal; what is no dictionary is left to others."""
    for key in KEYS:
        try:
            options = dictionary(getattr(trainer, key)) or {}
        except ValueError:
            continue
        for name, value in options.items():
            typed = f"trainer.{key}={shown({name: value})}"
            if name not in OPTIONS:
                yield f"{typed}{did_you_mean(str(name), OPTIONS, LISTED)}"
            elif name in FLAGS and not isinstance(value, bool):
                yield f"{typed}: true or false; type 'trainer.{key}={{{name}: true}}'"
            elif name == "every_n_layers" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                yield f"{typed}: a number of layers, at least 1; type 'trainer.{key}={{every_n_layers: 2}}'"
            elif name == "determinism_check" and value not in ("default", "none"):
                yield f"{typed}: default or none; type 'trainer.{key}={{determinism_check: none}}'"
            elif name in NOT_REENTRANT and options.get("use_reentrant"):
                yield f"{typed} with use_reentrant: true: torch has it for use_reentrant: false only; leave one of them out"
