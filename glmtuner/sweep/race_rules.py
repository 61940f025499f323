"""Which jobs of a race go on after a rung: by paired intervals with a trend, or by rank. Pure functions of the evaluations.

The losses of two jobs are compared on the same records. With the totals x_i, y_i (nats) and the weights w_i (tokens) of record i, the
gap between the jobs is the ratio g = sum(x_i - y_i) / sum(w_i), and its standard error is that of a ratio by linearization (Cochran
1977, "Sampling Techniques", 6.4): s = sqrt(n / (n - 1) * sum((x_i - y_i - g w_i)^2)) / sum(w_i). g / s is compared with Student's t of
n - 1 degrees of freedom. A t interval and no bootstrap: the error rates that are left for one comparison are smaller than a
bootstrap of a few thousand resamples can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite, log
from typing import TYPE_CHECKING

import numpy
from scipy.special import stdtr, stdtrit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

PAIRED, HALVING = "paired", "halving"


@dataclass(frozen=True)
class Rule:
    """How jobs are dropped. `alpha` is the error rate of the whole race, `num_deciding` the number of rungs that it is spent on."""

    name: str
    alpha: float
    keep: int
    reduction_factor: int
    num_deciding: int

    @classmethod
    def of_race(cls, name: str, alpha: float, keep: int, reduction_factor: int, num_rungs: int) -> "Rule":
        """The rule of a race of `num_rungs` rungs; the first one of a paired race decides nothing, since it has no trend yet."""
        return cls(name, alpha, keep, reduction_factor, num_deciding=max(num_rungs - (name == PAIRED), 1))

    @property
    def alpha_of_rung(self) -> float:
        return self.alpha / self.num_deciding


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A job at a rung. The totals and weights are those of the same records in all jobs; smaller is better."""

    job: str
    step: int
    max_steps: int
    totals_N: "Array"
    weights_N: "Array"

    @classmethod
    def of(cls, job: str, step: int, max_steps: int, records: Sequence[tuple[float, float]]) -> "Evaluation":
        """An evaluation whose records are pairs of total and weight."""
        totals_N, weights_N = numpy.array(records, dtype=float).T
        return cls(job, step, max_steps, totals_N, weights_N)

    @property
    def value(self) -> float:
        """The loss per token, or the score that the race is about with its sign changed."""
        return float(self.totals_N.sum() / self.weights_N.sum())

    @property
    def is_finished(self) -> bool:
        return self.step >= self.max_steps


