"""Costs from what a probe measured, by hand."""

import json

import pytest

from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.launch.forecast.cost import (
    Counts,
    Line,
    Probe,
    Rows,
    Seconds,
    Size,
    cost_of,
    counts_of,
    fit,
    probe_of,
    to_json,
)

NOTHING = {"evaluates": False, "predicts": False, "generates": False}


def arguments(**values: object) -> TrainerArguments:
    made = TrainerArguments(do_train=True)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_the_parts_of_a_duration_are_found_in_exact_ones():
    sizes = [Size(10, 100), Size(20, 150), Size(30, 900), Size(40, 400)]
    line = fit([(it, Seconds(2 + 0.5 * it.tokens + 0.01 * it.squares, 1 + 0.25 * it.tokens)) for it in sizes])
    assert line.base == Seconds(pytest.approx(2), pytest.approx(1))
    assert line.per_token == Seconds(pytest.approx(0.5), pytest.approx(0.25))
    assert line.per_square == Seconds(pytest.approx(0.01), pytest.approx(0, abs=1e-9))
    assert line.of(2, Size(50, 500)).wall == pytest.approx(2 * 2 + 25 + 5)


def test_no_part_is_negative():
    """Longer batches that were faster give the mean; a base that would be below 0 gives a line through the origin."""
    assert fit([(Size(1), Seconds(3, 3)), (Size(2), Seconds(1, 1))]).base == Seconds(pytest.approx(2), pytest.approx(2))
    steep = fit([(Size(1), Seconds(1, 1)), (Size(2), Seconds(4, 4))])
    assert steep.base == Seconds() and steep.per_token.wall == pytest.approx((1 * 1 + 2 * 4) / 5)
    same = fit([(Size(7), Seconds(2, 1)), (Size(7), Seconds(4, 3))])  # batches of one size tell a time a token
    assert same.of(1, Size(7)) == Seconds(pytest.approx(3), pytest.approx(2))
    assert same.of(1, Size(3.5)).wall == pytest.approx(1.5)
    assert fit([]) == Line() and fit([(Size(), Seconds(4, 2))]).base == Seconds(4, 2)


@pytest.mark.parametrize(
    ("values", "batches", "expected"),
    [
        # 10 batches an epoch, 3 epochs
        ({"num_train_epochs": 3.0, "save_strategy": "no"}, 10, Counts(steps=30, batches=30)),
        # 10 batches in steps of 4: 3 steps an epoch, the last of 2 batches
        (
            {"num_train_epochs": 2.0, "gradient_accumulation_steps": 4, "save_strategy": "no"},
            10,
            Counts(steps=6, batches=20),
        ),
        # 7 steps of 4 batches are two epochs of 3 steps and one step more
        ({"max_steps": 7, "gradient_accumulation_steps": 4, "save_strategy": "no"}, 10, Counts(steps=7, batches=24)),
        # checkpoints at 500, 1000 and at the end
        ({"max_steps": 1100}, 10, Counts(steps=1100, batches=1100, checkpoints=3)),
        ({"max_steps": 1000}, 10, Counts(steps=1000, batches=1000, checkpoints=2)),
        ({"num_train_epochs": 2.5, "save_strategy": "epoch"}, 10, Counts(steps=25, batches=25, checkpoints=3)),
        # every tenth of 50 steps, and evaluations at 20, 40, 50 but not at the delayed 0 to 19
        (
            {"max_steps": 50, "save_steps": 0.1, "eval_strategy": "steps", "eval_steps": 10, "eval_delay": 20},
            10,
            Counts(steps=50, batches=50, checkpoints=10, evaluations=4),
        ),
        (
            {"num_train_epochs": 2.0, "save_strategy": "no", "eval_strategy": "epoch", "eval_on_start": True},
            10,
            Counts(steps=20, batches=20, evaluations=3),
        ),
    ],
)
def test_a_run_is_counted_as_the_trainer_steps(values, batches, expected):
    assert counts_of(arguments(**values), Rows(batches=batches), **NOTHING) == expected


