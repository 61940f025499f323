"""The routes that read: sweeps against the report, predictions against the metric, comparisons, reports, pictures and logs."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from board_folders import write_sweep
from fastapi.testclient import TestClient

from glmtuner.board.app import application
from glmtuner.board.root import Root
from glmtuner.board.views import Views
from glmtuner.compare.diff import diff_runs
from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh
from glmtuner.report.ranking import rank_sweep

HISTORY = [{"step": step, "epoch": step / 40, "loss": 4 - step / 20} for step in range(1, 41)]
TIMINGS = [
    {"step": step, "time": 1e9 + step, "seconds": step * 2.0, "tokens": step * 100, "memory_gib": 1.0}
    for step in range(1, 41)
]
ANSWERS = [
    {"index": 0, "prompt": "你好", "label": "你好，我是助手", "predict": "你好，我是助手"},
    {"index": 1, "prompt": "天气", "label": "今天天气很好", "predict": "不知道"},
    {"index": 2, "prompt": "<b>markup</b>", "label": "今天", "predict": "今天天气"},
]


@pytest.fixture
def client(outputs: Path) -> Iterator[TestClient]:
    views = Views(Root(outputs), read_only=False)
    try:
        yield TestClient(application([views.router], None, None, lambda scope: None), raise_server_exceptions=False)
    finally:
        views.close()


def get(client: TestClient, name: str, **parameters: Any) -> Any:
    answer = client.get(f"/api/{name}?{urlencode(parameters, doseq=True)}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(client: TestClient, path: str, **parameters: Any) -> str:
    answer = client.get(path, params=parameters)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def losses(shift: float) -> list[dict[str, float]]:
    return [{"index": index, "loss": shift + (index * 7 % 11) / 5, "tokens": 2} for index in range(40)]


def mean(lines: list[dict[str, float]]) -> float:
    return sum(line["loss"] for line in lines) / sum(line["tokens"] for line in lines)


@pytest.fixture
def sweep(run: Callable, outputs: Path) -> Path:
    """A sweep of two rates with two seeds each, whose evaluation losses are known by record."""
    path = write_sweep(outputs / "sweeps/a", "python -m glmtuner -m trainer.learning_rate=0.1,0.2 trainer.seed=1,2")
    for rate, shift in ((0.1, 2.0), (0.2, 2.5)):
        for seed in (1, 2):
            lines = losses(shift + seed / 100)
            changes = {"trainer.learning_rate": rate, "trainer.seed": seed}
            metrics = {"eval_loss": mean(lines), "train_runtime": 10.0, "peak_memory_gib": 1.0}
            run(f"sweeps/a/rate-{rate}_seed-{seed}", changes, history=HISTORY, losses=lines, metrics=metrics)
    return path


def ranked(client: TestClient, id: str) -> dict[str, Any]:
    """The answer once the intervals are there."""
    for _ in range(300):
        found = get(client, "sweep", id=id)
        if not found["pending"]:
            return found
        time.sleep(0.2)
    raise AssertionError("the ranking did not come")


def test_a_leaderboard_is_that_of_the_report(client: TestClient, sweep: Path) -> None:
    at_once = get(client, "sweep", id="sweeps/a")
    assert at_once["pending"] and [row["label"] for row in at_once["leaderboard"]["rows"]] == [
        "learning_rate 0.1",
        "learning_rate 0.2",
    ]
    found, ranking = ranked(client, "sweeps/a"), rank_sweep(sweep)
    assert (found["ranked_by"], found["objective"], found["winner"]) == (
        "eval_loss",
        "eval_loss",
        ranking.best_job.name,
    )
    assert [column["key"] for column in found["leaderboard"]["columns"]][:2] == ["trainer.learning_rate", "eval_loss"]
    for shown, row in zip(found["leaderboard"]["rows"], ranking.rows, strict=True):
        assert (shown["label"], shown["values"]["eval_loss"]) == (row.label, pytest.approx(row.metrics["eval_loss"]))
        interval = row.intervals["eval_loss"]
        assert shown["intervals"]["eval_loss"] == pytest.approx([interval.low, interval.high])
        assert shown["deviations"]["eval_loss"] == pytest.approx(row.std_devs["eval_loss"])
        assert [seed["seed"] for seed in shown["seeds"]] == ["1", "2"]
    second = found["leaderboard"]["rows"][1]
    assert second["differs"] is True
    assert second["difference"][0] == pytest.approx(0.25)  # by hand: half a nat more on each record of two tokens
    rows = {row["name"]: row for row in get(client, "runs")["rows"]}
    first = ranking.rows[0].seeds[0]
    assert rows[first.jobs[0].name]["intervals"]["eval_loss"] == pytest.approx(
        [first.intervals["eval_loss"].low, first.intervals["eval_loss"].high]
    )


def test_a_job_that_finishes_is_ranked_and_nothing_else_is_ranked_again(
    client: TestClient, sweep: Path, run: Callable
) -> None:
    ranked(client, "sweeps/a")
    lines = losses(1.0)
    run(
        "sweeps/a/new",
        {"trainer.learning_rate": 0.3, "trainer.seed": 1},
        losses=lines,
        metrics={"eval_loss": mean(lines)},
    )
    time.sleep(1.1)
    found = ranked(client, "sweeps/a")
    assert found["leaderboard"]["rows"][0]["label"] == "learning_rate 0.3"
    assert found["leaderboard"]["rows"][0]["intervals"]["eval_loss"]


def test_a_pareto_front_and_the_decisions_of_a_race(client: TestClient, run: Callable, outputs: Path) -> None:
    write_sweep(outputs / "s", "python -m glmtuner -m hydra/sweeper=race a=1,2")
    for name, loss, seconds in (("good", 1.0, 30.0), ("fast", 2.0, 10.0), ("bad", 3.0, 20.0)):
        changes = {"objective": ["eval_loss", "train_runtime"], "trainer.learning_rate": seconds}
        run(f"s/{name}", changes, metrics={"eval_loss": loss, "train_runtime": seconds})
    run("s/lost", {"trainer.learning_rate": 9.0}, history=HISTORY)
    (outputs / "s/race").mkdir()
    job = {"job": "lost", "state": "dropped", "value": 5.0, "place": 4, "step": 4, "max_steps": 40}
    rung = {"rung": 1, "of": 2, "pause": "0.1", "metric": "eval_loss", "records": 7, "rule": "paired", "jobs": [job]}
    (outputs / "s/race/rung-1.json").write_text(json.dumps(rung))
    found = ranked(client, "s")
    assert [point["job"] for point in found["pareto"]["best"]] == ["good", "fast"]
    assert [point["values"] for point in found["pareto"]["others"]] == [[3.0, 20.0]]
    assert found["race"][0]["title"] == "rung 1 of 2, after 0.1 of the training: eval_loss on 7 records"
    assert found["race"][0]["rows"][0][:2] == ["lost", "5.0000"]
    rows = {row["name"]: row for row in found["jobs"]}
    assert rows["lost"]["state"] == "dropped" and "rung 1 of 2 (step 4 of 40): eval_loss 5.0000" in rows["lost"]["note"]


def test_curves_have_every_point_over_steps_tokens_and_time(client: TestClient, run: Callable) -> None:
    run("one", history=HISTORY, timings=TIMINGS)
    run("old", history=HISTORY)
    assert get(client, "metrics", id="one") == ["loss", "memory_gib"]
    (series,) = get(client, "curves", id="one", metric="loss")["series"]
    assert series["x"] == [line["step"] for line in HISTORY]
    assert series["y"] == pytest.approx([line["loss"] for line in HISTORY])
    assert series["whole"] and series["points"] == 40
    for axis, factor in (("tokens", 100), ("time", 2.0)):
        found = get(client, "curves", id=["one", "old"], metric="loss", x=axis)
        assert [each["id"] for each in found["series"]] == ["one"]
        assert found["series"][0]["x"] == [line["step"] * factor for line in HISTORY]
        assert found["series"][0]["step"] == [line["step"] for line in HISTORY]
        assert found["missing"][0]["id"] == "old" and "an earlier version" in found["missing"][0]["why"]
    gone = get(client, "curves", id=["one", "../one", "gone"], metric="loss")
    assert [each["id"] for each in gone["series"]] == ["one"]
    assert [each["id"] for each in gone["missing"]] == ["../one", "gone"]
    assert get(client, "metrics", id=["gone", "old"]) == ["loss"]
    thin = get(client, "curves", id="one", metric=["loss", "nothing"], points=10)["series"]
    assert len(thin) == 1 and not thin[0]["whole"] and thin[0]["x"][0] == 1 and thin[0]["x"][-1] == 40
    assert "legal are step, tokens, time" in error(client, "/api/curves", id="one", metric="loss", x="epoch")


def test_values_of_any_key(client: TestClient, run: Callable) -> None:
    run("one", {"finetuning.lora_rank": 4})
    run("two", {"finetuning.lora_rank": 16})
    assert get(client, "values", key="finetuning.lora_rank") == {"one": 4, "two": 16}
    assert "trainer.seed" in get(client, "keys")


def test_predictions_are_scored_searched_filtered_sorted_and_compared(client: TestClient, run: Callable) -> None:
    scores = [RougeBleuZh().score(line["predict"], line["label"]) for line in ANSWERS]
    names = {f"predict_{name}": sum(each[name] for each in scores) / 3 for name in scores[0]}
    run("one", predictions=ANSWERS, metrics=names)
    run("two", predictions=[{**ANSWERS[1], "index": 0, "predict": "今天天气很好"}], metrics={"predict_rouge-l": 100.0})
    found = get(client, "predictions", id="one")
    assert (found["total"], found["scores"]) == (3, [*scores[0]])
    for line, expected, score in zip(found["lines"], ANSWERS, scores, strict=True):
        assert {name: line[name] for name in expected} == expected
        assert line["scores"] == pytest.approx(score)
    order = sorted(range(3), key=lambda index: -scores[index]["rouge-l"])
    assert [line["index"] for line in get(client, "predictions", id="one", sort="-rouge-l")["lines"]] == order
    assert [line["index"] for line in get(client, "predictions", id="one", search="MARKUP")["lines"]] == [2]
    assert [line["index"] for line in get(client, "predictions", id="one", metric="rouge-l", low=99)["lines"]] == [0]
    assert [line["index"] for line in get(client, "predictions", id="one", offset=1, limit=1)["lines"]] == [1]
    beside = get(client, "predictions", id="one", **{"with": "two"})["lines"]
    assert [line["other"] and line["other"]["predict"] for line in beside] == [None, "今天天气很好", None]
    assert "legal are rouge-1" in error(client, "/api/predictions", id="one", sort="accuracy")


def test_scored_pairs_have_their_texts_and_scores(client: TestClient, run: Callable) -> None:
    pair = {"index": 0, "prompt": "p", "chosen": "good", "rejected": "bad", "chosen_score": 1.5, "rejected_score": -0.5}
    run("one", {"stage.name": "rm"}, predictions=[pair], metrics={"eval_accuracy": 1.0})
    (line,) = get(client, "predictions", id="one")["lines"]
    assert (line["label"], line["predict"], line["texts"]) == (None, None, {"chosen": "good", "rejected": "bad"})
    assert line["scores"] == {"chosen_score": 1.5, "rejected_score": -0.5}


def test_a_comparison_is_what_diff_says(client: TestClient, run: Callable, outputs: Path) -> None:
    run("one", {"trainer.learning_rate": 0.1}, history=HISTORY, metrics={"train_loss": 1.0})
    run("two", {"trainer.learning_rate": 0.2}, history=HISTORY, metrics={"train_loss": 2.0})
    found = get(client, "compare", a="one", b="two")
    document = diff_runs([outputs / "one", outputs / "two"])
    assert (found["verdict"], found["differs"]) == (document.verdict, True)
    assert [section["rows"] for section in found["sections"]] == [
        [list(row) for row in section.rows] for section in document.sections
    ]
    write_sweep(outputs / "s", "python -m glmtuner -m")
    run("s/job", metrics={"train_loss": 1.0})
    assert "runs are compared with runs" in error(client, "/api/compare", a="one", b="s")


def test_a_run_has_its_files_and_what_differs_from_the_defaults(client: TestClient, run: Callable) -> None:
    folder = run(
        "one", {"finetuning.lora_rank": 4, "trainer.max_steps": 40}, ["model=tiny_glm", "finetuning.lora_rank=4"]
    )
    (folder / "plan.json").write_text('{"plan": [["model", "tiny_glm"]]}')
    (folder / "output.log").write_text("hello\n")
    found = get(client, "run", id="one")
    assert found["yaml"] == (folder / "config.yaml").read_text(encoding="utf-8")
    assert found["command"] == "python -m glmtuner model=tiny_glm finetuning.lora_rank=4"
    assert found["config"]["finetuning.lora_rank"] == 4
    assert (found["defaults"]["finetuning.lora_rank"], found["defaults"]["trainer.max_steps"]) == (8, -1)
    assert "model.model_name_or_path" not in found["defaults"] and "stage.name" not in found["defaults"]
    assert found["plan"] == [["model", "tiny_glm"]]
    assert {"name": "output.log", "bytes": 6} in found["files"]
    assert found["has"] == {"report": False, "predictions": False, "samples": True, "log": True, "sampled": False}


def test_a_log_is_read_on_and_no_character_is_cut(client: TestClient, run: Callable) -> None:
    folder = run("one")
    assert get(client, "log", id="one") == {"text": "", "offset": 0, "size": 0, "start": 0}
    content = "步骤 1\n".encode()
    (folder / "output.log").write_bytes(content[:4])  # 步 and the first byte of 骤
    first = get(client, "log", id="one")
    assert (first["text"], first["offset"]) == ("步", 3)
    (folder / "output.log").write_bytes(content)
    assert get(client, "log", id="one", offset=3)["text"] == "骤 1\n"
    (folder / "output.log").write_bytes(b"anew\n")
    assert get(client, "log", id="one", offset=len(content))["text"] == "anew\n"
    (folder / "output.log").write_bytes(b"\xff\xfe\x80 not utf-8\xe6\n")
    assert get(client, "log", id="one")["text"].endswith("not utf-8\ufffd\n")


def test_a_report_is_a_page_that_may_do_nothing(client: TestClient, run: Callable) -> None:
    folder = run("one")
    (folder / "report.html").write_text("<script>alert(1)</script>")
    answer = client.get("/files/report", params={"id": "one"})
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "sandbox;" in policy and "script-src" not in policy
    (folder / "pictures").mkdir()
    (folder / "pictures/loss.png").write_bytes(b"\x89PNG")
    assert get(client, "run", id="one")["pictures"] == ["pictures/loss.png"]
    picture = client.get("/files/picture", params={"id": "one", "name": "pictures/loss.png"})
    assert (picture.status_code, picture.headers["content-type"], picture.content) == (200, "image/png", b"\x89PNG")


FILES = [
    "../secret.png",
    "/etc/passwd",
    "pictures/../../secret.png",
    "link.png",
    "config.yaml",
    "..",
    "",
    ".",
    "a\0.png",
    "fifo.png",
    "x" * 5000,
]
IDS = ["..", "../outside", "/etc", "one/..", "one/../one", "one/", "", "nothing", "one\0", "\\one", "x" * 9000]
ROUTES = ["run", "log", "sweep", "predictions", "samples"]


def test_no_name_of_a_file_leads_outside(client: TestClient, run: Callable, outputs: Path) -> None:
    folder = run("one")
    (outputs / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(outputs.parent / "elsewhere.png")
    (outputs.parent / "elsewhere.png").write_bytes(b"secret")
    os.mkfifo(folder / "fifo.png")
    for name in FILES:
        assert "secret" not in error(client, "/files/picture", id="one", name=name).replace("secret.png", "")


@pytest.mark.parametrize("path", [*(f"/api/{name}" for name in ROUTES), "/files/report"])
def test_no_id_leads_outside(client: TestClient, run: Callable, outputs: Path, path: str) -> None:
    run("one")
    outside = outputs.parent / "outside"
    outside.mkdir()
    (outside / "config.yaml").write_text("model: {}\n")
    for id in IDS:
        assert error(client, path, id=id)


def test_texts_with_markup_arrive_as_they_are(client: TestClient, run: Callable) -> None:
    name = "<img src=x onerror=alert(1)>"
    run(name, {"finetuning.lora_rank": 8, "data.dataset": ["</script><b>"]}, history=HISTORY)
    (row,) = get(client, "runs")["rows"]
    assert (row["id"], row["data"]) == (name, "</script><b>")
    assert client.get("/api/runs").headers["content-type"] == "application/json"
    assert get(client, "run", id=name)["row"]["id"] == name


def test_a_hanging_pipe_in_the_place_of_a_file_hangs_nothing(client: TestClient, run: Callable) -> None:
    folder = run("one")
    for name in ("history.jsonl", "output.log", "metrics.json", "predictions.jsonl", "report.html", "plan.json"):
        os.mkfifo(folder / name)
    assert get(client, "runs")["rows"][0]["id"] == "one"
    assert get(client, "run", id="one")["plan"] == []
    assert get(client, "metrics", id="one") == []
    assert get(client, "predictions", id="one")["total"] == 0
    assert error(client, "/files/report", id="one")
