"""The runs and sweeps below the board's folder, kept in memory and brought up to date by what changed on the disk."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtuner.board.marks import Marks
from glmtuner.board.queues import Queues
from glmtuner.board.rankings import Rankings
from glmtuner.board.records import OFTEN, Record
from glmtuner.board.root import HIDDEN, Root
from glmtuner.board.rows import lone_row, sweep_rows
from glmtuner.board.sweeps import Sweep
from glmtuner.board.workers import Worker
from glmtuner.console import MUTED, plain
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import strict_json
from glmtuner.run_folder.names import CONFIG, FAILED, SWEEP

EVERY = 1.0  # seconds between two looks at the disk, however many look at the board
DEEPEST = 12  # folders below each other that are looked into
MOST_NUMBERS = 8_000_000  # of histories in memory, 100 MB


@dataclass
class Place:
    """A folder that is no run: what is in it."""

    time: int
    looked: float
    folders: list[str] = field(default_factory=list)  # the names of those below it
    runs: list[str] = field(default_factory=list)
    is_sweep: bool = False
    problems: dict[str, str] = field(default_factory=dict)  # by the ids of what is not shown


class Index:
    """All runs and sweeps of the root. Several threads may ask; one of them looks at the disk, at most every EVERY seconds.

    With `ranks` intervals are computed in the background. `version` grows with every change, also from one start of the program to the next, so that a page which asks for what changed
    since then gets everything from a board that was started again.
    """

    def __init__(self, root: Root, read_only: bool = False, ranks: bool = True) -> None:
        self.root, self.read_only = root, read_only
        self.lock = threading.RLock()
        self.first = self.version = int(time.time() * 1e6)
        self.records: dict[str, Record] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, tuple[int, str]] = {}  # of each row: the version in which it changed, and its JSON
        self.removed: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self.queues, self.marks = Queues(), Marks()
        self.rankings = Rankings(self, Worker(root.path, in_background=True)) if ranks else None
        self.intervals: dict[str, dict[str, list[float]]] = {}  # of runs, as far as they were computed
        self._places: dict[str, Place] = {}
        self._looked = 0.0
        self._used: dict[str, float] = {}  # when the history of a run was asked for last

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def refresh(self, at_once: bool = False) -> None:
        """Bring everything up to date, unless that was done in the last second."""
        with self.lock:
            now = time.time()
            if now - self._looked < EVERY and not at_once:
                return
            token = MUTED.set(True)  # a damaged line is told on the page, not every second on the terminal
            try:
                self._look(now)
            finally:
                MUTED.reset(token)
            self._looked = time.time()

    def changes(self, since: int | None) -> str:
        """The answer to api/runs as JSON: the rows that changed after version `since`, all of them without one."""
        self.refresh()
        with self.lock:
            is_whole = since is None or since < self.first
            rows = [text for version, text in self.texts.values() if is_whole or version > (since or 0)]
            removed = [] if is_whole else [id for id, version in self.removed.items() if version > (since or 0)]
            head = {
                "version": self.version,
                "time": time.time(),
                "whole": is_whole,
                "removed": removed,
                "problems": [{"id": id, "message": message} for id, message in self.problems.items()],
                "sweeps": [sweep.summary for sweep in self.sweeps.values()],
            }
            return f'{strict_json(head)[:-1]}, "rows": [{",".join(rows)}]}}'

    def record(self, name: str) -> Record:
        """The run with this id; raises CheckpointError if there is none."""
        self.refresh()
        with self.lock:
            if name in self.records:
                return self.records[name]
        self.root.run(name)  # says what is wrong with the id
        self.refresh(at_once=True)
        with self.lock:
            if name in self.records:
                return self.records[name]
        raise CheckpointError(f"{name[:200]!r} is no run that the board shows")

    def sweep(self, name: str) -> Sweep:
        """The sweep with this id; raises CheckpointError if there is none."""
        self.refresh()
        with self.lock:
            if name in self.sweeps:
                return self.sweeps[name]
        self.root.sweep(name)
        self.refresh(at_once=True)
        with self.lock:
            if name in self.sweeps:
                return self.sweeps[name]
        raise CheckpointError(f"{name[:200]!r} is no sweep that the board shows")

    def touch_history(self, record: Record) -> None:
        """Note that the history of the run is in use, and give the memory of those back that were not used for longest."""
        with self.lock:
            self._used[record.id] = time.time()
            held = {id: self.records[id].held for id in self._used if id in self.records}
            total = sum(held.values())
            for id in sorted(held, key=lambda id: self._used[id]):
                if total <= MOST_NUMBERS or id == record.id:
                    continue
                total -= self.records[id].forget_history()
                del self._used[id]

    def set_intervals(self, id: str, intervals: dict[str, list[float]]) -> None:
        """Store the intervals of a run's metrics, and show them in its row."""
        with self.lock:
            if self.intervals.get(id) != intervals:
                self.intervals[id] = intervals
                if id in self.rows:
                    self._set_row({**self.rows[id], "intervals": intervals}, self._next())

    # -- the disk ------------------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        self.problems = {}
        runs: dict[str, str | None] = {}
        sweeps: list[str] = []
        for id, place, above in self._walk(now):
            if place is None:
                runs[id] = above
            elif place.is_sweep:
                sweeps.append(id)
        changed = self._look_at_runs(runs, now)
        self._look_at_sweeps(sweeps, changed, now)
        version = self._next()
        rows: dict[str, dict[str, Any]] = {}
        for id in sweeps:
            for row in sweep_rows(self.sweeps[id], self, now):
                rows[row["id"]] = row
        for id, record in self.records.items():
            if record.sweep not in self.sweeps:
                rows[id] = lone_row(record, self, now)
        for row in rows.values():
            self._set_row(row, version)
        for id in self.rows.keys() - rows.keys():
            del self.rows[id], self.texts[id]
            self.removed[id] = version
        for id in rows:
            self.removed.pop(id, None)
        if self.rankings is not None:
            self.rankings.update()

    def _set_row(self, row: dict[str, Any], version: int) -> None:
        id = row["id"]
        if self.rows.get(id) != row:
            self.rows[id] = row
            self.texts[id] = (version, strict_json(row))

    def _next(self) -> int:
        self.version = max(self.version + 1, int(time.time() * 1e6))
        return self.version

    def _look_at_runs(self, runs: dict[str, str | None], now: float) -> set[str]:
        """Look at each run; returns the sweeps of which a job changed."""
        changed: set[str] = set()
        for id in self.records.keys() - runs.keys():
            changed.add(self.records.pop(id).sweep or "")
        for id, above in runs.items():
            record = self.records.get(id)
            if record is None:
                record = self.records[id] = Record(id, self.root.path / id, self.root.path, above)
            if record.look(now):
                changed.add(record.sweep or "")
            if record.is_gone:
                del self.records[id]
                self._places.pop(id.rpartition("/")[0] or ".", None)  # look into the folder above anew
        return changed

    def _look_at_sweeps(self, sweeps: list[str], changed: set[str], now: float) -> None:
        for id in self.sweeps.keys() - {*sweeps}:
            del self.sweeps[id]
        jobs: dict[str, list[Record]] = {id: [] for id in sweeps}
        for record in self.records.values():
            if record.sweep in jobs:
                jobs[record.sweep].append(record)
        for id in sweeps:
            if id not in self.sweeps:
                self.sweeps[id] = Sweep(id, self.root.path / id)
            self.sweeps[id].look(sorted(jobs[id], key=lambda record: record.path.name), id in changed, self.queues, now)

    def _walk(self, now: float) -> Iterator[tuple[str, Place | None, str | None]]:
        """The ids of all folders that are no runs, with their place, and those of runs, with the sweep that they are jobs of."""
        places: dict[str, Place] = {}
        stack: list[tuple[str, str | None, int]] = [(".", None, 0)]
        if _is_run(self.root.path):
            yield ".", None, None
            stack = []
        while stack:
            id, _, depth = stack.pop()
            place = self._place(id, now)
            if place is None:
                continue
            places[id] = place
            self.problems |= place.problems
            yield id, place, None
            for name in place.runs:
                yield _below(id, name), None, id if place.is_sweep else None
            if depth < DEEPEST:
                stack += [(_below(id, name), None, depth + 1) for name in place.folders]
            elif place.folders:
                self.problems[id] = f"it lies {DEEPEST} folders deep, and what is below is not shown"
        self._places = places

    def _place(self, id: str, now: float) -> Place | None:
        """What is in a folder, from the last look unless it changed since then; None if it cannot be read."""
        path = self.root.path / id
        known = self._places.get(id)
        try:
            changed = os.stat(path).st_mtime_ns
            if known is not None and known.time == changed and known.looked - changed / 1e9 > OFTEN:
                # a folder becomes a run when its config.yaml is written, which does not change the folder above
                found = [name for name in known.folders if _is_run(path / name)]
                if not found:
                    return known
            place = Place(changed, now)
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._sort_in(place, id, entry)
            return place
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems[id] = f"it cannot be read ({(error.strerror or str(error)).lower()})"
            return None

    def _sort_in(self, place: Place, id: str, entry: os.DirEntry[str]) -> None:
        if entry.name == SWEEP and entry.is_file():
            place.is_sweep = True
        if entry.name.startswith(HIDDEN) or not entry.is_dir():
            return
        if plain(entry.name) != entry.name:
            place.problems[_below(id, plain(entry.name))] = (
                "its name holds characters that cannot be shown, and it is left out"
            )
            return
        if entry.is_symlink():
            try:
                target = Path(entry.path).resolve()
            except (OSError, RuntimeError):
                return
            where = (
                "it is shown there"
                if target.is_relative_to(self.root.path)
                else "which leads out of the board's folder"
            )
            place.problems[_below(id, entry.name)] = (
                f"it is a link to {plain(str(target))}, and is not followed: {where}"
            )
            return
        (place.runs if _is_run(entry.path) else place.folders).append(entry.name)


def _below(id: str, name: str) -> str:
    return name if id == "." else f"{id}/{name}"


def _is_run(path: str | Path) -> bool:
    """Whether a folder holds a run, or what is left of one that failed before it began."""
    for name in (CONFIG, FAILED):
        try:
            if stat.S_ISREG(os.stat(os.path.join(path, name)).st_mode):
                return True
        except OSError:
            continue
    return False
