"""Thirty typed secrets and every byte of the folders of a sweep and of W&B, while it runs and after SIGKILL.

ATTACK_SECRET_KILLS is the number of moments at which the sweep of each launcher is killed (2).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typed_secrets import leaks, typed_overrides

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("ATTACK_SECRET_KILLS", "2"))
WORDS = [
    "-m", "model=tiny_glm", "tracker=wandb", "data.dataset=belle_sample", "data.max_samples=16", "trainer.max_steps=30",
    "trainer.save_steps=5", "trainer.logging_steps=1", "trainer.disable_tqdm=true", "trainer.seed=1,2", "name=s",
]  # fmt: skip
SEARCH = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=2",
    "objective=train_loss",
    "trainer.learning_rate=interval(1e-5, 1e-3)",
]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "search": [*SEARCH, "hydra.sweeper.storage='sqlite:///searches.db?password=typed-db-22'"],
}


@pytest.fixture(params=LAUNCHERS)
def command(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], list[str]]:
    overrides, secrets = typed_overrides()
    words = [*WORDS, *overrides, *LAUNCHERS[request.param]]
    if request.param == "search":
        words.remove("trainer.seed=1,2")
        secrets.append("typed-db-22")
    assert len(secrets) >= 30
    return words, secrets


def start(words: list[str], here: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(here / "wandb_dir"),
        "GLMTUNER_CACHE": str(here / "cache"), "TMPDIR": str(here / "tmp"),
    }  # fmt: skip
    (here / "tmp").mkdir(exist_ok=True)
    with (here / "sweep.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "glmtuner", *words],
            cwd=here,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def watch(process: subprocess.Popen[bytes], here: Path, secrets: list[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        assert leaks(here, secrets) == {}
        time.sleep(0.1)


def test_no_byte_of_a_secret_is_written(command: tuple[list[str], list[str]], tmp_path: Path) -> None:
    words, secrets = command
    for moment in range(KILLS):
        process = start(words, tmp_path)
        watch(process, tmp_path, secrets, seconds=4 + 5 * moment)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert leaks(tmp_path, secrets) == {}
    process = start(words, tmp_path)
    watch(process, tmp_path, secrets, seconds=500)
    assert process.wait() == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    assert leaks(tmp_path, secrets) == {}
    assert len(list((tmp_path / "outputs/sweeps/s").glob("*/metrics.json"))) == 2
    assert list((tmp_path / "outputs/sweeps/s").glob("*/wandb/offline-run-*/*.wandb"))
