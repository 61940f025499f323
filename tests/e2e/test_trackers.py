"""What the trackers keep of real runs, read back from their files."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import wandb_file
from omegaconf import OmegaConf
from wandb_server import WandbServer

from glmtuner.trackers.wandb import Wandb

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "model=tiny_glm", "data.dataset=belle_sample", "data.max_samples=12", "data.max_target_length=16", "trainer.max_steps=4",
    "trainer.logging_steps=1", "trainer.save_steps=2", "trainer.disable_tqdm=true",
]  # fmt: skip
SCORED = [
    "data.dev_ratio=0.25",
    "trainer.do_eval=true",
    "trainer.do_predict=true",
    "trainer.predict_with_generate=true",
]
KEY = "0123456789abcdef" * 3


def rows(run: Path) -> list[dict[str, float]]:
    """The history as W&B's names have it."""
    found = []
    for text in (run / "history.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        named = {
            f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value for name, value in line.items()
        }
        found.append({"train/global_step": step, **named})
    return found


TIMING = "train/tokens_per_second"  # trackers have it, the history holds no timings


def without_timings(row: dict[str, float]) -> dict[str, float]:
    assert row.get(TIMING, 1.0) > 0
    return {name: value for name, value in row.items() if name[0] != "_" and name != TIMING}


def logged(session: wandb_file.Written) -> list[dict[str, float]]:
    """W&B's rows of the history, without what it adds to each."""
    kept = [row for row in session.history if "train/global_step" in row]
    assert [row["_step"] for row in kept] == list(range(kept[0]["_step"], kept[0]["_step"] + len(kept)))
    assert TIMING in kept[-1] or "train/loss" not in kept[-1]
    return [without_timings(row) for row in kept]


def received(server: WandbServer) -> list[dict[str, float]]:
    return [without_timings(row) for row in server.rows]


def bytes_of(folder: Path) -> bytes:
    """Names and contents of all files in a folder."""
    return b"\n".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file())


def stop_after_step_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run gets SIGTERM in its third step; its last whole checkpoint is made unusable, so that two steps repeat."""
    from transformers import TrainerCallback

    from glmtuner.training import trainer

    told = [signal.SIGTERM]

    class Tell(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == 2 and told:
                os.kill(os.getpid(), told.pop())

    begin = trainer.GlmTrainer.__init__

    def init(self, *given, **options):
        begin(self, *given, **options)
        self.add_callback(Tell())

    monkeypatch.setattr(trainer.GlmTrainer, "__init__", init)


def test_a_run_is_in_its_file_and_no_secret_is(glmtuner_fork: Callable, tmp_path: Path) -> None:
    subprocess.run(
        "git init -q . && git -c user.name=n -c user.email=e commit -q --allow-empty -m m && "
        f"git remote add origin https://ghp_{KEY}:x-oauth-basic@example.org/me/repo.git",
        shell=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": f"hf_{KEY}", "WANDB_MODE": "offline"}
    words = [*TINY, *SCORED, "model.plot_loss=true", f"trainer.hub_token=hf_{KEY}", "tracker.log_artifact=true"]
    words += ["tracker.project=proj", "tracker.entity=team", "tracker.group=mine", "tracker.tags=a,b", "name=first"]
    done = glmtuner_fork(*words, "trainer.output_dir=run", env={**secrets, "WANDB_NOTES": "a note"})
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    (session,) = wandb_file.sessions(run)
    about, metrics = session.run, json.loads((run / "metrics.json").read_text())
    assert (about.project, about.entity, about.run_group, about.job_type) == ("proj", "team", "mine", "train")
    assert (about.display_name, [*about.tags], about.notes) == ("first", ["a", "b"], "a note")
    assert about.run_id == (run / "wandb/run_id.txt").read_text()
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert {name: session.config[name] for name in config} == config
    commit = json.loads((run / "provenance.json").read_text())["git"]["commit"]
    assert session.config["provenance"]["git"]["commit"] == commit
    assert logged(session) == rows(run) and len(rows(run)) == 5
    assert metrics and metrics.items() <= session.summary.items()
    assert session.summary["pictures/loss/_type"] == "image-file"
    table = json.loads((run / f"wandb/latest-run/files/{session.summary['predictions/path']}").read_text())
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert table["columns"] == ["index", "prompt", "label", "reference", "predict"]
    assert table["data"] == [[answer[name] for name in table["columns"]] for answer in answers] and len(answers) == 3
    (weights,) = [artifact for artifact in session.artifacts if artifact.type == "model"]
    files = {Path(entry.path).name: tmp_path / entry.local_path for entry in weights.manifest.contents}
    assert files["adapter_model.safetensors"].samefile(run / "adapter/adapter_model.safetensors")
    assert session.exit_code == 0
    assert KEY.encode() not in bytes_of(run)
    path = next(run.glob("wandb/offline-run-*")).relative_to(tmp_path)
    assert "wandb:" not in done.stdout + done.stderr
    assert f"W&B: offline; upload it with `wandb sync {path}`" in done.stdout


def test_a_tracker_that_is_not_used_is_not_imported_whatever_the_environment_says(
    glmtuner_process: Callable, tmp_path: Path
) -> None:
    """Of every tracker that transformers integrates there is a package that says so when it is imported."""
    names = [
        "comet_ml",
        "mlflow",
        "neptune",
        "trackio",
        "swanlab",
        "codecarbon",
        "clearml",
        "dvclive",
        "tensorboardX",
        "azureml",
    ]
    names += [
        "flytekit",
        "ray",
        "sigopt",
        "aim",
        "dagshub",
        "wandb",
        "tensorboard",
        "optuna",
    ]  # also in place of real ones
    site = tmp_path / "site"
    for name in names:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(f"print('imported: {name}')\n__version__ = '99.0'\n")
        about = site / f"{name}-99.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    env = {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": KEY,
        "WANDB_PROJECT": "p",
    }
    env |= {
        "COMET_API_KEY": KEY,
        "MLFLOW_TRACKING_URI": "file:mlruns",
        "NEPTUNE_API_TOKEN": KEY,
        "NEPTUNE_PROJECT": "p",
    }
    env |= {"CLEARML_PROJECT": "p", "SWANLAB_MODE": "local", "TRACKIO_PROJECT": "p", "COMET_MODE": "ONLINE"}
    done = glmtuner_process(*TINY, *SCORED, "tracker=none", "trainer.output_dir=run", env=env)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "imported:" not in shown and "[INFO]" not in shown and "wandb" not in shown.lower()
    assert {path.name for path in tmp_path.iterdir()} == {"site", "run"}


def on_a_terminal(words: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of the command line in a child that has a terminal, where W&B could ask."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "glmtuner", *words]
    child = subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux' end of a terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return child.wait(timeout=600), shown.decode(errors="replace")


def test_without_a_login_nothing_is_asked(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "WANDB_PROJECT": "theirs", "COLUMNS": "160", "PYTHONPATH": str(ROOT)}
    words = ["trainer=evaluate", *TINY[:4], "trainer.disable_tqdm=true", "trainer.output_dir=run"]
    code, shown = on_a_terminal(words, tmp_path, env)
    assert code == 0 and "upload it with `wandb sync run/wandb/offline-run-" in shown, shown
    (session,) = wandb_file.sessions(tmp_path / "run")
    assert (session.run.project, session.run.job_type, session.run.run_group) == ("theirs", "evaluate", "")


def test_wandb_mode_disabled_writes_nothing(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = glmtuner("trainer=evaluate", *TINY[:4], "trainer.disable_tqdm=true", "trainer.output_dir=run")
    assert done.returncode == 0 and "W&B" not in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "run/wandb").iterdir()] == ["run_id.txt"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server of this test alone, and the login for it."""
    with WandbServer(refused="f" * 40) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.shutdown()


