"""The rules of a race, against scipy's paired t test, numbers computed by hand, and curves whose end is known."""

from math import sqrt

import numpy
import pytest
from scipy import stats

from glmtuner.sweep.race_rules import HALVING, PAIRED, Evaluation, Rule, decide, extrapolated, gap_of, holm

ONES = numpy.ones


def evaluation(job: str, totals: list[float] | numpy.ndarray, step: int = 20, max_steps: int = 100, weights=None):
    totals = numpy.asarray(totals, dtype=float)
    return Evaluation(job, step, max_steps, totals, ONES(len(totals)) if weights is None else numpy.asarray(weights))


def race(now, before=None, name: str = PAIRED, alpha: float = 0.05, keep: int = 1, factor: int = 3, rungs: int = 2):
    return decide(Rule.of_race(name, alpha, keep, factor, rungs), now, before)


def dropped(verdicts) -> list[str]:
    return [verdict.job for verdict in verdicts if verdict.dropped]


def test_a_gap_of_equal_weights_is_that_of_the_paired_t_test() -> None:
    random = numpy.random.default_rng(3)
    one, other = random.normal(2, 0.4, 30), random.normal(2.2, 0.5, 30)
    best, behind = race([evaluation("a", one), evaluation("b", other)], alpha=0.01)
    reference = stats.ttest_rel(other, one)
    bounds = reference.confidence_interval(0.99)
    assert best.gap is None and behind.gap is not None
    assert behind.gap.value == pytest.approx(other.mean() - one.mean())
    assert (behind.gap.low, behind.gap.high) == pytest.approx((bounds.low, bounds.high))
    assert behind.gap.p == pytest.approx(reference.pvalue) == behind.adjusted_p


def test_a_gap_of_tokens_is_a_ratio() -> None:
    # nats and tokens of three records: gap (2 + 0 + 1) / 6; residuals 2 - 0.5 * 1, 0 - 0.5 * 2, 1 - 0.5 * 3
    gaps, errors = gap_of(numpy.array([[2.0, 0.0, 1.0]]), numpy.array([1.0, 2.0, 3.0]))
    assert gaps[0] == pytest.approx(0.5)
    assert errors[0] == pytest.approx(sqrt(3 / 2 * (1.5**2 + 1 + 0.5**2)) / 6)


def test_the_interval_of_a_ratio_covers_as_often_as_it_says() -> None:
    random = numpy.random.default_rng(5)
    sweeps, records, true = 2000, 100, 0.1
    covered = 0
    for _ in range(sweeps):
        tokens = random.integers(1, 60, records).astype(float)
        one = tokens * random.normal(2, 0.3, records)
        pair = [
            evaluation("a", one, weights=tokens),
            evaluation("b", one + tokens * random.normal(true, 0.2, records), weights=tokens),
        ]
        behind = race(pair)[1]
        covered += behind.gap is not None and behind.gap.low <= true <= behind.gap.high
    assert 0.935 <= covered / sweeps <= 0.965


def test_holm_adjusts_as_in_his_procedure() -> None:
    adjusted, levels = holm(numpy.array([0.04, 0.01, 0.03, 0.02]), 0.08)
    assert adjusted == pytest.approx(
        [0.06, 0.04, 0.06, 0.06]
    )  # 4 * 0.01, 3 * 0.02, 2 * 0.03, and never less than before
    assert levels == pytest.approx([0.08, 0.02, 0.04, 0.08 / 3])


def test_the_interval_of_a_job_excludes_0_where_its_adjusted_p_is_small_enough() -> None:
    random = numpy.random.default_rng(7)
    base = random.normal(2, 0.3, 40)
    jobs = [evaluation(str(n), base + random.normal(0.02 * n, 0.1, 40)) for n in range(12)]
    alpha = 0.05
    significant = [verdict.adjusted_p <= alpha for verdict in race(jobs, alpha=alpha) if verdict.gap is not None]
    excluded = [verdict.gap.low > 0 for verdict in race(jobs, alpha=alpha) if verdict.gap is not None]
    assert significant == excluded and 0 < sum(significant) < len(significant)


