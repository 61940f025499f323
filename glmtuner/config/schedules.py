"""Checks of the learning-rate schedule: its arguments by name, type and range, without importing torch."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from glmtuner.config.optimizers import SCHEDULE_FREE
from glmtuner.config.trainer_arguments import SchedulerType, TrainerArguments
from glmtuner.errors import did_you_mean

WITHOUT_WARMUP = (SchedulerType.constant, SchedulerType.reduce_lr_on_plateau, SchedulerType.greedy)
AFTER_EVALUATIONS = (SchedulerType.reduce_lr_on_plateau, SchedulerType.greedy)
CURVES = ("linear", "cosine", "1-sqrt")
# An argument's legal values: a list of words, bool, or numbers as (smallest, largest, whole numbers only?)
SHARE = (0.0, 1.0, False)
NUMBER_FROM_0 = (0.0, math.inf, False)
WHOLE_FROM_0 = (0, math.inf, True)
WHOLE_FROM_1 = (1, math.inf, True)
Legal = tuple[float, float, bool] | tuple[str, ...] | type[bool]
WITH_MIN_LR: Mapping[str, Legal] = {"num_cycles": NUMBER_FROM_0, "min_lr": NUMBER_FROM_0, "min_lr_rate": SHARE}
ON_PLATEAU: Mapping[str, Legal] = {
    "mode": ("min", "max"), "factor": (0.0, 1.0, False), "patience": WHOLE_FROM_0, "threshold": NUMBER_FROM_0,
    "threshold_mode": ("rel", "abs"), "cooldown": WHOLE_FROM_0, "min_lr": NUMBER_FROM_0, "eps": NUMBER_FROM_0,
}  # fmt: skip
# What trainer.lr_scheduler_kwargs may hold.
ARGUMENTS: Mapping[SchedulerType, Mapping[str, Legal]] = {
    SchedulerType.linear: {},
    SchedulerType.cosine: {"num_cycles": NUMBER_FROM_0},
    SchedulerType.cosine_with_restarts: {"num_cycles": WHOLE_FROM_1},
    SchedulerType.polynomial: {"lr_end": NUMBER_FROM_0, "power": NUMBER_FROM_0},
    SchedulerType.constant: {},
    SchedulerType.constant_with_warmup: {},
    SchedulerType.inverse_sqrt: {"timescale": WHOLE_FROM_1},
    SchedulerType.reduce_lr_on_plateau: ON_PLATEAU,
    SchedulerType.cosine_with_min_lr: WITH_MIN_LR,
    SchedulerType.cosine_warmup_with_min_lr: {**WITH_MIN_LR, "warmup_lr_rate": SHARE},
    SchedulerType.warmup_stable_decay: {
        "num_decay_steps": WHOLE_FROM_0, "num_stable_steps": WHOLE_FROM_0, "warmup_type": CURVES, "decay_type": CURVES,
        "min_lr_ratio": SHARE, "num_cycles": NUMBER_FROM_0,
    },
    SchedulerType.greedy: {
        **ON_PLATEAU, "warmup": WHOLE_FROM_0, "max_lr": NUMBER_FROM_0, "verbose": bool, "smooth": bool,
        "window_size": WHOLE_FROM_1, "reset_start": WHOLE_FROM_0,
    },
}  # fmt: skip
GREEDY_MIN_LR = 1e-3  # transformers' default


def dictionary(value: Any) -> dict[str, Any] | None:
    """A dictionary that was given as such or as JSON text; None for null; raises ValueError for other text."""
    if value is None or isinstance(value, dict):
        return value
    parsed = json.loads(value)
    if not isinstance(parsed, dict):
        raise ValueError(value)
    return parsed


def schedule_errors(trainer: TrainerArguments) -> Iterator[str]:
    """One sentence for each argument of the schedule that it does not take, lacks, or cannot compute with."""
    kind = trainer.lr_scheduler_type
    setting = f"trainer.lr_scheduler_type={kind.value}"
    knob = f"trainer.lr_scheduler_kwargs={trainer.lr_scheduler_kwargs}"
    if (
        trainer.warmup_steps and kind in WITHOUT_WARMUP and trainer.optim.value not in SCHEDULE_FREE
    ):  # which warms up itself
        other = "constant_with_warmup" if kind is SchedulerType.constant else "linear or cosine"
        yield (
            f"trainer.warmup_steps={trainer.warmup_steps:g} with {setting}, which has no warm-up; type "
            f"trainer.lr_scheduler_type={other}, or trainer.warmup_steps=0"
        )
    if kind in AFTER_EVALUATIONS and trainer.eval_strategy == "no":
        yield (
            f"{setting} with trainer.eval_strategy=no: it changes the learning rate after evaluations; type "
            "trainer.eval_strategy=steps or epoch, or another schedule"
        )
    try:
        given = dictionary(trainer.lr_scheduler_kwargs) or {}
    except ValueError:
        yield f"{knob}: expected a dictionary; type 'trainer.lr_scheduler_kwargs={{<name>: <value>}}'"
        return
    legal = ARGUMENTS[kind]
    for name, value in given.items():
        argument = f"trainer.lr_scheduler_kwargs={{{name}: {value}}}"
        if name not in legal:
            listed = f"its arguments are {', '.join(legal)}" if legal else "it has no arguments; leave them out"
            yield f"{argument} with {setting}{did_you_mean(str(name), legal, listed)}"
        elif (expected := _expected(legal[name], value)) is not None:
            yield f"{argument} with {setting}: expected {expected}"
    if all(name in legal and _expected(legal[name], value) is None for name, value in given.items()):
        yield from _arguments_that_exclude_each_other(trainer, setting, given)


def _arguments_that_exclude_each_other(
    trainer: TrainerArguments, setting: str, given: Mapping[str, Any]
) -> Iterator[str]:
    kind, peak = trainer.lr_scheduler_type, trainer.learning_rate

    def example(name: str, value: float) -> str:
        return f"type 'trainer.lr_scheduler_kwargs={{{name}: {value:g}}}'"

    if kind in (SchedulerType.cosine_with_min_lr, SchedulerType.cosine_warmup_with_min_lr):
        if given.get("min_lr") is None and given.get("min_lr_rate") is None:
            yield f"{setting} needs a smallest learning rate, min_lr or min_lr_rate; {example('min_lr_rate', 0.1)}"
        elif given.get("min_lr") is not None and given.get("min_lr_rate") is not None:
            yield f"{setting} takes either min_lr or min_lr_rate; {example('min_lr_rate', given['min_lr_rate'])}"
    if kind is SchedulerType.warmup_stable_decay and given.get("num_decay_steps") is None:
        yield f"{setting} needs the length of its decay; {example('num_decay_steps', 100)}"
    if kind is SchedulerType.warmup_stable_decay and trainer.max_steps > 0:
        warmup = (
            trainer.warmup_steps if trainer.warmup_steps >= 1 else math.ceil(trainer.max_steps * trainer.warmup_steps)
        )
        phases = warmup + (given.get("num_decay_steps") or 0) + (given.get("num_stable_steps") or 0)
        if phases > trainer.max_steps:
            yield (
                f"{setting}: its phases take {phases:g} steps, and trainer.max_steps={trainer.max_steps}; type a smaller "
                "num_decay_steps, num_stable_steps or trainer.warmup_steps"
            )
    floor = given.get("min_lr", GREEDY_MIN_LR if kind is SchedulerType.greedy else 0)
    for name, value in (
        ("min_lr", floor),
        ("lr_end", given.get("lr_end", 1e-7 if kind is SchedulerType.polynomial else 0)),
    ):
        if value and value >= peak > 0:
            yield (
                f"{setting} with trainer.learning_rate={peak:g} and its {name}={value:g}: the schedule ends below its peak; "
                f"type a larger trainer.learning_rate, or {example(name, 0).removeprefix('type ')}"
            )
    if (given.get("max_lr") or peak) < peak:
        yield f"{setting} with trainer.learning_rate={peak:g} and its max_lr={given['max_lr']:g}: a larger max_lr, or leave it out"


def _expected(legal: Legal, value: Any) -> str | None:
    """What an argument takes, if not this value; None for a legal one."""
    if legal is bool:
        return None if isinstance(value, bool) else "true or false"
    assert isinstance(legal, tuple)
    if isinstance(legal[0], str):
        return None if value in legal else " or ".join(str(word) for word in legal)
    if value is None:
        return None
    low, high, whole = legal
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and low <= value <= min(high, sys.float_info.max) and (not whole or value == int(value)):
        return None
    kind = "a whole number" if whole else "a number"
    return f"{kind} from {low:g} to {high:g}" if high != math.inf else f"{kind}, {low:g} or more"
