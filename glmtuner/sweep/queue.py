"""SLURM's queue, as squeue shows it."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

RUNNING = "RUNNING"
FORMAT = "%i|%T|%r"  # id, state, and the reason why it is pending


@dataclass(frozen=True)
class Queued:
    """A job in the queue: SLURM's word for its state, such as PENDING or RUNNING, and why it is pending."""

    state: str
    reason: str


def in_queue(ids: Iterable[str]) -> dict[str, Queued] | None:
    """Those of the jobs that are pending, running or requeued, by id (`12`, of an array `12_0`); None if SLURM did not answer."""
    wanted = set(ids)
    if not wanted:
        return {}
    arrays = sorted({each.partition("_")[0] for each in wanted})
    command = ["squeue", "--noheader", "--array", f"--format={FORMAT}", "--jobs", ",".join(arrays)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # what squeue says once all of them have left
        return None
    lines = [line.strip().split("|", 2) for line in done.stdout.splitlines() if line.count("|") == 2]
    return {number: Queued(state, reason) for number, state, reason in lines if number in wanted}


def own_job_id() -> str:
    """The id of the SLURM job that this process is in, as `in_queue` writes it; empty outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