def test_a_refused_key_and_a_dead_server_cost_seconds_and_no_run(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    words = ["trainer=evaluate", *TINY[:4], "trainer.disable_tqdm=true"]
    dead = "http://127.0.0.1:9"
    for name, url, key in (("refused", server.url, "f" * 40), ("dead", dead, KEY), ("short", server.url, "k")):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", key)
        done = glmtuner(*words, f"trainer.output_dir={name}")
        assert done.returncode == 0, done.stderr
        assert "login to W&B failed (" in done.stdout and "written offline" in done.stdout
        assert f"upload it with `wandb sync {name}/wandb/offline-run-" in done.stdout
        assert KEY.encode() not in bytes_of(tmp_path / name) and b"f" * 40 not in bytes_of(tmp_path / name)
    assert server.run is None


def test_a_server_that_takes_the_login_and_not_the_run(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    answer = server.answer
    monkeypatch.setattr(
        server, "answer", lambda query, given: None if "UpsertBucket" in query else answer(query, given)
    )
    done = glmtuner("trainer=evaluate", *TINY[:4], "trainer.disable_tqdm=true", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    assert "W&B refuses this run (" in done.stdout and "`wandb sync run/wandb/offline-run-" in done.stdout
    (session,) = wandb_file.sessions(tmp_path / "run")
    assert session.exit_code == 0 and not list((tmp_path / "run/wandb").glob("run-2*"))


def test_online_a_stopped_run_goes_on_where_the_server_has_it(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    words = [*TINY, "trainer.output_dir=run"]
    stop_after_step_three(monkeypatch)
    assert glmtuner(*words).returncode == 143
    assert any(end.get("preempting") for end in server.ends) and server.ends[-1]["exitcode"] == 1
    assert [row["train/global_step"] for row in server.rows] == [1, 2, 3]
    (tmp_path / "run/checkpoints/checkpoint-3/complete.json").unlink()
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"W&B: {server.url}/team/glmtuner/runs/{server.run['name']}\n") == 2  # first and last
    assert server.run["name"] == (tmp_path / "run/wandb/run_id.txt").read_text()
    assert received(server) == rows(tmp_path / "run") and len(server.rows) == 4
    assert json.loads((tmp_path / "run/metrics.json").read_text()).items() <= server.summary.items()
    assert server.ends[-1] == {"complete": True, "exitcode": 0}
    assert KEY.encode() not in bytes_of(tmp_path / "run")


def test_a_stopped_run_stays_one_run_with_each_line_once(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, "trainer.output_dir=run"]
    stop_after_step_three(monkeypatch)
    assert glmtuner(*words).returncode == 143
    run = tmp_path / "run"
    (first,) = wandb_file.sessions(run)
    assert (
        first.preempting and first.exit_code == 1 and [row["train/global_step"] for row in logged(first)] == [1, 2, 3]
    )
    (run / "checkpoints/checkpoint-3/complete.json").unlink()
    done = glmtuner(*words, "tracker.tags=again")
    assert done.returncode == 0 and "resumed from checkpoint-2" in done.stdout, done.stderr
    (second,) = wandb_file.sessions(run)  # nothing was sent, and the last session holds everything
    assert second.run.run_id == first.run.run_id and logged(second) == rows(run) and len(rows(run)) == 4
    assert second.exit_code == 0


def test_a_run_that_began_offline_is_whole_online(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    words = [*TINY, "trainer.output_dir=run"]
    stop_after_step_three(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert glmtuner(*words).returncode == 143 and server.run is None
    monkeypatch.delenv("WANDB_MODE")
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    assert received(server) == rows(tmp_path / "run") and len(server.rows) == 4
    assert not list(tmp_path.glob("run/wandb/offline-run-*"))


def test_a_server_that_goes_away_holds_up_the_end_for_a_while_only(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    finish = Wandb.finish

    def gone(self, folder, metrics):
        server.gone = True
        return finish(self, folder, metrics)

    monkeypatch.setattr(Wandb, "finish", gone)
    done = glmtuner("trainer=evaluate", *TINY[:4], "trainer.disable_tqdm=true", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    assert "did not finish in time" in done.stdout and "`wandb sync --include-online run/wandb/run-" in done.stdout
    assert (tmp_path / "run/metrics.json").is_file()


def test_what_was_synced_is_not_sent_again(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    def sync() -> None:
        paths = [path for path in sorted(run.glob("wandb/offline-run-*")) if not list(path.glob("*.synced"))]
        command = ["wandb", "sync", *map(str, paths)]
        env = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        subprocess.run([sys.executable, "-m", *command], env=env, check=True, capture_output=True, timeout=600)

    monkeypatch.setenv("WANDB_MODE", "offline")
    words, run = [*TINY, "trainer.output_dir=run"], tmp_path / "run"
    stop_after_step_three(monkeypatch)
    assert glmtuner(*words).returncode == 143
    sync()
    assert [row["train/global_step"] for row in server.rows] == [1, 2, 3]
    (run / "checkpoints/checkpoint-3/complete.json").unlink()
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    first, second = wandb_file.sessions(run)
    assert first.run.run_id == second.run.run_id and logged(first) + logged(second) == rows(run)
    last = sorted(run.glob("wandb/offline-run-*"))[-1].relative_to(tmp_path)
    assert f"`wandb sync {last}`" in done.stdout
    sync()
    assert received(server) == rows(run) and len(server.rows) == 4


def test_the_runs_of_a_sweep_share_a_group_and_are_named_by_their_overrides(glmtuner: Callable, tmp_path: Path) -> None:
    words = [word for word in TINY if "save_steps" not in word]
    words += ["finetuning=lora,freeze", "trainer.seed=3", f"trainer.hub_token=hf_{KEY}", "name=methods"]
    done = glmtuner("-m", *words)
    assert done.returncode == 0, done.stderr
    found = [
        session for job in (tmp_path / "outputs/sweeps/methods").glob("*/") for session in wandb_file.sessions(job)
    ]
    assert {session.run.run_group for session in found} == {"methods"}
    assert sorted(session.run.display_name for session in found) == ["finetuning-freeze", "finetuning-lora"]
    assert len({session.run.run_id for session in found}) == 2
    assert KEY.encode() not in bytes_of(tmp_path / "outputs")


def test_tensorboard_has_each_point_once(glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*TINY, *SCORED[:2], "tracker=tensorboard", "trainer.output_dir=run"]
    stop_after_step_three(monkeypatch)
    assert glmtuner(*words).returncode == 143
    (tmp_path / "run/checkpoints/checkpoint-3/complete.json").unlink()
    done = glmtuner(*words)
    assert done.returncode == 0 and "TensorBoard: tensorboard --logdir run/tensorboard" in done.stdout, done.stderr
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    expected = {}
    for row in rows(tmp_path / "run"):
        step = row.pop("train/global_step")
        for name, value in row.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    expected |= {name: [(0, pytest.approx(value, rel=1e-6))] for name, value in metrics.items()}
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {step for step, _ in found.pop(TIMING)} <= {1, 2, 3, 4}
    assert found == expected
    (config,) = events.Tensors("config/text_summary")
    assert "lora_rank: 8" in config.tensor_proto.string_val[0].decode()
