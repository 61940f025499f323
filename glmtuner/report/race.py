"""The decisions of a race (hydra/sweeper=race) or a pruner, from the files that they write, as tables and sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.checkpoints import checkpoints, step_of
from glmtuner.run_folder.files import is_number, read_object
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PAUSE, PAUSES, PRUNED, RACE

# states of a job at a rung
BEST, GOES_ON, DROPPED, FINISHED, OUT_OF_MEMORY = "best", "goes on", "dropped", "finished", "out of memory"
NUMBERS = ("value", "gap", "low", "high", "adjusted_p", "end_gap", "end_low", "end_high")
COUNTS = ("place", "step", "max_steps")


def rung_file(sweep: Path, number: int) -> Path:
    """The file with the decision of a rung, the first of which is 1."""
    return sweep / RACE / f"rung-{number}.json"


def read_rung(path: Path) -> dict[str, Any]:
    """The decision of a rung: its number, its options and its `jobs`; raises CheckpointError if the file is damaged."""
    rung = read_object(path)
    jobs, texts = rung.get("jobs"), (rung.get("pause"), rung.get("metric"))
    whole = isinstance(rung.get("rung"), int) and isinstance(jobs, list) and all(map(_is_whole, jobs))
    if not whole or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"{path} is damaged (it is no decision of a race); remove it: the same command decides the rung again from the "
            "evaluations of its jobs"
        )
    return rung


def _is_whole(job: Any) -> bool:
    if not isinstance(job, dict) or not all(isinstance(job.get(name, ""), str) for name in ("job", "state", "reason")):
        return False
    if not {"job", "state"} <= job.keys() or not all(is_number(job.get(name, 0)) for name in NUMBERS):
        return False
    return all(isinstance(job.get(name, 0), int) for name in COUNTS)


def readable_race(sweep: Path) -> list[dict[str, Any]]:
    """The decisions of a race by rung, empty for other sweeps; damaged files are named and left out."""
    rungs = []
    for path in sorted((sweep / RACE).glob("rung-*.json")):
        try:
            rungs.append(read_rung(path))
        except CheckpointError as error:
            say(f"{error}")
    return sorted(rungs, key=lambda rung: int(rung["rung"]))


def reasons(rungs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Why each dropped job was dropped, by the name of its folder."""
    dropped = [(job, rung) for rung in rungs for job in rung["jobs"] if job["state"] == DROPPED]
    return {job["job"]: _reason(job, rung) for job, rung in dropped}


def _reason(job: dict[str, Any], rung: dict[str, Any]) -> str:
    parts = [f"{rung['metric']} {_number(job.get('value'))}"]
    if job.get("gap") is not None:
        parts.append(f"{_interval(job, 'gap', 'low', 'high')} behind the best, adjusted p {_p(job.get('adjusted_p'))}")
    if job.get("end_gap") is not None:
        parts.append(f"extrapolated to the end {_interval(job, 'end_gap', 'end_low', 'end_high')}")
    if rung.get("rule") == "halving":
        parts.append(f"{job.get('place')} of {len(rung['jobs'])} by rank")
    where = f"rung {rung['rung']} of {rung.get('of')} (step {job.get('step')} of {job.get('max_steps')})"
    return f"{where}: {', '.join(parts)}"


def paused_at(folder: RunFolder) -> str | None:
    """Where an unfinished job is paused, in words; None if it is not, as one that was interrupted on the way to its next rung."""
    saved = checkpoints(folder.path)
    for path in (folder / PAUSES).glob(f"*/{PAUSE}") if saved else ():
        about = read_object(path)
        if about.get("step") == step_of(saved[-1]):
            return f"paused after step {about['step']} of {about.get('max_steps')}"
    return None


def pruned_reason(folder: RunFolder) -> str | None:
    """Why the trial of a search in the folder was pruned; None if it was not. Raises CheckpointError for a damaged file."""
    if not (folder / PRUNED).is_file():
        return None
    reason = read_object(folder / PRUNED).get("reason")
    if not isinstance(reason, str):
        raise CheckpointError(
            f"{folder / PRUNED} is damaged (it has no reason); remove it: the same command decides again"
        )
    return reason


def rung_title(rung: dict[str, Any]) -> str:
    """`rung 2 of 4, after 0.16 of the training: eval_loss on 50 records`."""
    pause = rung["pause"]
    where = f"step {pause}" if pause.isdecimal() else f"{pause} of the training"
    return f"rung {rung['rung']} of {rung.get('of')}, after {where}: {rung['metric']} on {rung.get('records')} records"


def rung_table(rung: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a rung: the best job first, then the others by their value, and those without one."""
    jobs = sorted(rung["jobs"], key=lambda job: (job.get("place") is None, job.get("place") or 0))
    rows = [
        [
            job["job"],
            _number(job.get("value")),
            _interval(job, "gap", "low", "high"),
            _p(job.get("adjusted_p")),
            _interval(job, "end_gap", "end_low", "end_high"),
            job["state"] + (f": {job['reason'][:200]}" if job.get("reason") else ""),
        ]
        for job in jobs
    ]
    return ["job", rung["metric"], "behind the best", "adjusted p", "at the end", ""], rows


def steps_of_race(rungs: Sequence[dict[str, Any]], finished: Sequence[str]) -> tuple[int, int] | None:
    """The steps that were trained, and those of the whole grid, as far as a rung has told how many a job has; None before a rung.

    `finished` are the names of the jobs that are trained to the end.
    """
    last = {job["job"]: job for rung in rungs for job in rung["jobs"] if job.get("step") and job.get("max_steps")}
    if not last:
        return None
    trained = sum(job["max_steps"] if name in finished else job["step"] for name, job in last.items())
    return trained, sum(job["max_steps"] for job in last.values())


def race_notes(rungs: Sequence[dict[str, Any]], finished: Sequence[str]) -> list[str]:
    """What a reader of the report must know of a race."""
    steps = steps_of_race(rungs, finished)
    if steps is None:
        return []
    notes = [f"The race has trained {steps[0]:,} of the {steps[1]:,} steps of the grid ({steps[0] / steps[1]:.1%})."]
    if dropped := [name for name in reasons(rungs) if name not in finished]:
        notes.append(
            f"Jobs dropped before their end, on the evidence below: {len(dropped)}; the same command with "
            f"hydra.sweeper.recall=[{dropped[0]}] trains such a job to its end."
        )
    return notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(job: dict[str, Any], value: str, low: str, high: str) -> str:
    if job.get(value) is None:
        return "-"
    return f"{_number(job[value])} [{_number(job.get(low))}, {_number(job.get(high))}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
