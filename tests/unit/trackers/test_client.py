"""A client library in a process of its own, with a library that the tests write: what reaches it, and what its failures do."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from glmtuner.config.compose import compose
from glmtuner.config.groups import SCHEMA_CLASSES
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.trackers import client, experiment
from glmtuner.trackers.client import ClientFailed
from glmtuner.trackers.experiment import MAX_ROWS, ExperimentTracker, tables

register_presets()
ROOT = Path(__file__).parents[3]
KEY = "hf_QwErTyUiOp1234567890AsDfGhJkZxCvBn"
CLIENTS = [
    name for name, cls in SCHEMA_CLASSES["tracker"].items() if issubclass(cls, ExperimentTracker) and name != "fake"
]
LIBRARY = '''
import json, os, signal, time
from glmtuner.trackers.client import ClientSession

class Session(ClientSession):
    """Appends what it is told to calls.jsonl in the run's folder."""

    def __init__(self, about, note):
        super().__init__(about, note)
        print("a library that prints")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.address = f"https://me:secret-word@{about.name}"
        self.write("open", about.name, about.group, about.job_type, about.tags, about.config)

    def write(self, *values):
        with open(self.folder / "calls.jsonl", "a") as file:
            file.write(json.dumps(values) + "\\n")

    def log(self, step, values):
        if step == 13:
            raise ValueError("step 13 with hf_QwErTyUiOp1234567890AsDfGhJkZxCvBn")
        if step == 14:
            time.sleep(600)
        if step == 15:
            self.note("a note with hf_QwErTyUiOp1234567890AsDfGhJkZxCvBn")
        if step == 16:
            self.write("environment", os.environ["FAKE_ONE"], os.environ["FAKE_TWO"])
        if step == 17:
            time.sleep(4)
        self.write("log", step, values)

    def finish(self, metrics):
        self.write("finish", metrics, self.last_step)
        return "see there"

    def abandon(self, preempted):
        self.write("abandon", preempted)
