"""Every tracker against its real client library: its numbers are those of history.jsonl, value by value."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from stored import READERS, Stored, flat, history_of
from warm_server import WarmServer

TINY = [
    "model=tiny_glm", "data.dataset=belle_sample", "data.max_samples=12", "data.max_target_length=16", "data.dev_ratio=0.25",
    "trainer.max_steps=4", "trainer.logging_steps=1", "trainer.save_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
    "trainer.disable_tqdm=true",
]  # fmt: skip
PREDICTS = ["trainer.do_predict=true", "trainer.predict_with_generate=true", "model.plot_loss=true"]
KEY = "0123456789abcdef" * 3
ENV = {
    "COLUMNS": "160",
    "COMET_API_KEY": KEY,
    "SWANLAB_MODE": "offline",
    "SWANLAB_API_KEY": KEY,
    "HF_TOKEN": f"hf_{KEY}",
}
TIMING = "train/tokens_per_second"  # trackers have it, the history holds no timings


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database of MLflow, which takes it seconds to create."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def local_database(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Where MLflow's own default is, there is a database already, except in the first test."""
    is_mlflow = "tracker" in request.fixturenames and request.getfixturevalue("tracker") == "mlflow"
    if is_mlflow and "there_with" not in request.node.name:
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "mlflow.db")


def env_of(folder: Path) -> dict[str, str]:
    return {**ENV, "HOME": str(folder)}


def options(tracker: str, folder: Path) -> list[str]:
    """The tracker with a project of the test's own, so that runs of other tests are not in it."""
    return [f"tracker={tracker}", f"tracker.project=p-{folder.name[:40]}"]


def check_numbers(stored: Stored, run: Path, tracker: str) -> None:
    """Every value of history.jsonl and metrics.json is there once, exactly, and nothing else."""
    values = dict(stored.values)
    timings = values.pop(TIMING)
    assert all(value > 0 for _, value in timings)
    expected = history_of(run, tracker)
    assert len(expected["train/loss"]) >= 2
    metrics = json.loads((run / "metrics.json").read_text())
    last = max(step for series in expected.values() for step, _ in series)
    expected |= {name: [(last, value)] for name, value in metrics.items()}
    assert values == expected


def files_below(*folders: Path) -> bytes:
    return b"\n".join(
        str(path).encode() + path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()
    )


