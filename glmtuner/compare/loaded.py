"""A run as it is compared: its folder, its flat configuration, its provenance, its history and its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from glmtuner.console import plain
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import Job, State, read_job
from glmtuner.report.ranking import Row, build_row
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import SWEEP

EXAMPLES = "outputs/<date>/<run>, or a job's folder in outputs/sweeps/<sweep>"


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run, in whatever state, whose files can be read."""

    folder: RunFolder
    label: str
    config: DictConfig
    provenance: dict[str, Any]
    job: Job
    cwd: Path | None  # that its relative paths are relative to; None where it is not recorded, or gone

    @property
    def values(self) -> dict[str, Any]:
        """The resolved configuration by dotted keys."""
        return self.job.values

    @property
    def metrics(self) -> dict[str, float]:
        return self.job.metrics

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.job.history

    @property
    def is_finished(self) -> bool:
        return self.job.state is State.finished

    @cached_property
    def row(self) -> Row:
        """The run's scores with those of each record."""
        return build_row([self.job], [], self.notes)

    @cached_property
    def notes(self) -> list[str]:
        """What `row` had to say; complete once that was asked for."""
        return []


def load_run(path: Path, label: str = "") -> LoadedRun:
    """The run in the folder; raises CheckpointError if it holds none, or if a file that says what it is is damaged."""
    folder = RunFolder(path)
    config, provenance = folder.config(), folder.provenance()
    job = read_job(folder)
    if job is None:
        raise CheckpointError(f"{path} was removed while it was read")
    if not job.values:  # a damaged file
        raise CheckpointError(f"{path} cannot be compared: {job.reason}; restore the file, or name another run")
    cwd = Path(provenance["cwd"]) if "cwd" in provenance else None
    return LoadedRun(folder, label or path.name, config, provenance, job, cwd if cwd and cwd.is_dir() else None)


def kind_of(path: Path, verb: str) -> str:
    """`run` or `sweep`, whichever the folder is; raises CheckpointError if it is neither."""
    folder = RunFolder(path)
    if folder.is_run:
        return "run"
    if path.is_dir() and ((path / SWEEP).is_file() or job_folders(path)):
        return "sweep"
    failure = folder.failure() if path.is_dir() else None
    problem = (
        f"the run failed before it started: {failure['reason']}" if failure
        else "it holds neither a run (it has no config.yaml) nor a sweep" if path.is_dir()
        else "it is a file, and a run is a folder" if path.exists()
        else "no such folder"
    )  # fmt: skip
    raise CheckpointError(f"{verb} {path}: {problem}; name {EXAMPLES}")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name of each folder: its own, as much of its path as differs from the others', or a letter behind it."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, 4):
        names = ["/".join(each[-count:]) for each in parts]
        if len({*names}) == len(names):
            return [plain(name) for name in names]
    return [f"{plain(path.name)} ({number})" for number, path in enumerate(paths, start=1)]


def describe(run: LoadedRun) -> str:
    """The state of a run in a few words, its reason or its progress behind it."""
    return f"{run.job.state.value}{f': {run.job.reason}' if run.job.reason else ''}"