'''


@dataclass(kw_only=True)
class Fake(ExperimentTracker):
    title: ClassVar[str] = "Fake"
    package: ClassVar[str] = "fake_client"


Fake.__module__ = "fake_client"


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library/fake_client.py").write_text(LIBRARY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))


def started(folder: Path, *words: str) -> Fake:
    """A run folder with a config, and the tracker of a run in it, started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("data: {dataset: [a]}\ntrainer: {seed: 3}\n")
    used = Fake(name="fake", project="p", tags=["a"])
    used.start(compose(["model=tiny_glm", "tracker=none", *words]).run, folder)
    return used


def calls(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_every_line_arrives_in_its_order_by_the_names_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    used = started(run, "name=first")
    used.log({"step": 1, "loss": float("nan"), "epoch": 0.5})
    used.log({"step": 1, "eval_rouge-l": 2, "epoch": 0.5})
    assert used.finish(run, {"train_loss": 0.1 + 0.2}) == "Fake: see there"
    opened, first, second, last = calls(run)
    assert opened[:5] == ["open", "first", None, "train", ["a"]]
    assert opened[5] == {
        "data": {"dataset": ["a"]},
        "trainer": {"seed": 3},
        "provenance": {"git": None, "packages": {}},
    }
    assert first[1] == 1 and first[2]["train/loss"] != first[2]["train/loss"] and first[2]["train/epoch"] == 0.5
    assert second == ["log", 1, {"eval/rouge-l": 2, "train/epoch": 0.5}]
    assert last == ["finish", {"train_loss": 0.30000000000000004}, 1]
    assert "Fake: https://<hidden>@first\n" in capsys.readouterr().out
    used.log({"step": 2, "loss": 1.0})
    used.abandon()
    assert len(calls(run)) == 4


def test_an_error_of_the_library_ends_the_tracking_and_is_printed_once_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = started(tmp_path / "run")
    used.log({"step": 15, "loss": 1.0})
    used.log({"step": 13, "loss": 1.0})
    end = time.monotonic() + 20
    while used._client is not None and time.monotonic() < end:
        used.log({"step": 16, "loss": 1.0})
        time.sleep(0.05)
    used.abandon()
    assert used.finish(tmp_path / "run", {}) is None
    out = capsys.readouterr().out
    assert out.count("Fake failed (ValueError: step 13 with <hidden>): the run continues without it") == 1
    assert "a note with <hidden>" in out and KEY not in out
    assert calls(tmp_path / "run")[-1] == ["abandon", False]


def test_a_library_that_hangs_holds_up_no_step_and_the_end_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "FINISH_SECONDS", 1.0)
    used = started(tmp_path / "run")
    begun = time.monotonic()
    for _ in range(20_000):  # far more than a pipe holds
        used.log({"step": 14, "loss": 1.0, "learning_rate": 0.1})
    assert time.monotonic() - begun < 20
    begun = time.monotonic()
    assert used.finish(tmp_path / "run", {}) is None and time.monotonic() - begun < 20
    assert "Fake failed (no answer within 1 s): the run continues without it" in capsys.readouterr().out


def test_a_process_that_is_killed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = started(tmp_path / "run")
    assert used._client is not None
    used._client._process.send_signal(signal.SIGTERM)  # a scheduler's; the library has set a handler of its own
    used.log({"step": 1, "loss": 1.0})
    used._client.send("log", step=2, values={})
    used._client.send("unknown")
    with pytest.raises(ClientFailed, match=r"unexpected keyword|missing 1 required"):
        used._client.receive(20)
    used.abandon()
    assert [call[1] for call in calls(tmp_path / "run") if call[0] == "log"] == [1, 2]
    capsys.readouterr()
    second = started(tmp_path / "other")
    assert second._client is not None
    second._client._process.kill()
    assert second.finish(tmp_path / "other", {}) is None
    assert "Fake failed (its process ended with code -9: a library that prints)" in capsys.readouterr().out


def test_what_a_killed_training_has_logged_is_stored_and_the_run_closed_as_failed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from glmtuner.trackers.client import ClientProcess\n"
        "client = ClientProcess('fake_client', {})\n"
        "client.send('open', tracker='fake', folder=sys.argv[2], project='p', name='n', group=None, job_type='train', tags=[], config={},"
        " log_artifact=False)\n"
        "client.receive(60)\n"
        "[client.send('log', step=step, values={'train/loss': 1.0}) for step in range(1, 4)]\n"
        "while not client._calls.empty(): pass\n"
        "import time; time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    killed = subprocess.run([sys.executable, "-c", script, str(ROOT), str(run)], cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while calls(run)[-1][0] != "abandon" and time.monotonic() < end:
        time.sleep(0.05)
    assert [call[1] for call in calls(run)[1:]] == [1, 2, 3, False]


def test_runs_of_one_process_have_a_client_each_and_one_run_has_one_client_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = started(tmp_path / "first"), started(tmp_path / "second")
    first.log({"step": 1, "loss": 1.0})
    second.log({"step": 2, "loss": 2.0})
    monkeypatch.setattr(experiment, "OPEN_SECONDS", 2.0)
    third = started(tmp_path / "first")  # waits for the first one's lock
    assert third._client is None and "Fake failed (no answer within 2 s)" in capsys.readouterr().out
    first.abandon()
    second.abandon()
    assert [call[1] for call in calls(tmp_path / "first")[1:]] == [1, False]
    assert [call[1] for call in calls(tmp_path / "second")[1:]] == [2, False]
    (tmp_path / "lock").touch()
    monkeypatch.setattr(client, "LOCK_SECONDS", 0.2)
    held = client.wait_for_lock(tmp_path / "lock")
    with pytest.raises(TimeoutError, match="another client has"):
        client.wait_for_lock(tmp_path / "lock")
    assert held is not None
    held.close()


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["name=mine"], {}, ["mine", None, "train"]),
        ([], {"FAKE_NAME": "theirs", "FAKE_GROUP": "g", "FAKE_JOB": "k"}, ["theirs", "g", "k"]),
        (["trainer=predict"], {}, ["job_ab", None, "predict"]),
        (["trainer=evaluate"], {}, ["job_ab", None, "evaluate"]),
        (["sweep", "name=mine"], {"FAKE_NAME": "theirs"}, ["job", "sweep", "train"]),
    ],
)
def test_names_groups_and_job_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], env: dict[str, str], expected: list[str | None]
) -> None:
    monkeypatch.setattr(Fake, "defaults", {"name": "FAKE_NAME", "group": "FAKE_GROUP", "job_type": "FAKE_JOB"})
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "sweep/job_ab"
    if words[:1] == ["sweep"]:
        folder.parent.mkdir()
        (folder.parent / "sweep.json").write_text("{}")
    started(folder, *(word for word in words if word != "sweep")).abandon()
    assert calls(folder)[0][1:4] == expected


def test_the_tables_are_truncated(tmp_path: Path) -> None:
    lines = [{"index": i, "predict": f"答{i}"} for i in range(MAX_ROWS + 5)]
    (tmp_path / "predictions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    columns, rows = tables(tmp_path)["predictions"]
    assert columns == ["index", "predict"] and len(rows) == MAX_ROWS and rows[-1] == [MAX_ROWS - 1, f"答{MAX_ROWS - 1}"]


def test_a_missing_client_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glmtuner
) -> None:
    assert {"mlflow", "swanlab", "trackio", "comet"} <= {*CLIENTS}
    monkeypatch.setattr(experiment, "find_spec", lambda package: None)
    for name in CLIENTS:
        tracker = compose(["model=tiny_glm", f"tracker={name}"]).run.tracker
        with pytest.raises(ConfigError) as error:
            tracker.check_machine()
        assert str(error.value).startswith(f"tracker={name} needs the package {tracker.package.replace('_', '-')}, ")
        assert f"type pip install 'glmtuner[{name}]'" in str(error.value)
    done = glmtuner("tracker=mlflow", "model=tiny_glm", "data.dataset=belle_sample", "trainer.output_dir=run")
    assert done.returncode == 2 and "tracker=mlflow needs the package mlflow" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
    checked = glmtuner("tracker=mlflow", "model=tiny_glm", "data.dataset=belle_sample", "--check")
    assert checked.returncode == 2 and "tracker=mlflow needs" in checked.stdout + checked.stderr


def test_the_environment_of_the_user_wins_over_a_clients_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "variables", {"FAKE_ONE": "ours", "FAKE_TWO": "ours"})
    monkeypatch.setenv("FAKE_ONE", "theirs")
    used = started(tmp_path / "run")
    used.log({"step": 16, "loss": 1.0})
    used.abandon(preempted=True)
    assert calls(tmp_path / "run")[1:] == [
        ["environment", "theirs", "ours"], ["log", 16, {"train/loss": 1.0}], ["abandon", True],
    ]  # fmt: skip


def test_a_run_that_ends_early_leaves_a_slow_library_to_store_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "ABANDON_SECONDS", 0.5)
    used = started(tmp_path / "run")
    used.log({"step": 17, "loss": 1.0})
    used.abandon(preempted=True)
    assert "Fake is still storing the run after 0.5 s" in capsys.readouterr().out
    end = time.monotonic() + 30
    while calls(tmp_path / "run")[-1][0] != "abandon" and time.monotonic() < end:
        time.sleep(0.05)
    assert [call[:2] for call in calls(tmp_path / "run")[1:]] == [["log", 17], ["abandon", True]]
