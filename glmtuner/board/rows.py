"""The rows of the board's table: a dictionary for each run, as the page gets it."""

import math
from typing import Any, Protocol

from glmtuner.board.marks import WAITS, Marks
from glmtuner.board.records import Record
from glmtuner.board.sweeps import Sweep
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import IRRELEVANT_KEYS, PRESET_KEYS, Job, State, format_value, value_of
from glmtuner.run_folder.files import is_number, read_object
from glmtuner.run_folder.names import PROGRESS
from glmtuner.sweep.status import DONE, DROPPED, FAILED, NOT_STARTED, RUNS, Line, line_of

STATES = {DONE: "finished", RUNS: "running"}  # the board's words, where the terminal has others
KINDS = {"infeasible": "out of memory", "diverged": "diverged"}
SHARED = "hydra/launcher=shared"


class Known(Protocol):
    """What rows need of the index."""

    read_only: bool
    marks: Marks
    intervals: dict[str, dict[str, list[float]]]


def sweep_rows(sweep: Sweep, known: Known, now: float) -> list[dict[str, Any]]:
    """The rows of a sweep's jobs, those without a folder included; its summary is set."""
    by_name = {record.path.name: record for record in sweep.records}
    rows = []
    for name, line in sweep.lines.items():
        if name not in by_name:
            rows.append(missing_row(sweep, line))
            continue
        job, record = sweep.jobs[name], by_name[name]
        varied = {knob: value_of(job, knob) for knob in sweep.knobs}
        rows.append(row_of(record, job, line, varied, known, now))
    if any(row["state"] == "running" for row in rows) and waits_for_memory(sweep.commands):
        for row in rows:
            if row["state"] == NOT_STARTED:
                row |= {"mark": WAITS, "note": "hydra/launcher=shared trains as many jobs together as fit into memory"}
    sweep.summarize([row["state"] for row in rows])
    return rows


def waits_for_memory(commands: list[str]) -> bool:
    """Whether the jobs of the sweep wait until there is memory for them: those of the shared launcher, unless a number was typed."""
    return bool(commands) and SHARED in commands[-1] and "hydra.launcher.jobs_at_once=" not in commands[-1]


def lone_row(record: Record, known: Known, now: float) -> dict[str, Any]:
    """The row of a run that is no job of a sweep; what was varied is what was typed."""
    job = record.job
    assert job is not None
    varied = {
        key: value
        for key, value in record.overrides.items()
        if key not in IRRELEVANT_KEYS and key not in PRESET_KEYS and not key.startswith(("hydra", "tracker"))
    }
    return row_of(record, job, line_of(job.name, job, None, None, {}), varied, known, now)


def missing_row(sweep: Sweep, line: Line) -> dict[str, Any]:
    """The row of a job that has no folder yet."""
    return {
        **dict.fromkeys(
            ("mark", "stage", "model", "method", "quant", "data", "step", "steps", "epoch", "loss", "tokens_per_second",
             "memory_gib", "eta_s", "started", "updated")
        ),
        "id": line.name if sweep.id == "." else f"{sweep.id}/{line.name}",
        "name": line.name,
        "sweep": sweep.id,
        "state": STATES.get(line.state, line.state),
        "note": line.note,
        "varied": {},
        "metrics": {},
        "intervals": {},
        "can": {"stop": False, "continue": False, "talk": False, "delete": False},
    }  # fmt: skip


def row_of(record: Record, job: Job, line: Line, varied: dict[str, Any], known: Known, now: float) -> dict[str, Any]:
    """The row of a run."""
    state, note = state_of(job, line, record), line.note
    mark = None
    if state == "running":
        mark, why = known.marks.of(record, progress_of(record), now)
        note = ", ".join(part for part in (why, note) if part)
    values, timing = record.values, record.last_timing
    progress = line.progress
    metrics = {name: value for name, value in record.metrics.items()} or measured(record.last)
    is_over = state not in ("running", "queued", "not started", "unknown")
    return {
        "id": record.id,
        "name": record.path.name,
        "sweep": record.sweep,
        "state": state,
        "mark": mark,
        "note": note,
        "stage": values.get("stage.name"),
        "model": value_of(job, "model"),
        "method": values.get("finetuning.finetuning_type"),
        "quant": value_of(job, "quant") if values else None,
        "data": format_value(values.get("data.dataset")) if values.get("data.dataset") else None,
        "varied": {key: shown(value) for key, value in varied.items()},
        "metrics": {name: finite(value) for name, value in metrics.items()},
        "intervals": known.intervals.get(record.id, {}),
        "step": progress.step if progress is not None else None,
        "steps": progress.steps if progress is not None else None,
        "epoch": record.last.get("epoch", record.metrics.get("epoch")),
        "loss": finite(record.last.get("loss")),
        "tokens_per_second": record.metrics.get("train_tokens_per_second", timing.get("tokens_per_second")),
        "memory_gib": record.metrics.get("peak_memory_gib", timing.get("memory_gib")),
        "eta_s": progress.seconds_left if state == "running" and progress is not None else None,
        "started": record.started,
        "updated": record.updated,
        "can": {
            "stop": state in ("running", "queued") and not known.read_only,
            "continue": is_over and state != "finished" and bool(record.command) and not known.read_only,
            "talk": state == "finished" and not known.read_only,
            "delete": is_over and not known.read_only,
        },
    }


def state_of(job: Job, line: Line, record: Record) -> str:
    """The board's word for the state of a job."""
    if line.state in (FAILED, DROPPED) and job.state in (State.failed, State.infeasible):
        return KINDS.get(str(record.failure.get("kind")), line.state)
    return STATES.get(line.state, line.state)


def progress_of(record: Record) -> dict[str, Any]:
    """The content of progress.json; empty where it is missing or damaged."""
    try:
        return read_object(record.path / PROGRESS) if PROGRESS in record.files else {}
    except CheckpointError:
        return {}


def measured(last: dict[str, float]) -> dict[str, float]:
    """The scores that an unfinished training measured last."""
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def finite(value: Any) -> Any:
    """The value; None for a number that JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> Any:
    """A value of a configuration as JSON has it: texts, numbers, booleans and null as they are, anything else as text."""
    return finite(value) if value is None or isinstance(value, (str, bool)) or is_number(value) else format_value(value)
