"""MLflow's own server on loopback: a run, a killed and a resumed one, and a server that is not or no longer there."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import stored
from test_clients import TINY, check_numbers, env_of
from warm_server import WarmServer


class MlflowServer:
    """`mlflow server` with a database in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")],
            cwd=folder, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 300
        while time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        raise TimeoutError((folder / "server.log").read_text())

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    started = MlflowServer(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


def test_a_run_and_one_that_is_killed_and_resumed_are_on_the_server(
    server: WarmServer, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    words = [word for word in TINY if "max_steps" not in word]
    words += [
        "trainer.max_steps=40",
        "tracker=mlflow",
        f"tracker.tracking_uri={mlflow_server.uri}",
        "trainer.output_dir=run",
    ]
    words += ["tracker.log_artifact=true", "model.plot_loss=true"]
    run = tmp_path / "run"
    killed = server.run(
        *words,
        cwd=tmp_path,
        env=env_of(tmp_path),
        kill_when=str(run / "checkpoints/checkpoint-10/complete.json"),
        kill_after=0.1,
    )
    assert killed.code == -signal.SIGKILL, killed.output
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert done.code == 0 and done.output.count(f"MLflow: {mlflow_server.uri}/#/experiments/") == 2, done.output
    found = stored.mlflow(run, mlflow_server.uri)
    check_numbers(found, run, "mlflow")
    assert found.state == "finished" and len(found.values["train/loss"]) == 40
    assert found.weights["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert found.pictures == {"pictures/loss"}


def test_without_a_server_the_run_is_in_its_folder_and_a_resumed_one_is_whole_on_the_server(
    server: WarmServer, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    words = [*TINY, "tracker=mlflow", "trainer.output_dir=run"]
    env = env_of(tmp_path) | {"MLFLOW_TRACKING_URI": "http://user:hunter2-pass@127.0.0.1:9"}
    killed = server.run(
        *words,
        cwd=tmp_path,
        env=env,
        kill_when=str(tmp_path / "run/checkpoints/checkpoint-2/complete.json"),
        kill_after=0.0,
    )
    assert killed.code == -signal.SIGKILL, killed.output
    done = server.run(*words, cwd=tmp_path, env=env)
    assert done.code == 0 and "does not answer (" in done.output, done.output
    assert "hunter2" not in done.output and "run/mlflow/mlflow.db" in done.output
    check_numbers(stored.mlflow(tmp_path / "run"), tmp_path / "run", "mlflow")
    assert not any(b"hunter2" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    words[-1] = "trainer.output_dir=other"
    other = tmp_path / "other"
    killed = server.run(
        *words, cwd=tmp_path, env=env, kill_when=str(other / "checkpoints/checkpoint-2/complete.json"), kill_after=0.0
    )
    done = server.run(*words, cwd=tmp_path, env=env | {"MLFLOW_TRACKING_URI": mlflow_server.uri})
    assert done.code == 0, done.output
    check_numbers(stored.mlflow(other, mlflow_server.uri), other, "mlflow")


def test_a_server_that_goes_away_ends_the_tracking_and_not_the_run(server: WarmServer, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    own = MlflowServer(tmp_path / "server")
    (tmp_path / "gone.py").write_text(
        "import os, signal\n"
        "from glmtuner.trackers.mlflow import Mlflow\n"
        "log = Mlflow.log\n"
        "def gone(self, line):\n"
        f"    if line['step'] == 2 and os.path.exists('/proc/{own.process.pid}'):\n"
        f"        os.killpg({own.process.pid}, signal.SIGKILL)\n"
        "    log(self, line)\n"
        "Mlflow.log = gone\n"
    )
    try:
        words = [*TINY, "plugins=[gone]", "tracker=mlflow", f"tracker.tracking_uri={own.uri}", "trainer.output_dir=run"]
        env = env_of(tmp_path) | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
        done = server.run(*words, cwd=tmp_path, env=env)
        assert done.code == 0 and done.output.count("MLflow failed (") == 1, done.output
        assert "the run continues without it" in done.output and (tmp_path / "run/metrics.json").is_file()
        assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) >= 6
    finally:
        own.close()


def test_a_file_store_takes_a_run_where_mlflow_allows_it(server: WarmServer, tmp_path: Path) -> None:
    words = [*TINY, "tracker=mlflow", f"tracker.tracking_uri=file:{tmp_path}/runs", "trainer.output_dir=run"]
    refused = server.run(*words, cwd=tmp_path, env=env_of(tmp_path))
    assert refused.code == 0 and "MLFLOW_ALLOW_FILE_STORE" in refused.output, refused.output
    words[-1] = "trainer.output_dir=other"
    done = server.run(*words, cwd=tmp_path, env=env_of(tmp_path) | {"MLFLOW_ALLOW_FILE_STORE": "true"})
    assert done.code == 0, done.output
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    check_numbers(stored.mlflow(tmp_path / "other"), tmp_path / "other", "mlflow")
