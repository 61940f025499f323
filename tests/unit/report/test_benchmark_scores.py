"""Reports of benchmarks: intervals against published values, tables, record scores, and what is in metrics.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from glmtuner.benchmarks.run import label_of, metrics_of
from glmtuner.report.benchmarks import benchmark_records, benchmarks_table, bounds_of, method_of_bounds, wilson
from glmtuner.run_folder.folder import RunFolder


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilsons_interval_is_the_published_one(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(count - hits, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_intervals_are_of_what_the_records_say() -> None:
    assert bounds_of(0.5, [1.0, 0.0])["interval"] == "Wilson"
    graded = bounds_of(0.5, [0.25, 0.75, 0.5, 0.5])
    assert graded["interval"] == "bootstrap" and 0.25 < graded["low"] < 0.5 < graded["high"] < 0.75
    assert bounds_of(0.7, [1.0, 0.0]) == {} and bounds_of(0.5, []) == {}  # no mean of the records


def task(name: str, hits: list[float], **more: Any) -> dict[str, Any]:
    value = sum(hits) / len(hits)
    about = {"name": name, "records": len(hits), "num_fewshot": 5, "main": "acc", "less_is_better": []}
    return about | {"scores": {"acc": {"value": value, **bounds_of(value, hits)}}} | more


def written(tmp_path: Path) -> RunFolder:
    """A folder with the scores of a group of two tasks."""
    answers = {"law": [1.0, 0.0, 1.0], "art": [0.0]}
    tasks = {name: task(name, hits) for name, hits in answers.items()}
    group = task("exam", [1.0, 0.0, 1.0, 0.0], tasks=["law", "art"], is_group=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/scores.json").write_text(json.dumps({"benchmarks": [group], "tasks": tasks}))
    for name, hits in answers.items():
        lines = [{"index": index, "hash": "ab", "scores": {"acc": hit}} for index, hit in enumerate(hits)]
        (tmp_path / f"benchmarks/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(tmp_path)


def test_the_table_has_each_benchmark_and_each_of_its_tasks(tmp_path: Path) -> None:
    header, rows = benchmarks_table(written(tmp_path))
    assert header[0] == "benchmark"
    assert [row[:4] for row in rows] == [
        ["exam", "", "acc", "0.5000"], ["", "law", "acc", "0.6667"], ["", "art", "acc", "0.0000"],
    ]  # fmt: skip
    assert "Wilson" in method_of_bounds(RunFolder(tmp_path)) and "bootstrap" not in method_of_bounds(
        RunFolder(tmp_path)
    )
    assert benchmarks_table(RunFolder(tmp_path / "none")) == ([], [])


def test_records_are_those_of_a_benchmarks_tasks(tmp_path: Path) -> None:
    folder = written(tmp_path)
    found = benchmark_records(folder, ["benchmark_exam", "benchmark_exam_acc", "subject_law", "eval_loss"])
    assert found.keys() == {"benchmark_exam", "benchmark_exam_acc", "subject_law"}
    assert found["benchmark_exam"] == {
        ("law", 0, "ab"): (1.0, 1.0), ("law", 1, "ab"): (0.0, 1.0), ("law", 2, "ab"): (1.0, 1.0), ("art", 0, "ab"): (0.0, 1.0),
    }  # fmt: skip
    assert len(found["subject_law"]) == 3
    with (tmp_path / "benchmarks/law.jsonl").open("a") as file:
        file.write('{"index": 3, "hash": "ab", "scores": {"acc": "no"}}\n{"index": 4}\n{"index": 5, "sc')
    assert benchmark_records(folder, ["subject_law"]) == {"subject_law": found["subject_law"]}


def test_metrics_name_the_main_score_of_each_benchmark_and_of_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"law": task("law", [1.0, 0.0]), "texts": task("texts", [3.0], main="wer", less_is_better=["wer"])}
    tasks["texts"]["scores"] = {"wer": {"value": 3.0}}
    exam = task("exam", [1.0, 0.0], tasks=["law"], is_group=True)
    alone = tasks["texts"] | {"tasks": ["texts"], "is_group": False}
    assert metrics_of([exam, alone], tasks) == {
        "benchmark_exam": 0.5, "benchmark_exam_acc": 0.5, "benchmark_texts_wer": 3.0, "subject_law": 0.5,
    }  # fmt: skip
    assert "less is better of wer" in "".join(capsys.readouterr())
    assert label_of("acc,none") == "acc" and label_of("exact_match,strict-match") == "exact_match_strict-match"
