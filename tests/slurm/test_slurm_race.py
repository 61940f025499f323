"""A race on a real SLURM: its command killed, a job put back, and the decisions of one undisturbed process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmtuner.run_folder.folder import job_folders

ROOT = Path(__file__).parent.parent.parent
RACE = [
    "-m", "hydra/sweeper=race", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=60",
    "data.dev_ratio=0.4", "data.max_target_length=32", "trainer.do_eval=true", "trainer.max_steps=60", "trainer.logging_steps=5",
    "trainer.save_steps=5", "trainer.disable_tqdm=true", "hydra.sweeper.rungs=[4,30]", "trainer.learning_rate=1e-2,1e-6,1e-7",
]  # fmt: skip
SLURM = ["hydra/launcher=slurm", "hydra.launcher.array_parallelism=1", "hydra.launcher.cpus_per_task=1"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no SLURM answers: {done.stderr}; type make test-slurm"


def start(here: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "glmtuner", *RACE, *words]
    return subprocess.Popen(command, cwd=here, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(condition: Callable[[], Any], seconds: float = 300) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def queued(state: str) -> list[str]:
    """The ids of the jobs in that state."""
    command = ["squeue", "--noheader", "--array", "--format=%i", "--states", state]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def decisions(sweep: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((sweep / "race").glob("rung-*.json"))]


def test_a_race_that_is_killed_and_put_back_decides_as_one_that_is_left_alone(tmp_path: Path) -> None:
    said, _ = (alone := start(tmp_path, "name=alone")).communicate(timeout=900)
    assert alone.returncode == 0, said
    whole, sweep = (tmp_path / "outputs/sweeps" / name for name in ("alone", "slurm"))

    driver = start(tmp_path, "name=slurm", *SLURM)
    wait(lambda: list(sweep.glob("*/config.yaml")))
    driver.kill()  # SLURM goes on with the jobs of the first rung
    driver.communicate()
    wait(lambda: not queued("running,pending,completing,suspended"))
    assert len(list(sweep.glob("*/pauses/4/pause.json"))) == 3 and decisions(sweep) == []

    again = start(tmp_path, "name=slurm", *SLURM)
    wait(lambda: list(sweep.glob("*/checkpoints/checkpoint-10")))  # on the way to the second rung
    (job,) = wait(lambda: queued("running"))
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait(lambda: job in queued("pending"))
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    said, _ = again.communicate(timeout=900)
    assert again.returncode == 0, said
    assert "rung 2 of 2, after step 30: loss on 24 records" in said

    assert decisions(sweep) == decisions(whole) and len(decisions(whole)) == 2
    (winner,) = [folder.path.name for folder in job_folders(whole) if folder.is_finished]
    for name in ("history.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors"):
        assert (sweep / winner / name).read_bytes() == (whole / winner / name).read_bytes(), name
