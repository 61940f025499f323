"""What the small files of one run say, each read again only when it changed."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from glmtuner.board.histories import Columns, last_values
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import Job, State, damaged_job, read_overrides, state_of
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import (
    CONFIG,
    FAILED,
    HISTORY,
    LOSSES,
    METRICS,
    OUTPUT,
    OVERRIDES,
    PREDICTIONS,
    PROGRESS,
    PROVENANCE,
    PRUNED,
    TIMINGS,
)
from glmtuner.run_folder.saved_config import read_values

SMALL = (CONFIG, OVERRIDES, PROVENANCE, METRICS, FAILED, PROGRESS, PRUNED)
APPENDED = (HISTORY, TIMINGS, OUTPUT, PREDICTIONS, LOSSES)  # of which the size and the time are enough
OFTEN, SELDOM = 2.0, 60.0  # seconds: a folder that changed lately is looked into again; any other one, this often

Signature = tuple[int, int, int]  # inode, size, time of the last change


@dataclass
class Record:
    """One run of the board, as its folder was when it was last looked at."""

    id: str
    path: Path
    root: Path  # of the board; files that are links to somewhere outside are not read
    sweep: str | None = None  # the id of the sweep that it is a job of
    files: dict[str, Signature] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    started: float | None = None
    last: dict[str, float] = field(default_factory=dict)  # of its history
    last_timing: dict[str, float] = field(default_factory=dict)
    job: Job | None = None
    is_gone: bool = False
    config_version: int = 0  # counts the changes of what decides the knobs of its sweep
    _folder_time: int = -1
    _looked: float = 0.0
    _problems: dict[str, Exception] = field(default_factory=dict)
    _history: Columns | None = None
    _timings: Columns | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def updated(self) -> float | None:
        """When it last wrote something."""
        return max((time for _, _, time in self.files.values()), default=0) / 1e9 or None

    def history(self) -> Columns:
        """Its logged lines until now."""
        self._history = self._history or Columns(self.path / HISTORY)
        if HISTORY in self.files:  # no pipe, and no link out of the board's folder
            self._history.update()
        return self._history

    def timings(self) -> Columns:
        """Time, tokens and speed of its logged lines until now."""
        self._timings = self._timings or Columns(self.path / TIMINGS)
        if TIMINGS in self.files:
            self._timings.update()
        return self._timings

    @property
    def held(self) -> int:
        """How many numbers of its history are in memory."""
        return sum(columns.points for columns in (self._history, self._timings) if columns is not None)

    def forget_history(self) -> int:
        """Give the memory of the logged lines back; returns how many numbers it held."""
        held = self.held
        self._history = self._timings = None
        return held

    def look(self, now: float) -> bool:
        """Read what changed since the last look; returns whether anything did."""
        try:
            folder_time = os.stat(self.path).st_mtime_ns
        except OSError:
            self.is_gone = True
            return True
        is_settled = self.job is not None and self.job.state is State.finished
        is_fresh = folder_time != self._folder_time or now - folder_time / 1e9 < OFTEN
        if is_settled and not is_fresh and now - self._looked < SELDOM:
            return False
        found, outside = signatures(self.path, self.root)
        changed = {name for name in {*found, *self.files} if found.get(name) != self.files.get(name)}
        was = self.job
        self._folder_time, self._looked, self.files = folder_time, now, found
        for name in changed:
            self._read(name)
        for name in outside:
            self._problems[name] = CheckpointError(
                f"{name} is a link that leads out of the board's folder, and is not read"
            )
        if changed or not is_settled or is_fresh:
            self.job = self._job()
        self.is_gone = self.job is None or not ({CONFIG, FAILED} & {*found, *outside})
        state = (was.state, was.reason) if was is not None else None
        return bool(changed) or state != ((self.job.state, self.job.reason) if self.job is not None else None)

    def _read(self, name: str) -> None:
        read = READERS.get(name)
        if read is None:
            return
        self._problems.pop(name, None)
        try:
            read(self)
        except FileNotFoundError:  # it vanished meanwhile
            self._folder_time = -1
        except Exception as error:  # any damage that other programs can do
            self._problems[name] = error

    def _job(self) -> Job | None:
        """The job as the report sees it, of the last lines of its history."""
        if self._problems:
            return damaged_job(self.folder, next(iter(self._problems.values())), self.overrides)
        history = [self.last] if "step" in self.last else []
        try:
            state, reason = state_of(self.folder, self.failure, self.values, history)
        except (CheckpointError, OSError) as error:
            return damaged_job(self.folder, error, self.overrides)
        return Job(self.folder, state, reason, self.overrides, self.values, self.metrics, history)


def signatures(folder: Path, root: Path) -> tuple[dict[str, Signature], list[str]]:
    """Which of a run's files are there, and as what; and the names of those that are links out of the root."""
    found, outside = {}, []
    for name in (*SMALL, *APPENDED):
        try:
            status = os.lstat(folder / name)
            if stat.S_ISLNK(status.st_mode):
                if not (folder / name).resolve().is_relative_to(root):
                    outside.append(name)
                    continue
                status = os.stat(folder / name)
        except (OSError, RuntimeError):  # missing, unreadable, a loop of links
            continue
        if stat.S_ISREG(status.st_mode):
            found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found, outside


def _config(record: Record) -> None:
    record.values = read_values(record.path / CONFIG) if record.folder.is_run else {}
    record.config_version += 1


def _overrides(record: Record) -> None:
    record.overrides = read_overrides(record.folder, record.failure)
    record.config_version += 1


def _metrics(record: Record) -> None:
    record.metrics = record.folder.metrics()


def _failure(record: Record) -> None:
    record.failure = record.folder.failure() or {}
    if OVERRIDES not in record.files:
        _overrides(record)


def _provenance(record: Record) -> None:
    values = read_object(record.path / PROVENANCE) if PROVENANCE in record.files else {}
    record.command = str(values.get("command", ""))
    record.started = unix_time(values.get("started"))


def _history(record: Record) -> None:
    record.last = last_values(record.path / HISTORY, "loss")


def _timings(record: Record) -> None:
    record.last_timing = last_values(record.path / TIMINGS, "tokens_per_second")


READERS: dict[str, Callable[[Record], None]] = {
    CONFIG: _config, OVERRIDES: _overrides, METRICS: _metrics, FAILED: _failure, PROVENANCE: _provenance, HISTORY: _history,
    TIMINGS: _timings,
}  # fmt: skip


def unix_time(text: Any) -> float | None:
    """Seconds since 1970 of a time as runs write it; None for anything else."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
