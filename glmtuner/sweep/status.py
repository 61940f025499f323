"""What the jobs of a sweep do at this moment, or a run: by their folders, and by SLURM's queue where it answers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from glmtuner.console import duration, say, table
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import Job, State, read_job, read_jobs
from glmtuner.run_folder.files import is_number, read_object
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PROGRESS, SWEEP
from glmtuner.sweep.attempts import Attempts, read_attempts
from glmtuner.sweep.folders import recorded
from glmtuner.sweep.queue import RUNNING, Queued, in_queue
from glmtuner.sweep.submissions import Submission, read_submissions

QUEUED, RUNS, PAUSED, DONE, FAILED, DROPPED, INTERRUPTED, NOT_STARTED, UNKNOWN = (
    "queued", "running", "paused", "done", "failed", "dropped", "interrupted", "not started", "unknown",
)  # fmt: skip
ORDER = (RUNS, QUEUED, PAUSED, DONE, FAILED, DROPPED, INTERRUPTED, NOT_STARTED, UNKNOWN)
MOST_NOTE = 160  # characters


@dataclass(frozen=True)
class Progress:
    """How far a training is: its last step, the number of its steps, and its steps a second; None for what is not known."""

    step: int
    steps: int | None = None
    speed: float | None = None

    @property
    def seconds_left(self) -> float | None:
        return (self.steps - self.step) / self.speed if self.steps is not None and self.speed else None


@dataclass(frozen=True)
class Line:
    """What is shown of one job; `seconds` is how long its training took, of a finished one, and `loss` the last that it logged."""

    name: str
    state: str
    progress: Progress | None = None
    note: str = ""
    seconds: float | None = None
    loss: float | None = None

    def cells(self) -> list[str]:
        progress = self.progress
        return [
            self.name,
            self.state,
            ""
            if progress is None
            else f"{progress.step}" + ("" if progress.steps is None else f" of {progress.steps}"),
            "" if progress is None or not progress.speed else f"{progress.speed:.3g}/s",
            duration(progress.seconds_left)
            if self.state == RUNS and progress and progress.seconds_left is not None
            else "",
            self.note if len(self.note) <= MOST_NOTE else self.note[: MOST_NOTE - 1] + "…",
        ]


def lines_of(path: Path) -> list[Line]:
    """A line for each job of the sweep, or for the run; raises CheckpointError if the folder holds neither."""
    folder = RunFolder(path)
    if folder.is_run:
        job = read_job(folder)
        return [line_of(path.name, job, None, None, {})] if job is not None else []
    jobs, submissions = {job.name: job for job in read_jobs(path)}, read_submissions(path)
    if not jobs and not submissions and not (path / SWEEP).is_file():
        problem = "it holds neither a sweep nor a run" if path.is_dir() else "no such folder"
        raise CheckpointError(
            f"status {path}: {problem}; type python -m glmtuner status outputs/sweeps/<sweep>, or outputs/<date>/<run>"
        )
    queued = in_queue(each.id for each in submissions.values())
    known = [
        line_of(
            name,
            jobs.get(name),
            submissions.get(name),
            read_attempts(path, name) if name in submissions else None,
            queued,
        )
        for name in sorted({*jobs, *submissions})
    ]
    return known + [
        Line(name, NOT_STARTED) for name in recorded(path, "jobs") if name not in jobs and name not in submissions
    ]


def line_of(
    name: str,
    job: Job | None,
    submission: Submission | None,
    attempts: Attempts | None,
    queue: dict[str, Queued] | None,
) -> Line:
    """What a job does, by its folder and by the queue, which is None if SLURM did not answer."""
    line = _line_of(name, job, submission, attempts, queue)
    losses = [each["loss"] for each in job.history if is_number(each.get("loss"))] if job is not None else []
    return replace(line, loss=losses[-1] if losses else None)


def _line_of(
    name: str,
    job: Job | None,
    submission: Submission | None,
    attempts: Attempts | None,
    queue: dict[str, Queued] | None,
) -> Line:
    queued = queue.get(submission.id) if queue is not None and submission is not None else None
    is_submitted = submission is not None and not (
        attempts is not None and attempts.id == submission.id and attempts.has_ended
    )
    progress = progress_of(job)
    if job is not None and job.state is State.finished:
        seconds = job.metrics.get("train_runtime")
        return Line(name, DONE, progress, seconds=seconds if is_number(seconds) else None)
    if attempts is not None and attempts.stopped is not None:
        return Line(name, FAILED, progress, attempts.stopped)
    if (job is not None and job.state is State.running) or (queued is not None and queued.state == RUNNING):
        starts = "" if attempts is None or attempts.starts < 2 else f"started {attempts.starts} times"
        return Line(name, RUNS, progress, _joined(_slurm(submission), starts))
    if queued is not None:
        reason = "" if queued.reason in ("", "None") else queued.reason
        again = "back in the queue" if job is not None else ""
        return Line(name, QUEUED, progress, _joined(_slurm(submission), queued.state.lower(), reason, again))
    if is_submitted and queue is None:
        return Line(name, UNKNOWN, progress, _joined(_slurm(submission), "squeue does not answer"))
    if job is None:
        return Line(name, DROPPED, None, _joined(_slurm(submission), "left the queue without having started"))
    if job.state is State.paused:
        return Line(name, PAUSED, progress, job.reason)
    if job.state is State.dropped:
        return Line(name, DROPPED, progress, job.reason)
    if job.state in (State.failed, State.infeasible):
        kind = _kind_of(job)
        return Line(name, DROPPED if kind == DROPPED else FAILED, progress, job.reason)
    if is_submitted:
        return Line(
            name,
            DROPPED,
            progress,
            _joined(_slurm(submission), "left the queue before its end; the same command resumes it"),
        )
    return Line(name, INTERRUPTED, progress, "the same command resumes it")


def _kind_of(job: Job) -> str:
    try:
        return str((job.folder.failure() or {}).get("kind"))
    except CheckpointError:
        return "error"


def _slurm(submission: Submission | None) -> str:
    return f"SLURM job {submission.id}" if submission is not None else ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def progress_of(job: Job | None) -> Progress | None:
    """How far a job's training is, by its progress.json, else by its history; None before its first step is known."""
    if job is None:
        return None
    last = max((int(line["step"]) for line in job.history), default=None)
    try:
        values = read_object(job.folder / PROGRESS)
        step, steps, start, seconds = (values[name] for name in ("step", "steps", "start_step", "seconds"))
        speed = (step - start) / seconds if step > start and seconds > 0 else None
        return Progress(max(int(step), last or 0), int(steps), speed)  # it is written every few seconds, lines at once
    except (CheckpointError, KeyError, TypeError, ValueError):  # not written yet, or removed meanwhile
        pass
    if last is None:
        return None
    total = job.values.get("trainer.max_steps")
    if job.state is State.finished:
        return Progress(last, last)
    return Progress(last, int(total) if is_number(total) and total > 0 else None)


