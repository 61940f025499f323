"""Which SLURM job runs which job of a sweep: `.slurm/jobs.json` of the sweep's folder."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.run_folder.locks import LocksUnsupported, try_lock

FOLDER, JOBS, LOCK = ".slurm", "jobs.json", "submit.lock"


@dataclass(frozen=True)
class Submission:
    """A job of the sweep as it was last submitted: SLURM's id, when, and its overrides, with placeholders for secrets."""

    id: str
    submitted: str
    overrides: list[str]
    config_dir: str | None = None
    detached: bool = False


def read_submissions(root: Path) -> dict[str, Submission]:
    """The submissions by the name of the job's folder; empty for a sweep without any. Raises CheckpointError if damaged."""
    path = root / FOLDER / JOBS
    if not os.path.lexists(path):
        return {}
    try:
        return {str(name): Submission(**entry) for name, entry in read_object(path).items()}
    except TypeError:
        raise CheckpointError(
            f"{path} is damaged (it is not a list of SLURM's jobs); remove it once squeue shows none of this sweep's jobs"
        ) from None


def add_submissions(root: Path, added: Mapping[str, Submission]) -> None:
    """Record that these jobs were submitted, in the place of earlier submissions of the same jobs."""
    known = {**read_submissions(root), **added}
    write_json(root / FOLDER / JOBS, {name: asdict(submission) for name, submission in known.items()})


@contextmanager
def submitting(root: Path) -> Iterator[None]:
    """A context in which this process alone submits jobs of the sweep; raises ConfigError if another one does."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        lock = try_lock(root / FOLDER / LOCK)
    except LocksUnsupported:
        yield
        return
    if lock is None:
        raise ConfigError(
            f"{root}: another command is submitting jobs of this sweep; wait until it has, and type it again"
        )
    with lock:
        yield
