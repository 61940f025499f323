"""How sure a score is, from the samples it was measured on: percentile bootstrap intervals.

A score is a ratio, the sum of the samples' totals over the sum of their weights: a mean has weights of 1, a loss per token
has nats as totals and tokens as weights. The samples are drawn again with replacement, and the ratio is computed each time
(Efron 1979, "Bootstrap methods: another look at the jackknife"). Two runs are compared on the same draws (Koehn 2004,
"Statistical significance tests for machine translation evaluation"), so that samples hard for both do not blur the
difference. What another seed of training would change is not in these intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
ROWS = 200  # resamples multiplied at once: bounds the memory

Pairs = Sequence[tuple[float, float]]  # (total, weight) of each sample


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its interval, and how many samples it was measured on."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def interval(samples: Pairs, minus: Pairs | None = None) -> Interval | None:
    """The 95 % interval of the samples' ratio, or of its difference to that of `minus`, whose samples are the same ones.

    None for fewer than two samples, or where a score is no finite number.
    """
    import numpy

    columns = numpy.array(
        samples if minus is None else [[*one, *other] for one, other in zip(samples, minus, strict=True)]
    )
    if len(columns) < 2 or not numpy.isfinite(columns).all():
        return None
    counts = _counts(len(columns))
    sums = numpy.concatenate(
        [counts[row : row + ROWS].astype(float) @ columns for row in range(0, RESAMPLES, ROWS)] + [columns.sum(0)[None]]
    )
    with numpy.errstate(divide="ignore", invalid="ignore"):
        values = sums[:, 0] / sums[:, 1] - (0 if minus is None else sums[:, 2] / sums[:, 3])
    drawn, value = values[:-1], values[-1]
    drawn = drawn[numpy.isfinite(drawn)]  # a draw of samples without a token has no ratio
    if not numpy.isfinite(value) or len(drawn) == 0:
        return None
    low, high = numpy.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), len(columns))


@lru_cache(maxsize=4)
def _counts(samples: int) -> "numpy.ndarray":
    """How often each sample is drawn, in each of the resamples: [RESAMPLES, samples], the same at every call."""
    import numpy

    random = numpy.random.default_rng(SEED)
    drawn = numpy.empty((RESAMPLES, samples), dtype=numpy.uint16)
    for row in drawn:
        row[:] = numpy.bincount(random.integers(samples, size=samples), minlength=samples)
    return drawn
