"""Rankings and intervals, computed in the background by a child process, and again when the results of a job change."""

import threading
from contextlib import suppress
from typing import Any, Protocol

from glmtuner.board.records import Record
from glmtuner.board.sweeps import Sweep
from glmtuner.board.workers import Worker
from glmtuner.errors import GlmtunerError
from glmtuner.report.jobs import State
from glmtuner.run_folder.names import CONFIG, LOSSES, METRICS, PREDICTIONS

DECIDING = (CONFIG, METRICS, PREDICTIONS, LOSSES)


class Known(Protocol):
    """What is ranked: the runs and sweeps of the index, which takes the intervals."""

    lock: threading.RLock
    records: dict[str, Record]
    sweeps: dict[str, Sweep]

    def set_intervals(self, id: str, intervals: dict[str, list[float]]) -> None: ...


class Rankings:
    """The rankings of sweeps and the intervals of runs, as far as they were computed."""

    def __init__(self, index: Known, worker: Worker) -> None:
        self.index, self.worker = index, worker
        self.failures: dict[str, tuple[Any, str]] = {}  # of a sweep: the state that could not be ranked, and why
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}  # of a sweep: the state it was computed of, and it
        self._runs: dict[str, Any] = {}  # of a run that is no job: the state that its intervals were computed of
        self._wanted: dict[str, bool] = {}  # by id, in order: is it a sweep?
        self._lock = threading.Condition()
        self._works = False
        self._thread: threading.Thread | None = None

    def get(self, sweep: Sweep) -> dict[str, Any] | None:
        """The ranking of the sweep as it was when it was computed last; None before."""
        known = self._known.get(sweep.id)
        return None if known is None else known[1]

    def is_pending(self, sweep: Sweep) -> bool:
        """Whether the ranking is not that of the sweep as it is now; computing it comes first then."""
        if not self._is_old(sweep):
            return False
        self._want(sweep.id, True, first=True)
        return True

    def failure(self, sweep: Sweep) -> str | None:
        """Why the sweep as it is now could not be ranked with intervals."""
        failed = self.failures.get(sweep.id)
        return failed[1] if failed is not None and failed[0] == state_of_sweep(sweep) else None

    def wait(self) -> None:
        """Return once nothing is left to be computed."""
        with self._lock:
            while self._wanted or self._works:
                self._lock.wait()

    def _is_old(self, sweep: Sweep) -> bool:
        """Whether its results are others than when they were ranked."""
        state = state_of_sweep(sweep)
        tried = [known[0] for known in (self._known.get(sweep.id), self.failures.get(sweep.id)) if known is not None]
        return bool(state) and state not in tried

    def update(self) -> None:
        """Let everything be computed whose results changed."""
        for sweep in self.index.sweeps.values():
            if self._is_old(sweep):
                self._want(sweep.id, True)
        for record in self.index.records.values():
            if record.sweep is None and has_records(record) and self._runs.get(record.id) != state_of_run(record):
                self._want(record.id, False)

    def _want(self, id: str, is_sweep: bool, first: bool = False) -> None:
        with self._lock:
            if first:
                self._wanted = {id: is_sweep, **self._wanted}
            self._wanted.setdefault(id, is_sweep)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="rankings")
                self._thread.start()
            self._lock.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._works = False
                self._lock.notify_all()
                while not self._wanted:
                    self._lock.wait()
                id = next(iter(self._wanted))
                is_sweep, self._works = self._wanted.pop(id), True
            try:
                self._rank(id) if is_sweep else self._bound(id)
            except Exception as error:  # whatever it is, the others are ranked
                with self.index.lock:
                    sweep = self.index.sweeps.get(id) if is_sweep else None
                    if sweep is not None:
                        self.failures[id] = (state_of_sweep(sweep), f"{type(error).__name__}: {error}")

    def _rank(self, id: str) -> None:
        with self.index.lock:
            sweep = self.index.sweeps.get(id)
            state = state_of_sweep(sweep) if sweep is not None else None
        if sweep is None or not self._is_old(sweep):
            return
        try:
            found = self.worker.ask("ranking", id=id)
        except GlmtunerError as error:
            self.failures[id] = (state, str(error))
            return
        self._known[id] = (state, found["ranking"])
        for name, intervals in found["intervals"].items():
            self.index.set_intervals(name if id == "." else f"{id}/{name}", intervals)

    def _bound(self, id: str) -> None:
        with self.index.lock:
            record = self.index.records.get(id)
            state = state_of_run(record) if record is not None else None
        if record is None or self._runs.get(id) == state:
            return
        self._runs[id] = state  # also if it fails: it is not asked for again until something changes
        with suppress(GlmtunerError):  # its page says what is wrong with it
            self.index.set_intervals(id, self.worker.ask("intervals", id=id))


def has_records(record: Record) -> bool:
    """Whether there are files with scores of each record of a finished run."""
    is_finished = record.job is not None and record.job.state is State.finished
    return is_finished and (
        PREDICTIONS in record.files or LOSSES in record.files or (record.path / "benchmarks").is_dir()
    )


def state_of_run(record: Record) -> Any:
    """Equal as long as the intervals are."""
    return tuple(record.files.get(name) for name in DECIDING)


def state_of_sweep(sweep: Sweep) -> Any:
    """Equal as long as the ranking is; empty while no job is finished."""
    finished = {name for name, job in sweep.jobs.items() if job.state is State.finished}
    return tuple((record.id, state_of_run(record)) for record in sweep.records if record.path.name in finished)