@dataclass(frozen=True)
class Gap:
    """By how much a job is behind the best one, the bounds of the gap's interval, and the probability of such a gap by chance."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """What a rung says of a job."""

    job: str
    value: float
    gap: Gap | None = None  # None of the best job; at the level of the job's step of Holm's procedure
    adjusted_p: float | None = None
    end: Gap | None = (
        None  # the gap extrapolated to the end of both trainings, at level 1 - alpha; None without an earlier rung
    )
    dropped: bool = False

    def evidence(self) -> dict[str, float | None]:
        """The numbers of the gap, and of the extrapolated one, by the names in race/rung-<n>.json."""
        found: dict[str, float | None] = {}
        if self.gap is not None:
            found = {"gap": self.gap.value, "low": self.gap.low, "high": self.gap.high, "p": self.gap.p}
            found["adjusted_p"] = self.adjusted_p
        if self.end is not None:
            found |= {"end_gap": self.end.value, "end_low": self.end.low, "end_high": self.end.high}
        return found


def decide(rule: Rule, now: Sequence[Evaluation], before: Sequence[Evaluation] | None) -> list[Verdict]:
    """The verdict on each job of a rung, in their order; `before` are the evaluations of the same jobs at the rung before.

    A finished job is never dropped, and at least `rule.keep` jobs go on, the best ones. Of equal jobs the first is the better.
    """
    totals_JN = numpy.stack([each.totals_N for each in now])
    weights_N = now[0].weights_N
    order = numpy.argsort([each.value for each in now], kind="stable")
    best, others = int(order[0]), order[1:]
    verdicts = [Verdict(each.job, each.value) for each in now]
    if len(others) == 0:
        return verdicts
    gaps_M, errors_M = gap_of(totals_JN[others] - totals_JN[best], weights_N)
    p_M = p_values(gaps_M, errors_M, len(weights_N))
    adjusted_M, levels_M = holm(p_M, rule.alpha_of_rung)
    gaps: Sequence[Gap] = intervals(gaps_M, errors_M, p_M, levels_M, len(weights_N))
    ends: Sequence[Gap | None] = [None] * len(others)
    if before is not None:
        end_JN = numpy.stack([extrapolated(one, other) for one, other in zip(now, before, strict=True)])
        ends_M, errors_M = gap_of(end_JN[others] - end_JN[best], weights_N)
        p_M = p_values(ends_M, errors_M, len(weights_N))
        known = intervals(ends_M, errors_M, p_M, numpy.full(len(others), rule.alpha), len(weights_N))
        ends = [end if isfinite(end.value) else None for end in known]
    for job, gap, adjusted_p, end in zip(others, gaps, adjusted_M, ends, strict=True):
        verdicts[job] = replace(verdicts[job], gap=gap, adjusted_p=float(adjusted_p), end=end)
    if rule.name == HALVING:
        leaving = set(order[max(ceil(len(now) / rule.reduction_factor), rule.keep) :])
    else:
        behind = [job for job in others if is_behind(verdicts[job], rule)]
        leaving = set(behind[max(rule.keep - (len(now) - len(behind)), 0) :])
    return [
        replace(verdict, dropped=job in leaving and not now[job].is_finished) for job, verdict in enumerate(verdicts)
    ]


def is_behind(verdict: Verdict, rule: Rule) -> bool:
    """Whether a job is behind the best one, and is not catching up: the gap is significant now, and extrapolated to the end."""
    if verdict.end is None or verdict.adjusted_p is None:
        return False
    return verdict.adjusted_p <= rule.alpha_of_rung and verdict.end.low > 0


def gap_of(differences_MN: "Array", weights_N: "Array") -> "tuple[Array, Array]":
    """The gaps [M] and their standard errors [M]; see the head of this module."""
    num_records = len(weights_N)
    gaps_M = differences_MN.sum(1) / weights_N.sum()
    residuals_MN = differences_MN - gaps_M[:, None] * weights_N
    variances_M = num_records / (num_records - 1) * (residuals_MN**2).sum(1)
    return gaps_M, numpy.sqrt(variances_M) / weights_N.sum()


def p_values(gaps_M: "Array", errors_M: "Array", num_records: int) -> "Array":
    """Two-sided p of each gap by Student's t; 1 where a gap is exactly 0."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        t_M = numpy.where(gaps_M == 0, 0.0, numpy.abs(gaps_M) / errors_M)
    p_M: Array = 2 * stdtr(num_records - 1, -t_M)
    return p_M


def intervals(gaps_M: "Array", errors_M: "Array", p_M: "Array", levels_M: "Array", num_records: int) -> list[Gap]:
    """The gaps with their two-sided intervals of coverage 1 - level."""
    widths_M = stdtrit(num_records - 1, 1 - levels_M / 2) * errors_M
    columns = (gaps_M, gaps_M - widths_M, gaps_M + widths_M, p_M)
    return [Gap(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def holm(p_M: "Array", alpha: float) -> "tuple[Array, Array]":
    """Holm's adjusted p values [M], and the level [M] that each comparison has in his procedure (Holm 1979).

    The k-th smallest of M values is compared with alpha / (M - k + 1), as long as all smaller ones were significant.
    """
    order = numpy.argsort(p_M, kind="stable")
    remaining_M = len(p_M) - numpy.arange(len(p_M))
    adjusted_M, levels_M = numpy.empty(len(p_M)), numpy.empty(len(p_M))
    adjusted_M[order] = numpy.minimum(numpy.maximum.accumulate(remaining_M * p_M[order]), 1.0)
    levels_M[order] = alpha / remaining_M
    return adjusted_M, levels_M


def extrapolated(now: Evaluation, before: Evaluation) -> "Array":
    """Each record's total at the end of the training, [N], if it goes on as between the two rungs in the logarithm of the step.

    A loss that falls as a power of the step falls ever slower in this scale, too, so that a job that catches up gets more credit
    than it needs. NaN where both rungs are at the same step; a finished job is at its end.
    """
    if now.is_finished:
        return now.totals_N
    if now.step <= before.step:
        return numpy.full_like(now.totals_N, numpy.nan)
    ahead = log(now.max_steps / now.step) / log(now.step / before.step)
    return now.totals_N + ahead * (now.totals_N - before.totals_N)