def test_a_job_that_catches_up_goes_on_and_one_that_does_not_is_dropped() -> None:
    random = numpy.random.default_rng(11)
    base = random.normal(2, 0.3, 60)

    def at(offset: float) -> numpy.ndarray:
        return base + offset + random.normal(0, 0.02, 60)

    before = [evaluation("quick", at(0), 10), evaluation("late", at(0.4), 10), evaluation("bad", at(0.4), 10)]
    now = [evaluation("quick", at(0), 20), evaluation("late", at(0.2), 20), evaluation("bad", at(0.39), 20)]
    verdicts = race(now, before)
    assert dropped(verdicts) == ["bad"]
    late = verdicts[1]
    assert late.adjusted_p is not None and late.adjusted_p < 1e-6  # behind it is, and beyond doubt
    # 0.2 nats in one doubling; log2(100 / 20) doublings to the end
    assert late.end is not None and late.end.value == pytest.approx(0.2 - 0.2 * numpy.log2(5), abs=0.02)


def test_without_an_earlier_rung_or_at_the_same_step_nobody_is_dropped() -> None:
    random = numpy.random.default_rng(1)
    now = [evaluation("a", random.normal(1, 0.1, 50)), evaluation("b", random.normal(9, 0.1, 50))]
    assert dropped(race(now)) == []
    verdicts = race(now, now)
    assert dropped(verdicts) == [] and verdicts[1].end is None


def test_a_line_in_the_logarithm_of_the_step_is_extrapolated_exactly() -> None:
    steps = numpy.array([10, 30, 100])
    curve = 5 - 0.7 * numpy.log(steps)
    before, now = evaluation("a", [curve[0]] * 3, 10), evaluation("a", [curve[1]] * 3, 30)
    assert extrapolated(now, before) == pytest.approx(curve[2])
    done = evaluation("a", [1.0, 2.0], 100)
    assert extrapolated(done, evaluation("a", [3.0, 3.0], 30)) == pytest.approx([1.0, 2.0])


def test_a_finished_job_is_compared_with_and_never_dropped() -> None:
    random = numpy.random.default_rng(2)
    before = [evaluation("a", random.normal(1, 0.1, 50), 10), evaluation("b", random.normal(5, 0.1, 50), 10)]
    now = [evaluation("a", random.normal(1, 0.1, 50), 20), evaluation("b", random.normal(5, 0.1, 50), 20, 20)]
    assert dropped(race(now, before)) == []
    assert dropped(race(now, before, HALVING, factor=2)) == []


def test_as_many_jobs_as_are_to_be_kept_go_on_the_best_ones() -> None:
    random = numpy.random.default_rng(4)
    offsets = (0, 3, 1, 2, 4)
    before = [evaluation(str(n), random.normal(2 + n, 0.1, 50), 10) for n in offsets]
    now = [evaluation(str(n), random.normal(2 + n, 0.1, 50), 20) for n in offsets]
    assert dropped(race(now, before)) == ["3", "1", "2", "4"]
    assert dropped(race(now, before, keep=3)) == ["3", "4"]
    assert dropped(race(now, before, keep=9)) == []


def test_halving_goes_by_rank() -> None:
    now = [evaluation(str(n), [n, n + 0.5], 10) for n in (4, 1, 6, 0, 5, 2, 3)]
    assert dropped(race(now, name=HALVING)) == ["4", "6", "5", "3"]  # ceil(7 / 3) go on
    assert dropped(race(now, name=HALVING, keep=5)) == ["6", "5"]
    equal = [evaluation(name, [1.0, 2.0], 10) for name in "abc"]
    assert dropped(race(equal, name=HALVING)) == ["b", "c"]  # the first of equal ones is the better


def test_equal_jobs_are_never_apart() -> None:
    totals = numpy.array([1.0, 2.0, 4.0])
    before = [evaluation("a", totals, 10), evaluation("b", totals, 10)]
    verdicts = race([evaluation("a", totals), evaluation("b", totals)], before)
    assert dropped(verdicts) == [] and verdicts[1].adjusted_p == 1.0
    constant = race([evaluation("a", totals), evaluation("b", totals + 1)], before)
    assert constant[1].gap is not None and constant[1].gap.p == 0.0  # the same difference on every record


def test_the_error_rate_is_spent_over_the_rungs_that_decide() -> None:
    assert Rule.of_race(PAIRED, 0.06, 1, 3, 4).alpha_of_rung == pytest.approx(0.02)
    assert Rule.of_race(HALVING, 0.06, 1, 3, 4).num_deciding == 4