def test_what_is_left_after_a_checkpoint():
    counts = Counts(steps=100, batches=400, checkpoints=10, evaluations=5, evaluates=True)
    assert counts.left(75) == Counts(steps=25, batches=100, checkpoints=3, evaluations=2, evaluates=True)
    assert counts.left(0) == counts and counts.left(200).steps == 0


PROBE = Probe(
    device="cpu",
    libraries=Seconds(4, 3),
    loading=Seconds(2, 1),
    around_training=Seconds(1, 1),
    batch=Line(Seconds(0.1, 0.1), Seconds(0.001, 0.002), Seconds(0.00001, 0)),
    fetch=Seconds(0.01, 0.01),
    step=Seconds(0.04, 0.04),
    checkpoint=Seconds(0.5, 0.25),
    evaluation=Line(Seconds(0.2, 0.2), Seconds(0.001, 0.001)),
    around_evaluation=Seconds(0.1, 0.1),
    first_answer=Seconds(1, 1),
    answers=Seconds(2, 2),
    answer=Seconds(0.25, 0.5),
    answers_at_once=4,
    report=Seconds(0.5, 0.5),
    ending=Seconds(0.25, 0.25),
    train=Rows(
        records=40, batches=10, computed=Size(5000, 1_000_000), tokens=4000, squares=900_000, largest=800, per_batch=4
    ),
    evaluated=Rows(records=8, batches=2, computed=Size(600, 50_000), tokens=500, squares=40_000),
    flops_per_token=1000,
    flops_per_square=10,
)


def test_the_parts_of_a_job_by_hand():
    counts = Counts(steps=10, batches=20, checkpoints=3, evaluations=2, evaluates=True, predicts=True, generates=True)
    cost = cost_of(PROBE, counts)
    assert cost.steps == 10 and cost.tokens == 8000  # 20 batches are 2 epochs of 4,000 tokens
    assert cost.flops == 8000 * 1000 + 2 * 900_000 * 10
    parts = {name: seconds.wall for name, seconds in cost.parts.items()}
    assert parts == pytest.approx(
        {
            "start-up": 4 + 2,
            "training": 20 * 0.1 + 10_000 * 0.001 + 2_000_000 * 0.00001 + 20 * 0.01 + 10 * 0.04 + 1,
            "evaluation": 3 * (0.1 + 2 * 0.2 + 600 * 0.001),
            "generation": 1
            + 3 * (2 * 2 + 8 * 0.25),  # 8 answers in 2 rounds of 4: twice in the training, once after it
            "checkpoints": 3 * 0.5,
            "report": 0.5,
            "ending": 0.25,
        }
    )
    assert cost.seconds.wall == pytest.approx(sum(parts.values()))
    assert cost.parts["training"].cpu == pytest.approx(20 * 0.1 + 10_000 * 0.002 + 20 * 0.01 + 10 * 0.04 + 1)


def test_two_processes_have_half_of_the_rows_each():
    """The same rows in half as many batches a process; the tokens are those of both."""
    whole = cost_of(PROBE, Counts(steps=10, batches=10))
    half = cost_of(PROBE, Counts(steps=5, batches=5), world=2)
    assert (half.tokens, half.flops) == (whole.tokens, whole.flops)
    once = PROBE.around_training.wall
    assert half.parts["training"].wall - once == pytest.approx((whole.parts["training"].wall - once) / 2)


def test_a_probe_is_read_back_and_a_damaged_one_is_not():
    saved = json.loads(json.dumps(to_json(PROBE)))
    assert probe_of(saved) == PROBE
    for damaged in ({**saved, "other": 1}, {**saved, "batch": 3}, {**saved, "train": {"rows": 1}}, {}):
        with pytest.raises((KeyError, TypeError)):
            probe_of(damaged)