def seconds_left(lines: Sequence[Line]) -> float | None:
    """How long the sweep will take: what is left of the jobs, as many at a time as now; None if too little is known."""
    running = [line for line in lines if line.state == RUNS]
    waiting = [line for line in lines if line.state in (QUEUED, NOT_STARTED)]
    whole = [line.seconds for line in lines if line.seconds] + [
        line.progress.steps / line.progress.speed
        for line in running
        if line.progress and line.progress.steps and line.progress.speed
    ]
    left = [line.progress.seconds_left if line.progress else None for line in running]
    if not (running or any(line.state == QUEUED for line in waiting)) or not whole or None in left:
        return None
    mean = sum(whole) / len(whole)
    known = [seconds for seconds in left if seconds is not None]
    return max(max(known, default=0.0), (sum(known) + mean * len(waiting)) / max(len(running), 1))


def show(path: Path, lines: Iterable[Line]) -> None:
    """Print the table of the jobs, and one line for all of them."""
    lines = sorted(lines, key=lambda line: ORDER.index(line.state))
    table("", ("job", "state", "step", "speed", "left", ""), [line.cells() for line in lines], lines=False)
    say(f"{path} at {datetime.now():%H:%M:%S}: {summary(lines)}")


def summary(lines: Sequence[Line]) -> str:
    """How many jobs are in which state, and how long the sweep will take."""
    count = Counter(line.state for line in lines)
    parts = ", ".join(f"{count[state]} {state}" for state in ORDER if count[state])
    left = seconds_left(lines)
    rest = (
        f"; about {duration(left)} left, {max(count[RUNS], 1)} at a time" if left is not None and len(lines) > 1 else ""
    )
    return f"{parts or 'no job has started'}{rest}"


def is_over(lines: Iterable[Line]) -> bool:
    """Whether no job is running or queued."""
    return not any(line.state in (RUNS, QUEUED, UNKNOWN) for line in lines)
