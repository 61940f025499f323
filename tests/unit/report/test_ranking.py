"""The ranking: the winner, differences to it, and when there are none."""

import json

import pytest

from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh
from glmtuner.report.ranking import format_score, rank_sweep
from glmtuner.report.record_scores import record_scores

ASKED = [(f"第{number}题", f"第{number}题的答案是{number * 7}，很简单。") for number in range(30)]
RIGHT = [(prompt, label, label) for prompt, label in ASKED]
HALF = [(prompt, label, label if place % 2 else "不知道") for place, (prompt, label) in enumerate(ASKED)]
WRONG = [(prompt, label, "不知道") for prompt, label in ASKED]


def rate_of(row):
    return str(row.settings["trainer.learning_rate"])


def rated(job, name, rate, **more):
    values = {"trainer.learning_rate": rate, "objective": more.pop("objective", None), **more.pop("values", {})}
    return job(name, values, [f"trainer.learning_rate={rate}"], **more)


def test_a_higher_score_and_a_lower_loss_is_better(sweep, job):
    for rate, loss, rouge in ((0.1, 3.0, 30.0), (0.2, 1.0, 10.0), (0.3, 2.0, 20.0)):
        rated(job, f"r{rate}", rate, metrics={"eval_loss": loss, "predict_rouge-l": rouge, "train_loss": 1.0})
    ranking = rank_sweep(sweep)
    assert ranking.objective == "predict_rouge-l" and [rate_of(row) for row in ranking.rows] == ["0.1", "0.3", "0.2"]
    for path in sweep.glob("*/config.yaml"):
        path.write_text(path.read_text().replace("objective: null", "objective: eval_loss"))
    ranking = rank_sweep(sweep)
    assert ranking.objective == "eval_loss" and [rate_of(row) for row in ranking.rows] == ["0.2", "0.3", "0.1"]
    assert (
        ranking.direction == "lower is better" and rate_of(ranking.winner) == "0.2" and ranking.best_job.name == "r0.2"
    )


def test_an_objective_that_was_not_measured_is_replaced_with_a_note(sweep, job):
    rated(job, "a", 0.1, metrics={"train_loss": 2.0}, objective="rouge-l")
    rated(job, "b", 0.2, metrics={"train_loss": 1.0}, objective="rouge-l")
    ranking = rank_sweep(sweep)
    assert ranking.objective == "train_loss" and rate_of(ranking.winner) == "0.2"
    assert "objective rouge-l" in ranking.notes[0] and "train_loss" in ranking.notes[0]


