"""How often SLURM has started a job, and where it died: `.slurm/attempts/<job>.json` of the sweep's folder.

A job dies if its process ends without saying how: it was killed, its node failed, the memory of the node was used up. What
raises an error has not died; the error is in its failed.json, and it is not started again by itself.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, step_of
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.sweep.submissions import FOLDER

MOST_DEATHS = 2  # at one step: a third attempt would end there, too
DONE, INTERRUPTED = "done", "interrupted"  # how an attempt ended; interrupted: by a signal, with a checkpoint


@dataclass(frozen=True)
class Attempts:
    """The attempts of one SLURM job at a job of the sweep.

    `deaths` has the step from which each attempt that died could be resumed; `ended` is how the last attempt ended, None while
    it runs or if it died; `stopped` is why the job is not started again.
    """

    id: str
    starts: int = 0
    ended: str | None = None
    deaths: list[int] = field(default_factory=list)
    stopped: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of this SLURM job."""
        return self.ended == DONE or self.stopped is not None


def attempts_file(root: Path, name: str) -> Path:
    return root / FOLDER / "attempts" / f"{name}.json"


def read_attempts(root: Path, name: str) -> Attempts | None:
    """The attempts at the job in the folder `name`; None if SLURM has not started it. Raises CheckpointError if damaged."""
    path = attempts_file(root, name)
    if not os.path.lexists(path):
        return None
    try:
        return Attempts(**read_object(path))
    except TypeError:
        raise CheckpointError(f"{path} is damaged (it does not hold attempts); remove it") from None


def begin_attempt(root: Path, name: str, job_id: str) -> Attempts:
    """Record that SLURM job `job_id` starts the job; with `stopped` set in what is returned, it must not."""
    known = read_attempts(root, name)
    if known is not None and known.stopped is not None:
        return known
    if known is None or known.id != job_id:
        known = Attempts(job_id)
    elif known.starts and known.ended is None:
        known = after_death(root, name, known)
    if known.stopped is None:
        known = replace(known, starts=known.starts + 1, ended=None)
    return _written(root, name, known)


def end_attempt(root: Path, name: str, how: str) -> None:
    """Record that the attempt has ended: `DONE` or `INTERRUPTED`."""
    known = read_attempts(root, name)
    if known is not None:
        _written(root, name, replace(known, ended=how))


def record_death(root: Path, name: str, job_id: str) -> Attempts:
    """Record that the attempt died, also one that died before it had begun; with `stopped` set, it must not be repeated."""
    known = read_attempts(root, name)
    if known is None or (known.id != job_id and known.stopped is None):
        known = Attempts(job_id)
    died = after_death(root, name, known)
    return _written(root, name, died if died.stopped else replace(died, ended=INTERRUPTED))


def after_death(root: Path, name: str, known: Attempts) -> Attempts:
    """The attempts after the last one has died at the step of its latest checkpoint."""
    checkpoint, _ = latest_complete_checkpoint(root / name)
    step = step_of(checkpoint) if checkpoint else 0
    deaths = [*known.deaths, step]
    if deaths.count(step) < MOST_DEATHS:
        return replace(known, deaths=deaths)
    return replace(
        known,
        deaths=deaths,
        stopped=(
            f"SLURM job {known.id} has died {deaths.count(step)} times without a checkpoint after step {step} (it was killed, the "
            "memory of its node was used up, or the node failed), and is not started again; its output is in "
            f"{root / '.submitit' / known.id}; to start it anyway, remove {attempts_file(root, name)} and type the same command"
        ),
    )


def _written(root: Path, name: str, attempts: Attempts) -> Attempts:
    write_json(attempts_file(root, name), asdict(attempts))
    return attempts