def test_a_run_is_there_with_its_numbers_config_answers_and_weights_and_no_secret(
    server: WarmServer, tracker: str, tmp_path: Path
) -> None:
    words = [*TINY, *PREDICTS, *options(tracker, tmp_path), "tracker.tags=zh,lora", "tracker.group=mine", "name=first"]
    words += ["tracker.log_artifact=true", f"trainer.hub_token=hf_{KEY}", "trainer.output_dir=run"]
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert done.code == 0, done.output
    run = tmp_path / "run"
    stored = READERS[tracker](run)
    check_numbers(stored, run, tracker)
    assert (stored.name, stored.group, stored.job_type, stored.tags) == ("first", "mine", "train", {"zh", "lora"})
    assert stored.state in ("finished", None) and (stored.state is None) == (tracker == "trackio")
    config = flat(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    told = {name: str(value) for name, value in stored.config.items()}
    # null is no value of a parameter of SwanLab, and an empty dictionary none of Comet
    names = {name for name, value in config.items() if not (tracker == "swanlab" and value is None and "." not in name)}
    names = {name for name in names if not (tracker == "comet" and config[name] == {})}
    assert {name: told.get(name) for name in names} == {name: str(config[name]) for name in names}
    assert any(name.startswith("provenance.packages.") for name in told) and len(names) > 100
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows = [[str(value) for value in answer.values()] for answer in answers]
    assert [[str(value) for value in row] for row in stored.tables["predictions"]] == rows and len(rows) == 3
    assert stored.pictures == {"pictures/loss"}
    if tracker == "trackio":
        assert stored.weights.keys() and all(name.startswith("adapter-") for name in stored.weights)
    else:
        assert stored.weights["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert KEY.encode() not in files_below(tmp_path, Path(os.environ["TRACKIO_DIR"]))


def test_a_killed_run_goes_on_as_the_same_run_with_each_line_once(
    server: WarmServer, tracker: str, tmp_path: Path
) -> None:
    words = [word for word in TINY if "max_steps" not in word]
    words += ["trainer.max_steps=40", *options(tracker, tmp_path), "trainer.output_dir=run"]
    run = tmp_path / "run"
    killed = server.run(
        *words,
        cwd=tmp_path,
        env=env_of(tmp_path),
        kill_when=str(run / "checkpoints/checkpoint-10/complete.json"),
        kill_after=0.1,
    )
    assert killed.code == -signal.SIGKILL and not (run / "metrics.json").exists(), killed.output
    before = json.loads((run / "history.jsonl").read_text().splitlines()[-1])["step"]
    assert 10 <= before < 40
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):  # so that several steps repeat
        if int(checkpoint.name.rpartition("-")[2]) > 6:
            (checkpoint / "complete.json").unlink()
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert done.code == 0 and "resumed from checkpoint-6" in done.output, done.output
    stored = READERS[tracker](run)
    check_numbers(stored, run, tracker)
    assert len(stored.values["train/loss"]) == 40 and stored.state in ("finished", None)
    written = [path for path in (run / tracker).glob("run*") if path.is_file()]
    assert len(written) == 1 and str(stored.id) in written[0].read_text()


def test_a_preempted_run_is_shown_as_such_until_it_goes_on(server: WarmServer, tracker: str, tmp_path: Path) -> None:
    if tracker == "trackio":
        pytest.skip("trackio has no states")
    (tmp_path / "stop.py").write_text(
        "import os, signal\n"
        "from transformers import TrainerCallback\n"
        "from glmtuner.training import trainer\n"
        "class Stop(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **given):\n"
        "        if state.global_step == 2 and not os.path.exists('stopped'):\n"
        "            open('stopped', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "begin = trainer.GlmTrainer.__init__\n"
        "def init(self, *given, **options):\n"
        "    begin(self, *given, **options)\n"
        "    self.add_callback(Stop())\n"
        "trainer.GlmTrainer.__init__ = init\n"
    )
    words = [*TINY, *options(tracker, tmp_path), "plugins=[stop]", "trainer.output_dir=run"]
    stopped = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert stopped.code == 143, stopped.output
    first = READERS[tracker](tmp_path / "run")
    assert first.state == "preempted" and [step for step, _ in first.values["train/loss"]] == [1, 2, 3]
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert done.code == 0, done.output
    second = READERS[tracker](tmp_path / "run")
    check_numbers(second, tmp_path / "run", tracker)
    assert (second.state, second.id) == ("finished", first.id)


@pytest.mark.parametrize("launcher", ["shared", "joblib"])
def test_the_jobs_of_a_sweep_share_a_group_and_its_report_is_a_run(
    server: WarmServer, tracker: str, tmp_path: Path, launcher: str
) -> None:
    """With `shared`, both jobs train in one process at the same time, and each has its own run."""
    words = [
        "-m",
        *TINY,
        *options(tracker, tmp_path),
        "trainer.learning_rate=1e-3,2e-3",
        "name=rates",
        f"hydra/launcher={launcher}",
    ]
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert done.code == 0, done.output
    sweep = tmp_path / "outputs/sweeps/rates"
    jobs = [folder for folder in sorted(sweep.glob("*/")) if (folder / "metrics.json").is_file()]
    assert len(jobs) == 2
    stored = [READERS[tracker](job) for job in jobs]
    for job, found in zip(jobs, stored, strict=True):
        check_numbers(found, job, tracker)
        assert (found.group, found.job_type) == ("rates", "train")
    assert [found.name for found in stored] == ["learning_rate-0.001", "learning_rate-0.002"]
    assert stored[0].id != stored[1].id and stored[0].values["train/loss"] != stored[1].values["train/loss"]
    report = READERS[tracker](sweep)
    assert (report.name, report.group, report.job_type) == ("rates report", "rates", "report")
    assert len(report.tables["leaderboard"]) == 2 and report.pictures
    assert report.pictures == {f"pictures/{path.stem}" for path in sweep.glob("pictures/*.png")}
    assert report.page is not None and "rates" in report.page
    if tracker == "mlflow":
        assert {found.parent for found in stored} == {report.id}
    if launcher == "shared":
        again = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
        assert again.code == 0, again.output
        second = READERS[tracker](sweep)
        assert (second.id, second.tables, second.pictures) == (report.id, report.tables, report.pictures)
