"""Ranges of numeric configuration values, and checks of them in one form."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

LARGEST = 2**31 - 1
SEEDS = 2**32 - 1


def range_errors(group: str, owner: Any, checks: Iterable[tuple[str, bool, str]]) -> Iterator[str]:
    """`group.name=value: what is legal` for each illegal value; `checks` are (name, whether it is legal, what is legal)."""
    for name, is_legal, legal in checks:
        if not is_legal:
            yield f"{group}.{name}={getattr(owner, name)}: {legal}"


@dataclass(frozen=True)
class Range:
    """The legal values of a number, null aside, and the words for them."""

    low: float
    high: float
    words: str
    above: bool = False  # is `low` itself illegal?
    below: bool = False  # is `high` itself illegal?
    share_or_count: bool = False  # is a value of 1 or more a whole number?
    extra: float | None = None  # one more legal value

    def holds(self, value: float) -> bool:
        """Whether the value is legal; NaN never is."""
        if value == self.extra:
            return True
        if not (value > self.low if self.above else value >= self.low):
            return False
        if not (value < self.high if self.below else value <= self.high):
            return False
        return not self.share_or_count or value < 1 or value == int(value)


COUNT = Range(1, LARGEST, "1 or more")
COUNT_FROM_0 = Range(0, LARGEST, "0 or more")
CADENCE = Range(0, LARGEST, "a number of steps, or a share of all steps below 1", above=True, share_or_count=True)
BETA = Range(0, 1, "in [0, 1)", below=True)
NOT_NEGATIVE = Range(0, math.inf, "0 or more", below=True)

TRAINER_RANGES: Mapping[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": Range(0, LARGEST, "above 0; a fraction trains part of the last epoch", above=True),
    "max_steps": Range(1, LARGEST, "1 or more, or -1 for as many as trainer.num_train_epochs takes", extra=-1),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": Range(0, LARGEST, "a number of steps, or a share of all steps below 1", share_or_count=True),
    "warmup_ratio": Range(0, 1, "a share of the steps in [0, 1)", below=True),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BETA,
    "adam_beta2": BETA,
    "adam_epsilon": Range(0, math.inf, "above 0", above=True, below=True),
    "max_grad_norm": Range(0, math.inf, "0 or more; 0 clips nothing"),
    "label_smoothing_factor": Range(0, 1, "a share in [0, 1)", below=True),
    "neftune_noise_alpha": Range(
        0, math.inf, "above 0, such as 5; null adds no noise", above=True, below=True, extra=0
    ),
    "torch_empty_cache_steps": Range(1, LARGEST, "1 or more, or null for never"),
    "logging_steps": CADENCE,
    "eval_steps": Range(
        0,
        LARGEST,
        "a number of steps, a share of all steps below 1, or null for trainer.logging_steps",
        above=True,
        share_or_count=True,
    ),
    "save_steps": CADENCE,
    "save_total_limit": Range(1, LARGEST, "1 or more, or null for all of them; trainer.save_strategy=no saves none"),
    "eval_delay": Range(0, LARGEST, "0 or more steps, or epochs with trainer.eval_strategy=epoch"),
    "seed": Range(0, SEEDS, f"0 to {SEEDS}"),
    "data_seed": Range(0, SEEDS, f"0 to {SEEDS}, or null for trainer.seed"),
    "dataloader_num_workers": Range(0, 4096, "0 to 4096 processes"),
    "dataloader_prefetch_factor": Range(1, LARGEST, "1 or more, or null for 2"),
    "ddp_bucket_cap_mb": Range(1, LARGEST, "1 MiB or more, or null for 25"),
    "early_stopping_patience": Range(1, LARGEST, "1 or more evaluations, or null to train to the end"),
    "early_stopping_threshold": Range(0, math.inf, "0 or more, in units of the metric", below=True),
    "layerwise_lr_decay": Range(0, 1, "above 0 and at most 1, or null for one rate of all layers", above=True),
    "ddp_timeout": Range(1, LARGEST, "1 second or more"),
}


def trainer_range_errors(trainer: Any) -> Iterator[str]:
    """One sentence for each number of the trainer that is out of its range."""
    for name, legal in TRAINER_RANGES.items():
        value = getattr(trainer, name)
        if value is not None and not legal.holds(value):
            yield f"trainer.{name}={value}: {legal.words}"


def infinite_values(group: str, owner: Any) -> Iterator[str]:
    """One sentence for each number of a group that is NaN or infinite, and for each whole number that no computation takes."""
    for declared in fields(owner):
        value = getattr(owner, declared.name)
        numbers = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        key = f"{group}.{declared.name}"
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield f"{key}={value}: a finite number"
        elif any(type(number) is int and abs(number) > LARGEST for number in numbers):
            yield f"{key}={value}: a number of at most {LARGEST}"
