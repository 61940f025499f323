"""The index of a folder: rows against `status` and hand-written values, what changed since, and folders that are damaged."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from board_folders import write_sweep

from glmtuner.board import index as index_module
from glmtuner.board.index import Index
from glmtuner.board.root import Root
from glmtuner.errors import CheckpointError
from glmtuner.report.ranking import rank_sweep
from glmtuner.run_folder.locks import try_lock
from glmtuner.sweep.status import lines_of, seconds_left

HISTORY = [
    {"step": 2, "epoch": 0.5, "loss": 3.5, "grad_norm": 1.0},
    {"step": 2, "epoch": 0.5, "eval_loss": 3.25},
    {"step": 4, "epoch": 1.0, "loss": 2.5, "grad_norm": 2.0},
]
PROGRESS = {"step": 10, "steps": 40, "start_step": 0, "seconds": 20.0}


def index_of(outputs: Path) -> Index:
    return Index(Root(outputs), ranks=False)


def rows_of(index: Index, since: int | None = None) -> dict[str, dict[str, Any]]:
    index.refresh(at_once=True)
    return {row["id"]: row for row in json.loads(index.changes(since))["rows"]}


def test_a_finished_run_has_the_numbers_of_its_files(run: Callable, outputs: Path) -> None:
    metrics = {"train_loss": 2.75, "peak_memory_gib": 1.5, "train_tokens_per_second": 99.0, "eval_loss": float("nan")}
    run("2026-01-01/one", {"trainer.learning_rate": 0.01}, history=HISTORY, metrics={**metrics, "eval_loss": None})
    row = rows_of(index_of(outputs))["2026-01-01/one"]
    assert {name: row[name] for name in ("state", "mark", "stage", "model", "method", "quant", "data", "sweep")} == {
        "state": "finished", "mark": None, "stage": "sft", "model": "tiny_glm", "method": "lora", "quant": "none",
        "data": "belle_sample", "sweep": None,
    }  # fmt: skip
    assert row["metrics"] == {**metrics, "eval_loss": None}
    assert (row["step"], row["loss"], row["epoch"]) == (4, 2.5, 1.0)
    assert (row["tokens_per_second"], row["memory_gib"]) == (99.0, 1.5)
    assert row["varied"] == {"trainer.learning_rate": 0.01}
    assert row["started"] == 1767225600.0  # 2026-01-01, by hand
    assert row["can"] == {"stop": False, "continue": False, "talk": True, "delete": True}


def test_a_running_one_has_its_progress_and_its_last_scores(run: Callable, outputs: Path) -> None:
    timing = [{"step": 4, "time": 1.0, "seconds": 8.0, "tokens": 100, "tokens_per_second": 12.5, "memory_gib": 2.25}]
    folder = run("one", history=HISTORY, progress=PROGRESS, timings=timing)
    with try_lock(folder / ".lock"):
        row = rows_of(index_of(outputs))["one"]
    assert (row["state"], row["step"], row["steps"], row["eta_s"]) == ("running", 10, 40, 60.0)  # 30 steps of 2 seconds
    assert (row["tokens_per_second"], row["memory_gib"], row["metrics"]) == (12.5, 2.25, {"eval_loss": 3.25})
    assert row["can"]["stop"] and not row["can"]["delete"]


@pytest.mark.parametrize(
    ("kind", "state"), [("infeasible", "out of memory"), ("diverged", "diverged"), ("error", "failed")]
)
def test_failures_by_their_kind(run: Callable, outputs: Path, kind: str, state: str) -> None:
    run("one", failed={"kind": kind, "reason": "because", "words": []})
    row = rows_of(index_of(outputs))["one"]
    assert (row["state"], row["note"], row["can"]["continue"]) == (state, "because", True)


def test_a_run_that_failed_before_its_config_is_shown(outputs: Path) -> None:
    (outputs / "one").mkdir()
    (outputs / "one/failed.json").write_text('{"kind": "error", "reason": "a typo", "words": ["trainer.max_steps=3"]}')
    row = rows_of(index_of(outputs))["one"]
    assert (row["state"], row["note"], row["varied"]) == ("failed", "a typo", {"trainer.max_steps": 3})


def test_the_states_of_a_sweep_are_those_of_status(run: Callable, outputs: Path) -> None:
    sweep = write_sweep(
        outputs / "sweeps/a", "python -m glmtuner -m a=1,2", jobs=["done", "runs", "broken", "later", "cut"]
    )
    run(
        "sweeps/a/done",
        {"trainer.learning_rate": 0.1},
        history=HISTORY,
        metrics={"eval_loss": 3.0, "train_runtime": 80.0},
    )
    runs = run("sweeps/a/runs", {"trainer.learning_rate": 0.2}, history=HISTORY, progress=PROGRESS)
    run("sweeps/a/cut", {"trainer.learning_rate": 0.3}, history=HISTORY)
    run("sweeps/a/broken", {"trainer.learning_rate": 0.4}, failed={"kind": "error", "reason": "x", "words": []})
    with try_lock(runs / ".lock"):
        index = index_of(outputs)
        rows, lines = rows_of(index), {line.name: line for line in lines_of(sweep)}
        expected_left = seconds_left([*lines.values()])
    states = {line.name: {"done": "finished"}.get(line.state, line.state) for line in lines.values()}
    assert {row["name"]: row["state"] for row in rows.values()} == states
    assert states == {
        "done": "finished",
        "runs": "running",
        "cut": "interrupted",
        "broken": "failed",
        "later": "not started",
    }
    for name, line in lines.items():
        row = rows[f"sweeps/a/{name}"]
        assert row["loss"] == line.loss
        assert row["step"] == (line.progress.step if line.progress else None)
        assert row["varied"] == (
            {}
            if name == "later"
            else {"trainer.learning_rate": {"done": 0.1, "runs": 0.2, "cut": 0.3, "broken": 0.4}[name]}
        )
    summary = index.sweeps["sweeps/a"].summary
    assert summary["count"] == {"finished": 1, "running": 1, "interrupted": 1, "failed": 1, "not started": 1}
    assert summary["eta"] == pytest.approx(expected_left)
    assert expected_left == pytest.approx(
        60.0 + 80.0
    )  # 30 steps of 2 s, then the one that waits: the mean of 80 and 40 steps of 2 s
    assert (summary["objective"], summary["jobs"]) == (rank_sweep(sweep).objective, 5)


def test_only_what_changed_is_sent(run: Callable, outputs: Path) -> None:
    one = run("one", history=HISTORY)
    run("two", history=HISTORY, metrics={"train_loss": 1.0})
    index = index_of(outputs)
    first = json.loads(index.changes(None))
    assert first["whole"] and {row["id"] for row in first["rows"]} == {"one", "two"}
    assert rows_of(index, first["version"]) == {}
    with (one / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "epoch": 1.5, "loss": 1.5}\n')
    index.refresh(at_once=True)
    second = json.loads(index.changes(first["version"]))
    assert not second["whole"] and [row["id"] for row in second["rows"]] == ["one"]
    assert (second["rows"][0]["loss"], second["rows"][0]["step"]) == (1.5, 6)
    for file in (outputs / "two").iterdir():
        file.unlink()
    (outputs / "two").rmdir()
    index.refresh(at_once=True)
    third = json.loads(index.changes(second["version"]))
    assert (third["removed"], third["rows"]) == (["two"], [])
    again = json.loads(index_of(outputs).changes(third["version"]))  # a board that was started again
    assert again["whole"] and [row["id"] for row in again["rows"]] == ["one"]


def test_a_run_that_finishes_or_is_begun_anew_is_noticed(run: Callable, outputs: Path) -> None:
    folder = run("one", history=HISTORY)
    index = index_of(outputs)
    assert rows_of(index)["one"]["state"] == "interrupted"
    (folder / "metrics.json").write_text('{"train_loss": 1.0}')
    assert rows_of(index)["one"]["state"] == "finished"
    (folder / "metrics.json").unlink()
    with try_lock(folder / ".lock"):
        assert rows_of(index)["one"]["state"] == "running"


def test_a_folder_may_itself_be_a_sweep_or_a_run(run: Callable, outputs: Path) -> None:
    write_sweep(outputs / "s", "python -m glmtuner -m")
    run("s/one", metrics={"train_loss": 1.0})
    rows = rows_of(index_of(outputs / "s"))
    assert {(row["id"], row["sweep"]) for row in rows.values()} == {("one", ".")}
    rows = rows_of(index_of(outputs / "s/one"))
    assert {(row["id"], row["name"], row["sweep"]) for row in rows.values()} == {(".", "one", None)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "a: [", "damaged"),
        ("config.yaml", "model: 3\n", "not the configuration of a run"),
        ("config.yaml", "model: {path: '${oc.env:HOME}'}\n", "interpolation"),
        ("metrics.json", "{", "damaged"),
        ("metrics.json", '{"train_loss": "high"}', "not a number"),
        ("failed.json", "[]", "damaged"),
        ("provenance.json", "nonsense", "damaged"),
    ],
)
def test_a_damaged_file_is_told_in_its_row(run: Callable, outputs: Path, name: str, content: str, said: str) -> None:
    run("sound", metrics={"train_loss": 1.0})
    folder = run("broken", history=HISTORY)
    (folder / name).write_text(content)
    rows = rows_of(index_of(outputs))
    assert rows["sound"]["state"] == "finished"
    assert rows["broken"]["state"] == "failed" and said in rows["broken"]["note"]


def test_a_file_that_is_mended_is_read_again(run: Callable, outputs: Path) -> None:
    folder = run("one")
    (folder / "metrics.json").write_text("{")
    index = index_of(outputs)
    assert rows_of(index)["one"]["state"] == "failed"
    (folder / "metrics.json").write_text('{"train_loss": 1.0}')
    assert rows_of(index)["one"]["state"] == "finished"


def test_links_are_named_and_not_followed(run: Callable, outputs: Path, tmp_path: Path) -> None:
    inside = run("real", metrics={"train_loss": 1.0})
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "config.yaml").write_text("model: {model_name_or_path: secret}\n")
    (outputs / "outside").symlink_to(secret)
    (outputs / "loop").symlink_to(outputs)
    (outputs / "again").symlink_to(inside)
    (outputs / "dangling").symlink_to(outputs / "nowhere")
    run("linked")
    (outputs / "linked/metrics.json").symlink_to(secret / "config.yaml")
    index = index_of(outputs)
    rows = rows_of(index)
    assert {*rows} == {"real", "linked"}
    assert "leads out of the board's folder" in rows["linked"]["note"] and rows["linked"]["metrics"] == {}
    problems = {each["id"]: each["message"] for each in json.loads(index.changes(None))["problems"]}
    assert {*problems} == {"outside", "loop", "again"}
    assert "leads out" in problems["outside"] and "is shown there" in problems["again"]
    assert "secret" not in index.changes(None).replace("elsewhere", "")
    for id in ("outside", "again", "loop/real", "../elsewhere", "/etc", "real/../real", "linked/metrics.json"):
        with pytest.raises(CheckpointError):
            index.record(id)


def test_what_cannot_be_read_is_named(run: Callable, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("one")
    (outputs / "locked").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(index_module.os, "scandir", refused)
    index = index_of(outputs)
    assert {*rows_of(index)} == {"one"}
    assert json.loads(index.changes(None))["problems"] == [
        {"id": "locked", "message": "it cannot be read (permission denied)"}
    ]


def test_names_that_no_page_can_show_are_left_out_and_named(outputs: Path, run: Callable) -> None:
    run("good")
    for name in (b"bad\xff", b"esc\x1b[31m", "rtl\u202etxt".encode()):
        folder = os.path.join(os.fsencode(outputs), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"failed.json"), "w") as file:
            file.write('{"kind": "error", "reason": "x"}')
    index = index_of(outputs)
    text = index.changes(None)
    assert {row["id"] for row in json.loads(text)["rows"]} == {"good"}
    assert len(json.loads(text)["problems"]) == 3
    text.encode()


def test_hidden_folders_and_deep_ones(run: Callable, outputs: Path) -> None:
    run(".trash/one")
    run("/".join(["deep"] * 12 + ["run"]))
    run("/".join(["deeper"] * 14))
    index = index_of(outputs)
    assert {*rows_of(index)} == {"/".join(["deep"] * 12 + ["run"])}
    assert any("12 folders deep" in each["message"] for each in json.loads(index.changes(None))["problems"])


def test_a_stalled_a_diverging_and_a_waiting_run_are_marked(run: Callable, outputs: Path) -> None:
    stalled = run("stalled", history=HISTORY, progress=PROGRESS)  # a step takes 2 s
    slow = run("slow", history=HISTORY, progress={**PROGRESS, "seconds": 400.0})  # a step takes 40 s
    loads = run("loads")
    bad = run("bad", history=[*HISTORY, {"step": 6, "epoch": 2.0, "loss": None}], progress=PROGRESS)
    write_sweep(outputs / "s", "python -m glmtuner -m hydra/launcher=shared a=1,2", jobs=["first", "second"])
    first = run("s/first", history=HISTORY)
    then = time.time() - 90
    for folder in (stalled, slow, loads):
        for file in folder.iterdir():
            os.utime(file, (then, then))
    locks = [try_lock(folder / ".lock") for folder in (stalled, slow, loads, bad, first)]
    rows = rows_of(index_of(outputs))
    assert {name: rows[name]["mark"] for name in ("stalled", "slow", "loads", "bad", "s/first", "s/second")} == {
        "stalled": "stalled", "slow": None, "loads": None, "bad": "diverged", "s/first": None, "s/second": "waits for memory",
    }  # fmt: skip
    assert "has written nothing for" in rows["stalled"]["note"] and "not a number at step 6" in rows["bad"]["note"]
    assert rows["bad"]["loss"] is None
    for lock in locks:
        lock.close()


def test_the_disk_is_looked_at_once_a_second(run: Callable, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("one")
    index = index_of(outputs)
    looks = []
    monkeypatch.setattr(index, "_look", lambda now: looks.append(now))
    for _ in range(50):
        index.changes(None)
    assert len(looks) == 1


def test_histories_beyond_the_memory_are_given_back(
    run: Callable, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MOST_NUMBERS", 25)
    for name in "abc":
        run(name, history=HISTORY)  # 12 numbers each
    index = index_of(outputs)
    for name in "abc":
        record = index.record(name)
        assert record.history().of("loss")[1].tolist() == [3.5, 2.5]
        index.touch_history(record)
    assert [index.records[name].held for name in "abc"] == [0, 11, 11]
    assert index.record("a").history().of("loss")[1].tolist() == [3.5, 2.5]