def test_what_the_objective_of_a_stage_measured_has_intervals(sweep, job):
    for rate, right in ((0.1, [1, 1, 1, 0] * 5), (0.2, [1, 0, 0, 0] * 5)):
        loss = [1.0 - 0.5 * value for value in right]
        metrics = {"eval_accuracy": sum(right) / 20, "eval_loss": sum(loss) / 20}
        folder = rated(job, f"r{rate}", rate, metrics=metrics, objective="accuracy")
        rows = [{"index": place, "loss": loss[place], "accuracy": float(right[place])} for place in range(20)]
        (folder / "losses.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, second = rank_sweep(sweep).rows
    assert first.intervals["eval_accuracy"].value == 0.75 and first.intervals["eval_loss"].num_records == 20
    assert second.difference.value == pytest.approx(-0.5) and not second.difference.contains_zero


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_are_ranked_last_and_never_win(sweep, job, value):
    rated(job, "a", 0.1, metrics={"eval_loss": value})
    assert rank_sweep(sweep).winner is None and rank_sweep(sweep).best_job is None
    rated(job, "b", 0.2, metrics={"eval_loss": 9.0})
    rated(job, "c", 0.3, metrics={})
    ranking = rank_sweep(sweep)
    assert rate_of(ranking.winner) == "0.2" and len(ranking.rows) == 3


def test_a_sweep_that_measured_nothing_has_no_winner(sweep, job, failed):
    assert rank_sweep(sweep).rows == [] and rank_sweep(sweep).summary == "no job yet"
    rated(job, "a", 0.1)
    failed("b", ["trainer.learning_rate=0.2"], kind="infeasible")
    ranking = rank_sweep(sweep)
    assert ranking.winner is None and ranking.export_command is None
    assert ranking.summary == "1 unfinished, 1 did not fit into memory"


def test_differences_are_paired_and_ties_are_marked(sweep, job):
    rated(job, "right", 0.1, answers=RIGHT)
    rated(job, "half", 0.2, answers=HALF)
    rated(job, "nearly", 0.3, answers=[*RIGHT[:-1], WRONG[-1]])
    ranking = rank_sweep(sweep)
    assert [rate_of(row) for row in ranking.rows] == ["0.1", "0.3", "0.2"]
    winner, nearly, half = ranking.rows
    assert winner.difference is None and winner.intervals["predict_rouge-l"].num_records == 30
    assert nearly.tied and nearly.difference.num_records == 30
    assert not half.tied and half.difference.high < -20
    assert half.difference.value == pytest.approx(half.metrics["predict_rouge-l"] - winner.metrics["predict_rouge-l"])
    for row in ranking.rows:
        for name, bounds in row.intervals.items():
            assert bounds.value == pytest.approx(row.metrics[name]) and bounds.low <= bounds.value <= bounds.high


def test_a_loss_is_per_token(sweep, job):
    losses = [(float(tokens * 2), tokens) for tokens in range(1, 31)]
    rated(job, "a", 0.1, losses=losses)
    rated(job, "b", 0.2, losses=[(loss + 5.0, tokens) for loss, tokens in losses])
    ranking = rank_sweep(sweep)
    assert ranking.objective == "eval_loss" and ranking.rows[0].metrics["eval_loss"] == 2.0
    assert ranking.rows[0].intervals["eval_loss"].low == pytest.approx(2.0)
    assert ranking.rows[1].difference.value == pytest.approx(30 * 5 / sum(range(1, 31)))
    assert not ranking.rows[1].tied


@pytest.mark.parametrize(
    "values",
    [{"data.dataset": ["other"]}, {"data.dev_ratio": 0.2}, {"data.max_samples": 5}, {"data.eval_dataset": ["held"]}],
    ids=lambda values: next(iter(values)),
)
def test_losses_of_other_records_are_not_compared(sweep, job, values):
    losses = [(float(tokens), tokens) for tokens in range(1, 11)]
    job("a", {"trainer.learning_rate": 0.1}, losses=losses)
    job("b", {"trainer.learning_rate": 0.2, **values}, losses=[(loss + 1, tokens) for loss, tokens in losses])
    ranking = rank_sweep(sweep)
    assert ranking.rows[1].difference is None and "eval_loss" in ranking.rows[1].intervals
    assert "1 of the 2 settings" in ranking.notes[0] and "data.eval_dataset" in ranking.notes[0]


def test_the_training_data_does_not_matter_where_the_evaluation_data_is_named(sweep, job):
    losses = [(float(tokens), tokens) for tokens in range(1, 11)]
    held = {"data.eval_dataset": ["held"], "data.dev_ratio": 0.0}
    job("a", {"data.dataset": ["one"], "trainer.seed": 1, **held}, losses=losses)
    job("b", {"data.dataset": ["two"], "trainer.seed": 2, **held}, losses=[(loss * 2, n) for loss, n in losses])
    assert rank_sweep(sweep).rows[1].difference is not None


def test_answers_to_other_questions_are_not_compared(sweep, job):
    rated(job, "a", 0.1, answers=RIGHT)
    rated(job, "b", 0.2, answers=[(f"{prompt}？", label, said) for prompt, label, said in HALF])
    rated(job, "c", 0.3, answers=WRONG[:20])
    ranking = rank_sweep(sweep)
    by_label = {rate_of(row): row for row in ranking.rows}
    assert by_label["0.2"].difference is None
    assert by_label["0.3"].difference.num_records == 20  # a part of the winner's questions


def test_answers_are_scored_again_against_their_references(sweep, job):
    """Not against the labels, which a tokenizer may write otherwise; runs with other references are compared, with a note."""
    for rate, reference in ((0.1, "{},answer"), (0.2, "{}，answer")):
        folder = rated(job, f"r{rate}", rate, answers=[(prompt, f"{prompt}，answer", "") for prompt, _ in ASKED])
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        lines = [
            {**line, "reference": reference.format(line["prompt"]), "predict": f"{line['prompt']},answer"}
            for line in lines
        ]
        (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        scores = RougeBleuZh().scores([line["predict"] for line in lines], [line["reference"] for line in lines])
        (folder / "metrics.json").write_text(json.dumps({f"predict_{name}": value for name, value in scores.items()}))
    ranking = rank_sweep(sweep)
    winner, other = ranking.rows
    assert winner.intervals["predict_bleu-4"].value == pytest.approx(100) and rate_of(winner) == "0.1"
    assert (
        other.intervals["predict_bleu-4"].value == pytest.approx(other.metrics["predict_bleu-4"]) != pytest.approx(100)
    )
    assert other.difference.num_records == 30
    (note,) = ranking.notes
    assert note.startswith("1 of the 2 settings were scored against other texts of the same labels than the winner")


def test_seeds_are_grouped_and_stay_listed(sweep, job):
    for rate in (0.1, 0.2):
        for seed, loss in ((1, 1.0), (2, 2.0), (10, 6.0)):
            values = {"trainer.learning_rate": rate, "trainer.seed": seed}
            job(f"{rate}_{seed}", values, metrics={"eval_loss": loss + rate, "train_loss": 1.0})
    ranking = rank_sweep(sweep)
    assert [rate_of(row) for row in ranking.rows] == ["0.1", "0.2"]
    best = ranking.winner
    assert best.metrics["eval_loss"] == pytest.approx(3.1) and best.std_devs["eval_loss"] == pytest.approx(7**0.5)
    assert [each.jobs[0].seed for each in best.seeds] == ["1", "2", "10"] and ranking.best_job.name == "0.1_1"
    assert ranking.summary == "6 finished" and "± is the standard deviation" in ranking.notes[0]


def test_seeds_that_hold_out_other_records_are_compared_seed_by_seed(sweep, job):
    for rate, answers in ((0.1, RIGHT), (0.2, HALF)):
        for seed, part in ((1, slice(0, 12)), (2, slice(8, 20))):
            job(f"{rate}_{seed}", {"trainer.learning_rate": rate, "trainer.seed": seed}, answers=answers[part])
    winner, half = rank_sweep(sweep).rows
    assert winner.intervals["predict_rouge-l"].num_records == 20
    assert half.difference.num_records == 20
    assert half.difference.value == pytest.approx(half.metrics["predict_rouge-l"] - winner.metrics["predict_rouge-l"])
    assert [each.difference.num_records for each in half.seeds] == [12, 12]
    assert all(each.difference is None for each in winner.seeds)


def test_record_scores_that_contradict_metrics_json_give_no_interval(sweep, job):
    rated(job, "a", 0.1, answers=RIGHT, metrics={"predict_rouge-l": 55.0})
    ranking = rank_sweep(sweep)
    assert "predict_rouge-l" not in ranking.winner.intervals and "predict_rouge-1" in ranking.winner.intervals
    assert any("metrics.json says 55.00" in note for note in ranking.notes)


def test_truncated_record_scores_are_skipped(sweep, job):
    folder = rated(job, "a", 0.1, answers=RIGHT, losses=[(1.0, 2), (2.0, 2)])
    for name in ("predictions.jsonl", "losses.jsonl"):
        with (folder / name).open("a") as file:
            file.write(
                '{"index": "x", "loss": null}\n{"index": [1], "loss": 1.0, "tokens": 2}\n[1]\n{"index": 99, "prom'
            )
    (row,) = rank_sweep(sweep).rows
    assert row.intervals["predict_rouge-l"].num_records == 30 and row.intervals["eval_loss"].num_records == 2


@pytest.mark.parametrize(
    "values", [{"metric.name": "from_elsewhere"}, {"metric.name": None}, {"metric.weight": 2}], ids=str
)
def test_a_metric_that_is_not_known_here_gives_no_interval(sweep, job, values):
    rated(job, "a", 0.1, answers=RIGHT, values=values)
    assert not rank_sweep(sweep).winner.intervals


def test_record_scores_are_what_the_metric_averages(sweep, job):
    from glmtuner.run_folder.folder import RunFolder
    from glmtuner.run_folder.redaction import flatten

    folder = rated(job, "a", 0.1, answers=[*HALF, *HALF[:3]])  # three questions were asked twice
    metrics = json.loads((folder / "metrics.json").read_text())
    found = record_scores(RunFolder(folder), flatten({"metric": {"name": "rouge_bleu_zh"}}), metrics)
    assert found.keys() == metrics.keys()
    for name, samples in found.items():
        assert sum(weight for _, weight in samples.values()) == 33
        assert sum(total for total, _ in samples.values()) / 33 == pytest.approx(metrics[name])


def test_the_export_command_names_what_was_trained(sweep, job):
    folder = rated(job, "it's", 0.1, metrics={"eval_loss": 1.0})
    assert rank_sweep(sweep).export_command is None
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    command = rank_sweep(sweep).export_command
    assert command.startswith("python -m glmtuner export '") and command.endswith(f"--to {sweep.name}_best")


@pytest.mark.parametrize("text", ["{", "[]", '{"typed": 7}'])
def test_a_damaged_sweep_json_costs_only_the_commands(sweep, job, text):
    (sweep / "sweep.json").write_text(text)
    rated(job, "a", 0.1, metrics={"eval_loss": 1.0})
    assert rank_sweep(sweep).commands == [] and rank_sweep(sweep).winner.label == "a"


def test_numbers_are_shown_with_decimals_that_fit():
    assert format_score("eval_loss", 1.23456) == "1.2346" and format_score("predict_rouge-l", 28.864) == "28.86"
    assert (
        format_score("predict_accuracy", 0.51239) == "0.5124"
        and format_score("predict_rouge-l", 0.5, like=28.0) == "0.50"
    )
