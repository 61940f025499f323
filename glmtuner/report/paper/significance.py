"""Which settings differ from the best one beyond chance: a paired test on records, corrected for the number of comparisons.

The test is approximate randomization (Noreen 1989, "Computer-intensive methods for testing hypotheses"; for scores of language
systems Yeh 2000, arXiv:cs/0008005): if two settings are equal, a record's two results could as well be exchanged. So p is the share
of all exchanges, or of a random sample of them, whose difference is at least as large as the one that was measured. For a mean over
records it is the sign-flip permutation test of their differences.

Several comparisons are corrected by Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from glmtuner.report.bootstrap import TotalsAndWeights
from glmtuner.report.ranking import Ranking, Row
from glmtuner.report.record_scores import RecordScores, common_records

if TYPE_CHECKING:
    import numpy

EXCHANGES = 10_000  # of a sample of them
MOST_EXACT = 13  # records up to which all 2^n exchanges are tried
SEED = 0
EXCHANGES_PER_PRODUCT = 500  # bounds the memory of the matrix products
SLACK = 1e-9  # relative: equal differences are not told apart by rounding


def paired_p_value(one: TotalsAndWeights, other: TotalsAndWeights) -> float | None:
    """The two-sided p-value of the difference of two scores on the same records, each a (total, weight) of both.

    None for fewer than two records, or where a score is not finite. Raises ValueError if the numbers of records differ.
    """
    import numpy

    if len(one) != len(other):
        raise ValueError(f"{len(one)} records are not {len(other)}")
    first, second = (numpy.array(each, dtype=float).reshape(-1, 2) for each in (one, other))
    if len(first) < 2 or not (numpy.isfinite(first).all() and numpy.isfinite(second).all()):
        return None
    sums, change = first.sum(0) + second.sum(0), second - first
    is_exact = len(first) <= MOST_EXACT
    measured, counted, extreme = abs(_difference(first.sum(0)[None], sums)[0]), 0, 0
    if not math.isfinite(measured):
        return None
    for exchanged in _exchanges(len(first), is_exact):
        differences = numpy.abs(_difference(first.sum(0) + exchanged @ change, sums))
        known = differences[numpy.isfinite(differences)]  # an exchange whose weights are all 0 has no score
        counted += len(known)
        extreme += int((known >= measured * (1 - SLACK)).sum())
    # of a sample the measured one itself is counted, so that p is never 0
    return extreme / counted if is_exact else (extreme + 1) / (counted + 1)


def _difference(sums: "numpy.ndarray", of_both: "numpy.ndarray") -> "numpy.ndarray":
    """The differences of the scores with these sums [n, 2] to those with the rest of the sums of both."""
    import numpy

    with numpy.errstate(divide="ignore", invalid="ignore"):
        rest = of_both - sums
        differences: numpy.ndarray = sums[:, 0] / sums[:, 1] - rest[:, 0] / rest[:, 1]
        return differences


def _exchanges(num_records: int, is_exact: bool) -> "Sequence[numpy.ndarray]":
    """Which records are exchanged: arrays of 0.0 and 1.0 [exchanges, num_records]; the same at every call."""
    import numpy

    if is_exact:
        numbers = numpy.arange(2**num_records)
        return [(numbers[:, None] >> numpy.arange(num_records) & 1).astype(float)]
    random = numpy.random.default_rng(SEED)
    sizes = [EXCHANGES_PER_PRODUCT] * (EXCHANGES // EXCHANGES_PER_PRODUCT)
    return [random.integers(2, size=(size, num_records)).astype(float) for size in sizes]


def holm(p_values: Sequence[float]) -> list[float]:
    """The adjusted p-values, in the given order: the comparison is significant at the level alpha if its value is at most alpha."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def against_the_best(ranking: Ranking) -> dict[int, float]:
    """Holm's adjusted p-value of each row's difference to the winner, by the row's place in the ranking.

    Rows without the scores of the same records are left out, and are not counted as comparisons.
    """
    winner, objective = ranking.winner, ranking.objective
    if winner is None or objective is None or objective not in winner.record_scores:
        return {}
    found = {
        place: p_value
        for place, row in enumerate(ranking.rows)
        if row is not winner and (p_value := _p_value(row, winner, objective)) is not None
    }
    return dict(zip(found, holm([*found.values()]), strict=True))


def _p_value(row: Row, winner: Row, objective: str) -> float | None:
    if objective not in row.record_scores:
        return None
    own, best = (averaged(each.record_scores[objective], len(each.jobs)) for each in (row, winner))
    records: list[Hashable] = common_records(own, best)
    return paired_p_value([own[record] for record in records], [best[record] for record in records])


def averaged(scores: RecordScores, num_runs: int) -> RecordScores:
    """The scores of records pooled over several runs, as those of one run: settings may have different numbers of seeds."""
    return {record: (total / num_runs, weight / num_runs) for record, (total, weight) in scores.items()}
