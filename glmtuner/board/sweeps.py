"""What the board knows of a sweep: its jobs, their knobs and states, and what is left of it."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmtuner.board.queues import Queues
from glmtuner.board.records import Record
from glmtuner.config.objective import objectives_of
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import Job, State, of_race, short_names, varied_knobs
from glmtuner.report.race import readable_race, reasons
from glmtuner.report.ranking import resolve_objective
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.names import RACE, SWEEP
from glmtuner.sweep.attempts import Attempts, attempts_file, read_attempts
from glmtuner.sweep.status import NOT_STARTED, Line, line_of, seconds_left, summary
from glmtuner.sweep.submissions import FOLDER, JOBS, Submission, read_submissions


class Sweep:
    """One sweep of the board, as its folder was when it was last looked at."""

    def __init__(self, id: str, path: Path) -> None:
        self.id, self.path = id, path
        self.records: list[Record] = []
        self.jobs: dict[str, Job] = {}  # by the names of their folders, as the race or the search sees them
        self.lines: dict[str, Line] = {}
        self.knobs: list[str] = []
        self.names: dict[str, str] = {}  # of the knobs, in a heading
        self.objective: str | None = None
        self.commands: list[str] = []
        self.recorded: list[str] = []  # the names of the jobs that the sweep has
        self.submissions: dict[str, Submission] = {}
        self.attempts: dict[str, Attempts | None] = {}
        self.dropped: dict[str, str] = {}
        self.problem = ""
        self.summary: dict[str, Any] = {}
        self._signatures: dict[Path, tuple[int, int] | None] = {}
        self._configs: dict[str, int] = {}

    def look(self, records: list[Record], has_changed: bool, queues: Queues, now: float) -> None:
        """Bring everything up to date; `records` are its jobs that have a folder, by name."""
        self.records = records
        self._read_own_files()
        configs = {record.id: record.config_version for record in records}
        jobs = {record.path.name: record.job for record in records if record.job is not None}
        if configs != self._configs:
            self._configs = configs
            self.knobs = varied_knobs([*jobs.values()])
            self.names = short_names(self.knobs)
        self.jobs = {name: of_race(job, self.dropped) for name, job in jobs.items()}
        finished = [job for job in self.jobs.values() if job.state is State.finished]
        asked = next((names[0] for job in jobs.values() if (names := objectives_of(job.values.get("objective")))), None)
        self.objective = resolve_objective(finished)[0] if finished else asked
        self._lines(queues)

    def _read_own_files(self) -> None:
        """Read what changed of the sweep's own files; a damaged one is told, and the jobs are shown without it."""
        try:
            if self._changed(self.path / SWEEP):
                values = read_object(self.path / SWEEP)
                self.commands = texts(values.get("typed"))
                self.recorded = texts(values.get("jobs"))
            if self._changed(self.path / RACE):
                self.dropped = reasons(readable_race(self.path))
            if self._changed(self.path / FOLDER / JOBS):
                self.submissions = read_submissions(self.path)
            for name in self.submissions:
                if self._changed(attempts_file(self.path, name)):
                    self.attempts[name] = read_attempts(self.path, name)
            self.problem = ""
        except (CheckpointError, OSError) as error:
            self.problem = str(error)

    def _changed(self, path: Path) -> bool:
        try:
            status = os.stat(path)
            found = (status.st_size, status.st_mtime_ns)
        except OSError:
            found = None
        has_changed = self._signatures.get(path) != found
        self._signatures[path] = found
        return has_changed and found is not None

    def _lines(self, queues: Queues) -> None:
        unfinished = [
            submission.id
            for name, submission in self.submissions.items()
            if name not in self.jobs or self.jobs[name].state is not State.finished
        ]
        queue = queues.of(unfinished)
        names = sorted({*self.jobs, *self.submissions})
        self.lines = {
            name: line_of(name, self.jobs.get(name), self.submissions.get(name), self.attempts.get(name), queue)
            for name in names
        }
        self.lines |= {name: Line(name, NOT_STARTED) for name in self.recorded if name not in self.lines}

    def summarize(self, states: Sequence[str]) -> None:
        """Set `summary`, the sweep's entry in the answer to api/runs, from the states of its rows."""
        lines = [*self.lines.values()]
        self.summary = {
            "id": self.id,
            "name": self.path.name,
            "jobs": len(lines),
            "count": dict(Counter(states)),
            "objective": self.objective,
            "knobs": self.knobs,
            "eta": seconds_left(lines),
            "summary": summary(lines),
            "problem": self.problem or None,
        }


def texts(value: Any) -> list[str]:
    """A list of texts as it is in a file; empty for anything else."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
