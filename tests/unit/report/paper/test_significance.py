"""p-values and their correction, against scipy, enumeration, and numbers worked out by hand."""

import itertools
import random

import pytest
from scipy import stats

from glmtuner.report.paper.significance import EXCHANGES, averaged, holm, paired_p_value

ONE = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3, 5.8]
OTHER = [2.0, 1.5, 2.0, 1.0, 6.0, 2.5, 3.0, 5.0]


def mean_records(values):
    return [(value, 1.0) for value in values]


def enumerated(one, other):
    """The share of exchanges at least as extreme as none, each computed from the records themselves."""

    def difference(pairs):
        first, second = zip(*pairs, strict=True)
        (a, b), (c, d) = (map(sum, zip(*side, strict=True)) for side in (first, second))
        return abs(a / b - c / d)

    pairs = list(zip(one, other, strict=True))
    measured = difference(pairs)
    every = [
        difference([(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, swaps, strict=True)])
        for swaps in itertools.product([0, 1], repeat=len(pairs))
    ]
    return sum(each >= measured * (1 - 1e-9) for each in every) / len(every)


def test_of_a_mean_it_is_the_sign_flip_test_of_scipy():
    expected = stats.permutation_test(
        (ONE, OTHER), lambda x, y: x.mean() - y.mean() if x.ndim == 1 else x, permutation_type="samples", n_resamples=float("inf")
    )  # fmt: skip
    assert paired_p_value(mean_records(ONE), mean_records(OTHER)) == pytest.approx(expected.pvalue)


def test_three_records_by_hand():
    # the differences 1, 2, 3: of the 8 sums of ±1 ±2 ±3, only +6 and -6 are as large as 6
    assert paired_p_value(mean_records([2, 4, 6]), mean_records([1, 2, 3])) == 2 / 8
    # 1, 2, -3: all sums are at least 0 in size
    assert paired_p_value(mean_records([2, 4, 0]), mean_records([1, 2, 3])) == 1.0


def test_of_a_loss_per_token_records_keep_their_weights():
    one = [(30.0, 10.0), (4.0, 4.0), (50.0, 20.0), (9.0, 3.0)]
    other = [(20.0, 10.0), (8.0, 5.0), (30.0, 20.0), (8.0, 4.0)]
    assert paired_p_value(one, other) == pytest.approx(enumerated(one, other))


def test_a_sample_of_exchanges_is_near_all_of_them_and_repeats():
    draw = random.Random(5)
    one = mean_records([draw.gauss(0.35, 1) for _ in range(14)])
    other = mean_records([draw.gauss(0.0, 1) for _ in range(14)])
    expected, found = enumerated(one, other), paired_p_value(one, other)
    assert 0.01 < expected < 0.99
    assert abs(found - expected) < 4 * (expected * (1 - expected) / EXCHANGES) ** 0.5
    assert paired_p_value(one, other) == found == paired_p_value(other, one)


def test_it_is_never_zero_and_equal_settings_do_not_differ():
    better, worse = mean_records([1.0] * 40), mean_records([0.0] * 40)
    assert paired_p_value(better, worse) == 1 / (EXCHANGES + 1)
    assert paired_p_value(better, better) == 1.0 == paired_p_value(better[:5], better[:5])


def test_without_two_finite_records_there_is_none():
    assert paired_p_value([], []) is None and paired_p_value([(1.0, 1.0)], [(2.0, 1.0)]) is None
    assert paired_p_value(mean_records([1.0, float("nan")]), mean_records([1.0, 2.0])) is None
    assert paired_p_value([(1.0, 0.0), (1.0, 0.0)], [(1.0, 1.0), (1.0, 1.0)]) is None
    with pytest.raises(ValueError):
        paired_p_value(mean_records([1.0, 2.0]), mean_records([1.0]))


def test_it_holds_its_level_where_nothing_differs():
    draw = random.Random(0)
    p_values = [
        paired_p_value(*(mean_records([draw.random() for _ in range(8)]) for _ in range(2))) for _ in range(300)
    ]
    assert 0.02 < sum(value <= 0.05 for value in p_values) / 300 < 0.09


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 * .005, 3 * .01, 2 * .03, then not less than that
        ([0.02], [0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


def test_holm_rejects_as_its_definition_does():
    draw = random.Random(1)
    for _ in range(200):
        p_values = [draw.random() ** 3 for _ in range(draw.randint(1, 8))]
        rejected: set[int] = set()
        for place in sorted(range(len(p_values)), key=p_values.__getitem__):
            if p_values[place] > 0.05 / (len(p_values) - len(rejected)):
                break
            rejected.add(place)
        assert {place for place, value in enumerate(holm(p_values)) if value <= 0.05} == rejected


def test_settings_with_more_seeds_weigh_the_same():
    assert averaged({"a": (6.0, 3.0), "b": (3.0, 3.0)}, 3) == {"a": (2.0, 1.0), "b": (1.0, 1.0)}
