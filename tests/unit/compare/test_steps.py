"""Histories step by step: where they part, by how much, and what rounding is."""

import math

import pytest

from glmtuner.compare.steps import ROUNDING, ROUNDING_HALF, compare_steps, is_cost, relative_difference, rounding_of

LINES = [
    {"step": 1, "epoch": 0.1, "loss": 4.0, "grad_norm": 2.0},
    {"step": 2, "epoch": 0.2, "loss": 3.0, "grad_norm": 1.0},
    {
        "step": 2,
        "epoch": 0.2,
        "eval_loss": 5.0,
        "eval_rouge-l": 10.0,
        "eval_runtime": 1.5,
        "eval_samples_per_second": 9.0,
    },
    {"step": 3, "epoch": 0.3, "loss": 2.0, "grad_norm": 1.0},
]


def changed(step, **values):
    return [
        {**line, **{key: value for key, value in values.items() if key in line and line["step"] == step}}
        for line in LINES
    ]


def test_equal_histories_are_equal_whatever_they_took():
    other = changed(2, eval_runtime=99.0, eval_samples_per_second=0.1)
    steps = compare_steps(LINES, other)
    assert steps.are_equal and steps.common == [1, 2, 3] and steps.first is None and steps.largest is None


def test_the_first_and_the_largest_difference_and_where_rounding_ends():
    other = [dict(line) for line in LINES]
    other[1]["loss"] = 3.0 * (1 + 1e-6)
    other[3]["loss"] = 2.5
    steps = compare_steps(LINES, other)
    assert (steps.first.step, steps.first.name) == (2, "loss") and steps.first.relative == pytest.approx(1e-6, rel=1e-3)
    assert (steps.largest.step, steps.largest.relative) == (3, 0.2)
    assert steps.first_beyond(ROUNDING).step == 3 and steps.first_beyond(0.3) is None


def test_a_score_of_answers_is_a_difference_and_no_sign_of_more_than_rounding():
    steps = compare_steps(LINES, changed(2, **{"eval_rouge-l": 90.0}))
    assert not steps.are_equal and steps.first.name == "eval_rouge-l"
    assert steps.first_beyond(ROUNDING) is None and steps.largest is None


def test_steps_and_values_that_only_one_logged():
    steps = compare_steps(LINES[:-1], LINES)
    assert steps.only == ([], [3]) and not steps.are_equal
    without = [{key: value for key, value in line.items() if key != "grad_norm"} for line in LINES]
    assert compare_steps(LINES, without).missing == [(1, "grad_norm"), (2, "grad_norm"), (3, "grad_norm")]


def test_nan_equals_nan_and_nothing_else():
    nan = changed(3, loss=None)  # JSON has no NaN: null
    assert compare_steps(nan, nan).are_equal
    parting = compare_steps(LINES, nan).first
    assert parting.step == 3 and math.isnan(parting.after) and parting.relative == math.inf


@pytest.mark.parametrize(
    ("values", "rounding"),
    [({}, ROUNDING), ({"trainer.bf16": True}, ROUNDING_HALF), ({"model.dtype": "float16"}, ROUNDING_HALF),
     ({"quant.quantization_bit": 4}, ROUNDING_HALF)],
)  # fmt: skip
def test_rounding_depends_on_the_precision(values, rounding):
    assert rounding_of(values) == rounding


def test_what_a_run_took_is_a_cost_and_what_it_learned_is_not():
    assert all(
        map(
            is_cost,
            ("train_runtime", "eval_samples_per_second", "train_tokens_per_second", "peak_memory_gib", "train_mfu"),
        )
    )
    assert not any(map(is_cost, ("train_loss", "eval_loss", "total_parameters", "predict_rouge-l")))


def test_a_value_near_zero_is_measured_against_a_hundredth_and_a_learning_rate_is_not():
    assert relative_difference(1e-9, -1e-9) == pytest.approx(2e-7) and relative_difference(2.0, 1.0) == 0.5
    rates = [[{"step": 1, "epoch": 0.1, "learning_rate": rate}] for rate in (1e-7, 2e-7)]
    assert compare_steps(*rates).first_beyond(ROUNDING).relative == 0.5
    assert compare_steps([{"step": 1, "reward": 1e-9}], [{"step": 1, "reward": 2e-9}]).first_beyond(ROUNDING) is None
