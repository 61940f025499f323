"""The hours that a sweep, or a run, has taken, over all attempts: a file an attempt, which a kill leaves at its last value.

A process that runs a job writes its own file, every SECONDS and when it ends, so that no process waits for another and nothing is
lost but the last seconds of a killed one. torch is not imported.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import is_number, read_object, write_json
from glmtuner.run_folder.names import SPENT

SECONDS = 2.0  # between two writes of an attempt's file
ROOT = "GLMTUNER_SPENT"  # the folder of the sweep that this process runs a job of


@dataclass(frozen=True)
class Hours:
    """Hours of GPUs, and of processor cores by jobs without a GPU."""

    gpu: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Hours") -> "Hours":
        return Hours(self.gpu + other.gpu, self.cpu + other.cpu)


Passed = Callable[[float, float], list[str]]  # of GPU-hours and CPU-hours: the limits that they reach


def hours_spent(root: Path, without: Path | None = None) -> Hours:
    """The hours of all attempts in the folder, but for that of the file `without`; raises CheckpointError for a damaged file."""
    total = Hours()
    for path in sorted((root / SPENT).glob("*.json")):
        if path == without:
            continue
        values = read_object(path)
        seconds, kind = values.get("seconds"), values.get("of")
        if not is_number(seconds) or seconds < 0 or kind not in ("gpu", "cpu"):
            raise CheckpointError(
                f"{path} is damaged (it has no seconds of a gpu or cpu); remove it: its hours are then not counted"
            )
        total += Hours(**{kind: seconds / 3600})
    return total


class Attempt:
    """The attempt of this process at a job, or at a run; `passed` tells which limits a number of hours reaches.

    On a GPU its seconds are those of the clock, one GPU a process; without one, those of the processor, child processes that have
    ended included.
    """

    def __init__(self, root: Path, job: str, on_gpu: bool, passed: Passed) -> None:
        self.root, self.job, self.on_gpu, self.passed = root, job, on_gpu, passed
        rank = os.environ.get("RANK", "0")
        self.file = root / SPENT / f"{job}.{time.time_ns()}-{os.getpid()}-{rank}.json"
        self.others = hours_spent(root)
        self._start, self._began = self._clock(), time.monotonic()
        self._said = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="spent")
        self._write()
        self._thread.start()

    def _clock(self) -> float:
        if self.on_gpu:
            return time.monotonic()
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def hours(self) -> Hours:
        """The hours of all attempts, this one's until now."""
        own = (self._clock() - self._start) / 3600
        return self.others + (Hours(gpu=own) if self.on_gpu else Hours(cpu=own))

    def over(self) -> list[str]:
        """The limits that are reached, each as a phrase."""
        hours = self.hours()
        return self.passed(hours.gpu, hours.cpu)

    def over_before(self) -> list[str]:
        """The limits that other attempts have reached, each as a phrase."""
        return self.passed(self.others.gpu, self.others.cpu)

    def end(self) -> None:
        """Write the last value."""
        self._ended.set()
        self._thread.join()
        self._write()

    def _keep(self) -> None:
        while not self._ended.wait(SECONDS):
            try:
                self._write()
                self.others = hours_spent(self.root, without=self.file)
            except (OSError, CheckpointError) as error:  # a full disk, a damaged file: what is known stays
                if f"{error}" != self._said:
                    say(f"the hours spent are not updated: {error}")
                self._said = f"{error}"

    def _write(self) -> None:
        kind, seconds, wall = (
            "gpu" if self.on_gpu else "cpu",
            self._clock() - self._start,
            time.monotonic() - self._began,
        )
        write_json(self.file, {"job": self.job, "of": kind, "seconds": round(seconds, 3), "wall": round(wall, 3)})


_current: Attempt | None = None


def current_attempt() -> Attempt | None:
    """The attempt that this process is in; None if its hours are not counted."""
    return _current


@contextmanager
def counted(root: Path, job: str, on_gpu: bool, passed: Passed) -> Iterator[Attempt]:
    """Within it, the hours of this process are counted in the folder."""
    global _current
    _current = attempt = Attempt(root, job, on_gpu, passed)
    try:
        yield attempt
    finally:
        _current = None
        attempt.end()
