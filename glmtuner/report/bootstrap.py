"""The uncertainty of a score, from the records it was measured on: percentile bootstrap intervals.

A score is a ratio: the sum of the records' totals over the sum of their weights. For a mean over records the weights are 1;
for a loss per token the totals are nats and the weights numbers of tokens. The records are resampled with replacement, and
the ratio is computed for each resample (Efron 1979, "Bootstrap methods: another look at the jackknife"). Two runs are
compared on the same resamples (Koehn 2004, "Statistical significance tests for machine translation evaluation"), so that
records that are hard for both do not widen the interval of their difference. The intervals do not include the variance
between seeds of training.
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
RESAMPLES_PER_PRODUCT = 200  # bounds the memory of the matrix products

TotalsAndWeights = Sequence[tuple[float, float]]  # of each record


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its interval, and the number of records that it was measured on."""

    value: float
    low: float
    high: float
    num_records: int

    @property
    def contains_zero(self) -> bool:
        """Whether 0 is within the bounds."""
        return self.low <= 0 <= self.high


def interval(records: TotalsAndWeights, baseline: TotalsAndWeights | None = None) -> Interval | None:
    """The 95 % interval of the records' score, or of its difference to the score of `baseline` on the same records.

    None for fewer than two records, or if a score is not finite. Raises ValueError if the numbers of records differ.
    """
    import numpy

    columns = numpy.array(
        records if baseline is None else [[*one, *other] for one, other in zip(records, baseline, strict=True)]
    )
    if len(columns) < 2 or not numpy.isfinite(columns).all():
        return None
    counts = _resample_counts(len(columns))
    sums = numpy.concatenate(
        [
            counts[start : start + RESAMPLES_PER_PRODUCT].astype(float) @ columns
            for start in range(0, RESAMPLES, RESAMPLES_PER_PRODUCT)
        ]
        + [columns.sum(0)[None]]
    )
    with numpy.errstate(divide="ignore", invalid="ignore"):
        scores = sums[:, 0] / sums[:, 1] - (0 if baseline is None else sums[:, 2] / sums[:, 3])
    resampled, value = scores[:-1], scores[-1]
    resampled = resampled[numpy.isfinite(resampled)]  # a resample whose weights are all 0 has no score
    if not numpy.isfinite(value) or len(resampled) == 0:
        return None
    low, high = numpy.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), len(columns))


@lru_cache(maxsize=4)
def _resample_counts(num_records: int) -> "numpy.ndarray":
    """How often each record occurs in each resample, uint16 [RESAMPLES, num_records]; the same at every call."""
    import numpy

    random = numpy.random.default_rng(SEED)
    counts = numpy.empty((RESAMPLES, num_records), dtype=numpy.uint16)
    for row in counts:
        row[:] = numpy.bincount(random.integers(num_records, size=num_records), minlength=num_records)
    return counts
