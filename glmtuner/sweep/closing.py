"""What a job of a detached sweep does last, in its batch script: `python -m glmtuner.sweep.closing SWEEP`.

It runs after the job's own process has ended, however that ended: it puts a job that died back into SLURM's queue, unless the job
dies at the same step again and again, and the last job of the sweep writes the report.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.config.compose import compose
from glmtuner.console import complain, say
from glmtuner.errors import ConfigError, GlmtunerError
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.folder import RunFolder
from glmtuner.sweep.attempts import INTERRUPTED, read_attempts, record_death
from glmtuner.sweep.multirun import write_and_publish
from glmtuner.sweep.placeholders import reveal
from glmtuner.sweep.queue import RUNNING, in_queue, own_job_id
from glmtuner.sweep.status import Line, is_over
from glmtuner.sweep.submissions import FOLDER, Submission, read_submissions

if TYPE_CHECKING:
    from glmtuner.config.schema import Tracker

RECORDED_SECONDS = 60.0  # that the command may take from sbatch's answer until the job's id is in the sweep's folder


def report_at_the_end(path: Path, lines: Sequence[Line]) -> None:
    """Write the report of a detached sweep whose last job could not: it was cancelled, or killed with its batch script."""
    if is_over(lines) and any(each.detached for each in read_submissions(path).values()):
        report_if_last(path)


def main(arguments: list[str]) -> int:
    """Close the SLURM job that this process is in; returns the exit code, which SLURM takes for the job's: 1 if that has failed."""
    root, job_id = Path(arguments[0]), own_job_id()
    try:
        if (name := name_of(root, job_id)) is None:
            complain(
                f"glmtuner: {root} does not say which of its jobs SLURM job {job_id} is; nothing is done at its end"
            )
            return 1
        if ends(root, name, job_id):
            report_if_last(root, name)
            return 0 if RunFolder(root / name).is_finished else 1
    except GlmtunerError as error:
        complain(f"glmtuner: {error}")
        return 2
    return 0


def name_of(root: Path, job_id: str) -> str | None:
    """The name of the folder of the job that SLURM runs under this id; None if the sweep's folder does not say so in time."""
    until = time.monotonic() + RECORDED_SECONDS
    while True:
        for name, submission in read_submissions(root).items():
            if submission.id == job_id:
                return name
        if time.monotonic() > until:
            return None
        time.sleep(1.0)


def ends(root: Path, name: str, job_id: str) -> bool:
    """Whether the job has ended; False if it goes on, put back into the queue here or before, or is being cancelled."""
    known = read_attempts(root, name)
    queued = in_queue([job_id])
    runs = queued is None or (job_id in queued and queued[job_id].state == RUNNING)  # the batch script itself
    if known is not None and known.id == job_id and known.has_ended:
        return True
    if known is not None and known.id == job_id and known.ended == INTERRUPTED:
        return False
    if not runs:
        return False
    died = record_death(root, name, job_id)
    if died.stopped is None:
        say(f"{root / name}: the job died without a result, and goes back into the queue")
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return False
        reason = (
            f"the job died, and SLURM did not put it back into the queue ({done.stderr.strip()}); type the same command"
        )
    else:
        reason = died.stopped
    say(f"{root / name}: {reason}")
    RunFolder(root / name).record_failure(ConfigError(reason), read_submissions(root)[name].overrides)
    return True


def report_if_last(root: Path, name: str | None = None) -> bool:
    """Write the sweep's report if no job is left but `name`, which has ended, and no other process does; whether it was written."""
    submissions = read_submissions(root)
    if not submissions or still_coming(root, submissions, besides=name):
        return False
    if not claim(root, submissions):
        return False
    write_and_publish(root, lambda: tracker_of(submissions))
    return True


def still_coming(root: Path, submissions: dict[str, Submission], besides: str | None) -> list[str]:
    """The jobs that have not ended, as far as the sweep's folder and the queue know."""
    queued = in_queue(each.id for each in submissions.values())
    coming = []
    for name, submission in submissions.items():
        attempts = read_attempts(root, name)
        if name == besides or (attempts is not None and attempts.id == submission.id and attempts.has_ended):
            continue
        if queued is None or submission.id in queued:
            coming.append(name)
    return coming


def claim(root: Path, submissions: dict[str, Submission]) -> bool:
    """Whether this process is the first that asks to write the report of what these jobs have done."""
    attempts = {name: read_attempts(root, name) for name in sorted(submissions)}
    done = [[name, each.id, each.starts, len(each.deaths)] if each else [name] for name, each in attempts.items()]
    key = hashlib.sha256(json.dumps([done, sorted(each.id for each in submissions.values())]).encode()).hexdigest()[:16]
    (root / FOLDER).mkdir(exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(root / FOLDER / f"report-{key}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return True
    return False


def tracker_of(submissions: dict[str, Submission]) -> "Tracker":
    """The tracker of the sweep's first job."""
    register_presets()
    first = next(iter(submissions.values()))
    overrides = [reveal(each) for each in first.overrides if not each.startswith(("hydra", "trainer.output_dir="))]
    return compose(overrides, config_dir=first.config_dir).run.tracker


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
