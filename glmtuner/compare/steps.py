"""Two histories step by step: equal, the same but for rounding, or apart from a step on."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from glmtuner.report.ranking import NON_SCORE_SUFFIXES
from glmtuner.run_folder.files import is_number

COSTS = ("peak_memory_gib", "train_mfu", "mfu", "train_tokens_per_second", "tokens_per_second")
# Relative difference up to which two runs are called the same but for rounding. The unit roundoff is 6e-8 in fp32, 5e-4 in
# fp16 and 4e-3 in bf16, and training amplifies it from step to step.
ROUNDING, ROUNDING_HALF = 1e-4, 2e-2
# Smaller values are measured against this one: a reward or a loss near 0 is a difference of sums, whose rounding is theirs.
FLOOR = 0.01


def is_cost(name: str) -> bool:
    """Whether a logged value is of time, speed or memory, which differ between two runs of the same bytes."""
    return name in COSTS or name.endswith(NON_SCORE_SUFFIXES)


def rounding_of(values: Mapping[str, Any]) -> float:
    """The relative difference that rounding may cause in the precision of a run, by its flat configuration."""
    half = values.get("trainer.bf16") or values.get("trainer.fp16")
    typed = str(values.get("model.dtype")) in ("bfloat16", "float16")
    return ROUNDING_HALF if half or typed or values.get("quant.quantization_bit") else ROUNDING


def is_score(name: str) -> bool:
    """Whether it is a score of answers, which jumps when one token is another; answers are compared one by one."""
    return name.startswith("eval_") and not name.endswith("loss")


class Parting(NamedTuple):
    """A logged value that differs."""

    step: int
    name: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """The difference over the larger of both; infinite where only one is finite. A learning rate, which is no sum, has no floor."""
        return relative_difference(self.before, self.after, 0.0 if self.name == "learning_rate" else FLOOR)


def relative_difference(before: float, after: float, floor: float = FLOOR) -> float:
    """|before - after| over the larger magnitude, or `floor` if that is larger; 0 for equal ones, two NaNs among them."""
    if before == after or (math.isnan(before) and math.isnan(after)):
        return 0.0
    if not (math.isfinite(before) and math.isfinite(after)):
        return math.inf
    return abs(before - after) / max(abs(before), abs(after), floor)


@dataclass(frozen=True)
class Steps:
    """The comparison of two histories over the steps that both logged."""

    common: list[int]
    only: tuple[list[int], list[int]]  # the steps that one of them alone logged
    partings: list[Parting]  # by step
    missing: list[tuple[int, str]]  # values that only one of them logged at a common step

    @property
    def are_equal(self) -> bool:
        return not (self.partings or self.missing or any(self.only))

    @property
    def first(self) -> Parting | None:
        """The first value that differs at all."""
        return self.partings[0] if self.partings else None

    @property
    def largest(self) -> Parting | None:
        """The value with the largest relative difference, of those that both runs have and that are no scores of answers."""
        return max(
            (each for each in self.partings if not is_score(each.name)), key=lambda each: each.relative, default=None
        )

    @property
    def largest_loss(self) -> Parting | None:
        """The loss with the largest relative difference."""
        losses = (each for each in self.partings if each.name.endswith("loss"))
        return max(losses, key=lambda each: each.relative, default=None)

    def first_beyond(self, rounding: float) -> Parting | None:
        """The first value that differs by more than rounding."""
        return next((each for each in self.partings if not is_score(each.name) and each.relative > rounding), None)


def by_step(history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The logged values of each step, costs left out; of a value that was logged twice at a step, the last."""
    steps: dict[int, dict[str, float]] = {}
    for line in history:
        values = {name: value for name, value in line.items() if name not in ("step", "epoch") and not is_cost(name)}
        own = steps.setdefault(int(line["step"]), {})
        own.update(
            {
                name: math.nan if value is None else value
                for name, value in values.items()
                if value is None or is_number(value)
            }
        )
    return steps


def compare_steps(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> Steps:
    """Where two histories differ."""
    one, other = by_step(before), by_step(after)
    common = sorted(one.keys() & other.keys())
    partings, missing = [], []
    for step in common:
        for name in dict.fromkeys([*one[step], *other[step]]):
            if name not in one[step] or name not in other[step]:
                missing.append((step, name))
            elif relative_difference(one[step][name], other[step][name]):
                partings.append(Parting(step, name, one[step][name], other[step][name]))
    return Steps(common, (sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())), partings, missing)
