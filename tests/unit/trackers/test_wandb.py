"""The W&B tracker on folders that the tests write: a sweep's report, names, ids, truncation and redaction."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import wandb_file
from matplotlib import pyplot

from glmtuner.config.compose import compose
from glmtuner.launch.register import register_presets
from glmtuner.trackers.experiment import MAX_ROWS, sweep_of
from glmtuner.trackers.wandb import Wandb, redacted_argv, sessions

register_presets()


def tracker(**more: object) -> Wandb:
    return Wandb(name="wandb", project="p", **more)


def draw(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pyplot.figure(figsize=(1, 1)).savefig(path)
    pyplot.close()


def a_run(folder: Path, *words: str, again: bool = False) -> tuple[Wandb, object]:
    """A run folder with a config, and its tracker, started."""
    folder.mkdir(parents=True, exist_ok=again)
    (folder / "config.yaml").write_text("data: {dataset: [a]}\ntrainer: {seed: 3}\n")
    run = compose(["model=tiny_glm", *words]).run
    run.tracker.start(run, folder)
    return run.tracker, run


def test_a_sweeps_report_is_one_run_of_its_group(tmp_path: Path) -> None:
    sweep = tmp_path / "rates"
    sweep.mkdir()
    assert tracker().publish(sweep) is None and not (sweep / "wandb").exists()
    draw(sweep / "pictures/bars.png")
    (sweep / "leaderboard.csv").write_text("rank,job,loss,note\n1,seed-1,0.25,\n2,seed-2,,kept\n", encoding="utf-8")
    (sweep / "report.html").write_text("<h1>rates</h1>", encoding="utf-8")
    for name in ("first", "second"):
        closing = tracker(tags=[name]).publish(sweep)
        (session,) = wandb_file.sessions(sweep)
        assert f"wandb sync {sessions(sweep / 'wandb')[0]}" in closing
        assert session.run.run_id == (sweep / "wandb/run_id.txt").read_text()
        assert (session.run.run_group, session.run.job_type, session.run.display_name, [*session.run.tags]) == (
            "rates", "report", "rates report", [name],
        )  # fmt: skip
        files = sweep / "wandb/latest-run/files"
        table = json.loads((files / session.summary["leaderboard/path"]).read_text())
        assert table["columns"] == ["rank", "job", "loss", "note"]
        assert table["data"] == [[1, "seed-1", 0.25, None], [2, "seed-2", None, "kept"]]
        assert (files / session.summary["report/path"]).read_text() == "<h1>rates</h1>"
        assert session.summary["pictures/bars/_type"] == "image-file"
    assert tracker(group="mine").publish(sweep)
    assert wandb_file.sessions(sweep)[0].run.run_group == "mine"


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        ([], {}, ("job_ab", "", "train", "glmtuner")),
        (["name=mine"], {"WANDB_NAME": "theirs"}, ("mine", "", "train", "glmtuner")),
        ([], {"WANDB_NAME": "theirs", "WANDB_RUN_GROUP": "g", "WANDB_PROJECT": "q"}, ("theirs", "g", "train", "q")),
        (["tracker.group=t", "tracker.job_type=j"], {"WANDB_RUN_GROUP": "g", "WANDB_JOB_TYPE": "k"}, ("job_ab", "t", "j", "glmtuner")),
        (["trainer=predict"], {}, ("job_ab", "", "predict", "glmtuner")),
        (["trainer=evaluate"], {"WANDB_JOB_TYPE": "k"}, ("job_ab", "", "k", "glmtuner")),
        (["sweep"], {"WANDB_NAME": "theirs", "WANDB_RUN_ID": "x"}, ("job", "sweep", "train", "glmtuner")),
        (["sweep", "name=mine"], {"WANDB_RUN_GROUP": "g"}, ("job", "g", "train", "glmtuner")),
    ],
)  # fmt: skip
def test_overrides_win_over_the_environment_and_that_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], env: dict[str, str], expected: tuple
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "sweep" / "job_ab"
    if words[:1] == ["sweep"]:
        folder.parent.mkdir()
        (folder.parent / "sweep.json").write_text("{}")
    used, _ = a_run(folder, *(word for word in words if word != "sweep"))
    used.finish(folder, {})
    (session,) = wandb_file.sessions(folder)
    about = session.run
    assert (about.display_name, about.run_group, about.job_type, about.project) == expected
    assert about.run_id != "x"
    assert (sweep_of(folder) == folder.parent) == (words[:1] == ["sweep"])


def test_a_single_run_uses_the_id_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    used, _ = a_run(tmp_path / "run")
    used.abandon()
    (session,) = wandb_file.sessions(tmp_path / "run")
    assert session.run.run_id == "mine" and session.exit_code == 1 and not session.preempting


def test_the_table_of_predictions_is_truncated(tmp_path: Path) -> None:
    used, _ = a_run(tmp_path / "run")
    lines = [{"index": i, "prompt": "p", "label": "l", "predict": f"答{i}"} for i in range(MAX_ROWS + 5)]
    (tmp_path / "run/predictions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    used.finish(tmp_path / "run", {"predict_rouge-l": 1.5})
    (session,) = wandb_file.sessions(tmp_path / "run")
    assert session.summary["predictions/nrows"] == MAX_ROWS and session.summary["predict_rouge-l"] == 1.5
    table = json.loads((tmp_path / "run/wandb/latest-run/files" / session.summary["predictions/path"]).read_text())
    assert table["data"][-1] == [MAX_ROWS - 1, "p", "l", f"答{MAX_ROWS - 1}"]


def test_nothing_is_logged_before_the_start(tmp_path: Path) -> None:
    used = tracker()
    used.log({"step": 1, "loss": 1.0})
    used.abandon()
    assert used.finish(tmp_path, {"loss": 1.0}) is None and list(tmp_path.iterdir()) == []


def test_the_command_line_shows_no_secret_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["glmtuner", "trainer.hub_token=hf_abc", "trainer.seed=1"]
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(KeyError), redacted_argv():
        assert sys.argv == ["glmtuner", "trainer.hub_token=<hidden>", "trainer.seed=1"]
        raise KeyError
    assert sys.argv is typed


def test_a_run_survives_the_end_of_wandbs_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = a_run(tmp_path / "run")
    first.log({"step": 1, "loss": 2.0})
    for child in psutil.Process().children(recursive=True):
        if "wandb-core" in child.name():
            child.terminate()  # as SLURM does, to every process of a job
            child.wait(60)
    first.log({"step": 2, "loss": 1.0})
    first.abandon(preempted=True)
    assert first.finish(tmp_path / "run", {"train_loss": 1.5}) is None
    assert capsys.readouterr().out.count("W&B failed (") == 1
    (tmp_path / "run/history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    second, _ = a_run(tmp_path / "run", again=True)
    for line in ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}):
        second.log(line)
    assert "wandb sync" in second.finish(tmp_path / "run", {"train_loss": 1.5})
    (session,) = wandb_file.sessions(tmp_path / "run")
    assert [row["train/loss"] for row in session.history if "train/loss" in row] == [2.0, 1.0]
