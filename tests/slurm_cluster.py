"""What the tests on a real SLURM share: the sweep's words, the command line, and looks at its jobs."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from glmtuner.run_folder.folder import job_folders

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample,alpaca_zh_sample", "data.max_samples=40",
    "data.max_target_length=48", "trainer.max_steps=60", "trainer.logging_steps=5", "trainer.save_steps=20",
    "trainer.seed=1,2", "trainer.learning_rate=1e-3", "trainer.disable_tqdm=true", "objective=train_loss",
]  # fmt: skip
DETACHED = [
    "hydra/launcher=slurm", "hydra.launcher.array_parallelism=2", "hydra.launcher.cpus_per_task=1", "hydra.launcher.wait=false",
]  # fmt: skip
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def glmtuner(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glmtuner", *words], cwd=here, env=ENV, capture_output=True, text=True, timeout=1500
    )


def submit(here: Path, *words: str) -> tuple[str, list[str]]:
    """What the command says that submits a detached sweep, and SLURM's ids of its jobs."""
    done = glmtuner(here, "-m", *DETACHED, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, re.findall(r"job \d+ is SLURM job (\S+?):? ", done.stdout)


def wait(condition: Callable[[], T], seconds: float = 600) -> T:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def state_of(job: str) -> str:
    """SLURM's state of the job; empty once it has left the queue."""
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()


def hurry(job: str) -> None:
    """SLURM lets a job that was put back wait two minutes; these are not waited for.

    But some seconds are: SLURM revokes the credential of a job that begins again in the moment in which it is put back.
    """
    wait(lambda: state_of(job) == "PENDING")
    time.sleep(5)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def lines(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def job_processes() -> dict[int, set[str]]:
    """The processes of submitit that run jobs of this SLURM, which may be one of several, with their environment variables."""
    listed = subprocess.run(["pgrep", "-f", "python.* -m submitit.core._submit"], capture_output=True, text=True)
    found, own = {}, os.environ.get("SLURM_CONF")
    for pid in listed.stdout.split():
        try:
            if not Path(f"/proc/{pid}/comm").read_text().startswith("python"):
                continue
            environment = {*Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")}
        except OSError:
            continue
        if own is None or f"SLURM_CONF={own}" in environment:
            found[int(pid)] = environment
    return found


def processes_of(job: str) -> list[int]:
    """The processes of submitit that run this SLURM job."""
    array, _, task = job.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={array}"}
    return [pid for pid, environment in job_processes().items() if wanted <= environment]


def folders(sweep: Path) -> list[Path]:
    return [folder.path for folder in job_folders(sweep)]
