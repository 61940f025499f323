"""Intervals: against all resamples of a small case, and how often they contain the true value."""

from itertools import product

import numpy
import pytest

from glmtuner.report.bootstrap import RESAMPLES, interval

SMALL = [(2.0, 1.0), (9.0, 4.0), (1.0, 3.0), (30.0, 5.0), (7.0, 2.0)]
OTHER = [(3.0, 1.0), (9.5, 4.0), (2.0, 3.0), (28.0, 5.0), (6.0, 2.0)]


def ratio(samples):
    return sum(total for total, _ in samples) / sum(weight for _, weight in samples)


def means(values):
    return [(float(value), 1.0) for value in values]


def share_of_resamples_below(bound, scores):
    return numpy.mean(numpy.array(scores) <= bound)


def test_the_bounds_are_quantiles_of_all_resamples_of_a_small_case():
    resampled = [ratio([SMALL[place] for place in places]) for places in product(range(5), repeat=5)]
    found = interval(SMALL)
    assert found.value == pytest.approx(ratio(SMALL)) and found.num_records == 5
    # 2,000 resamples estimate a share of 0.025 with a standard error of 0.0035
    assert share_of_resamples_below(found.low, resampled) == pytest.approx(0.025, abs=0.014)
    assert share_of_resamples_below(found.high, resampled) == pytest.approx(0.975, abs=0.014)


def test_a_difference_is_of_the_same_resamples():
    resampled = [
        ratio([SMALL[place] for place in places]) - ratio([OTHER[place] for place in places])
        for places in product(range(5), repeat=5)
    ]
    found = interval(SMALL, OTHER)
    assert found.value == pytest.approx(ratio(SMALL) - ratio(OTHER))
    assert share_of_resamples_below(found.low, resampled) == pytest.approx(0.025, abs=0.014)
    assert share_of_resamples_below(found.high, resampled) == pytest.approx(0.975, abs=0.014)


def test_a_gain_on_every_sample_is_certain_however_much_the_samples_differ():
    values = numpy.random.default_rng(1).normal(50, 30, 40)
    found = interval(means(values + 0.5), means(values))
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5)) and not found.contains_zero
    assert interval(means(values)).high - interval(means(values)).low > 10


def test_an_interval_contains_the_true_value_as_often_as_it_says():
    random = numpy.random.default_rng(2)
    held = [found.low <= 10 <= found.high for found in (interval(means(random.normal(10, 4, 80))) for _ in range(400))]
    assert 0.91 <= numpy.mean(held) <= 0.98


def test_two_equal_runs_are_rarely_told_apart_and_a_better_one_mostly():
    random = numpy.random.default_rng(3)
    equal, better = [], []
    for _ in range(300):
        hardness = random.normal(30, 20, 80)
        one, other = hardness + random.normal(0, 5, 80), hardness + random.normal(0, 5, 80)
        equal.append(interval(means(one), means(other)).contains_zero)
        better.append(interval(means(one + 4), means(other)).contains_zero)
    assert 0.90 <= numpy.mean(equal) <= 0.98
    assert numpy.mean(better) < 0.05


def test_a_loss_per_token_weighs_samples_by_their_tokens():
    found = interval([(10.0, 10.0), (300.0, 100.0)] * 20)
    assert found.value == pytest.approx(310 / 110) and found.low < 310 / 110 < found.high


def test_the_same_samples_give_the_same_bounds():
    assert interval(SMALL) == interval(list(SMALL)) and RESAMPLES == 2000


@pytest.mark.parametrize(
    "samples", [[], [(1.0, 1.0)], [(1.0, 1.0), (float("nan"), 1.0)], [(1.0, 0.0), (2.0, 0.0)]], ids=str
)
def test_what_has_no_score_has_no_interval(samples):
    assert interval(samples) is None


def test_samples_without_tokens_do_not_spoil_the_others():
    found = interval([(0.0, 0.0), (4.0, 2.0), (6.0, 2.0)])
    assert found.value == pytest.approx(2.5) and 2 <= found.low <= found.high <= 3
