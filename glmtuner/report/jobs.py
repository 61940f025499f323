"""A sweep's folders as jobs: what became of each, what it measured, and what was varied between them.

A sweep may be running while it is read: half a line, a missing file, a folder that goes away or a damaged one never raises.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.overrides import parse
from glmtuner.errors import ConfigError
from glmtuner.run_folder.acquire import DERIVED_KEYS, RESUME_IGNORED_KEYS
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import OVERRIDES
from glmtuner.run_folder.redaction import HIDDEN, flatten

SEEDS = ("trainer.seed", "trainer.data_seed")
UNTOLD = {*RESUME_IGNORED_KEYS, "name", "objective", "tracker", "trainer.run_name"}  # no knobs: they change no number
# Groups whose choice of a preset is shown in place of the keys that come with it, and the key that tells the choice.
CHOSEN_BY = {
    "model": "model.model_name_or_path",
    "quant": "quant.quantization_bit",
    "finetuning": "finetuning.finetuning_type",
    "stage": "stage.name",
    "metric": "metric.name",
}


class State(str, Enum):
    """What became of a run."""

    finished = "finished"
    infeasible = "out of memory"
    failed = "failed"
    running = "running"
    unfinished = "unfinished"  # cut off before its end, and continued by the same command


@dataclass(frozen=True, eq=False)
class Job:
    """One job of a sweep, as far as its folder tells."""

    folder: RunFolder
    state: State
    reason: str = ""  # of a failure; how far a job came that is not done
    overrides: dict[str, Any] = field(default_factory=dict)  # what was typed, by key
    values: dict[str, Any] = field(default_factory=dict)  # the resolved config by dotted key; empty when it has none
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def seed(self) -> str:
        """The seeds it was trained with, as they are shown."""
        return "/".join(shown(self.values.get(key, self.overrides.get(key))) for key in SEEDS).removesuffix(
            f"/{shown(None)}"
        )

    def label(self, knobs: Iterable[str]) -> str:
        """Its values of these knobs in a line, what says nothing by itself with its name; its folder without knobs."""
        return ", ".join(_said(knob, value_of(self, knob)) for knob in knobs) or self.name


def read_jobs(sweep: Path) -> list[Job]:
    """The sweep's jobs, in the order of their folders' names."""
    try:
        folders = job_folders(sweep)
    except OSError:
        return []
    return [job for job in map(read_job, folders) if job is not None]


def read_job(folder: RunFolder) -> Job | None:
    """What the folder tells; None when it went away meanwhile. A file that cannot be read makes it a failed job."""
    try:
        failure = folder.failure() or {}
        overrides = words_of(folder, failure)
    except Exception as error:  # damaged in a way that nobody foresaw is damaged, too
        return _damaged(folder, error)
    try:
        values = flatten(OmegaConf.to_container(folder.config(), enum_to_str=True)) if folder.is_run else {}
        metrics = {name: value for name, value in folder.metrics().items() if is_number(value)}
        history = [line for line in folder.history() if is_number(line.get("step"))]
        state, reason = state_of(folder, failure, values, history)
    except Exception as error:
        return _damaged(folder, error, overrides)
    return Job(folder, state, reason, overrides, values, metrics, history)


def state_of(folder: RunFolder, failure: dict[str, Any], values: dict[str, Any], history: list) -> tuple[State, str]:
    """What became of the run, and why or how far: the one place that decides it."""
    if folder.is_running:
        return State.running, progress(values, history)
    if failure:
        kind = State.infeasible if failure.get("kind") == "infeasible" else State.failed
        return kind, str(failure.get("reason", "for an unknown reason"))
    if folder.is_finished:
        return State.finished, ""
    return State.unfinished, progress(values, history)


def progress(values: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The last step that was logged, of how many as far as that can be told."""
    last = max(history, key=lambda line: line["step"], default={"step": 0})
    step, epoch, epochs, total = (
        last["step"], last.get("epoch"), values.get("trainer.num_train_epochs"), values.get("trainer.max_steps"),
    )  # fmt: skip
    if not step:
        return "no step logged yet"
    if is_number(total) and total > 0:
        return f"step {step} of {total}"
    return f"step {step} of about {round(step * epochs / epoch)}" if epoch and is_number(epochs) else f"step {step}"


def _damaged(folder: RunFolder, error: Exception, overrides: dict[str, Any] | None = None) -> Job | None:
    if not folder.path.is_dir():
        return None
    told = " ".join(str(error).split())[:300]
    return Job(
        folder, State.failed, told if "damaged" in told else f"its folder is damaged: {told}", overrides=overrides or {}
    )


def words_of(folder: RunFolder, failure: dict[str, Any]) -> dict[str, Any]:
    """What was typed for the job by key, with its value: from overrides.txt, else from what a failure noted."""
    typed = failure.get("words") or []
    if (folder / OVERRIDES).is_file():
        typed = (folder / OVERRIDES).read_text(encoding="utf-8", errors="replace").splitlines()
    found: dict[str, Any] = {}
    for word in typed:
        key, equals, text = str(word).partition("=")
        if not equals or text == HIDDEN:
            continue
        try:
            (override,) = parse([str(word)])
            found[override.key_or_group] = plain(override.value())
        except (ConfigError, ValueError):  # not a value of its own
            found[key.lstrip("+~")] = text
    return found


def plain(value: Any) -> Any:
    """A value of Hydra's parser without its quotes."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, dict, type(None))) else str(getattr(value, "text", value))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- what was varied -----------------------------------------------------------------------------------------------------


def knobs_of(jobs: Sequence[Job]) -> list[str]:
    """The keys and groups whose values differ between jobs, seeds aside: what was typed first, then the rest.

    The keys that a group's choice brings along (finetuning=lora,freeze) are not listed; what differs within one choice is.
    """
    typed = [key for key in dict.fromkeys(key for job in jobs for key in job.overrides) if _tells(key)]
    knobs = [key for key in typed if _varies(jobs, key)]
    knobs += [
        group
        for group, key in CHOSEN_BY.items()
        if not {group, key} & {*typed} and _varies([job for job in jobs if job.values], group)
    ]
    configured = [job for job in jobs if job.values]
    rest = sorted({key for job in configured for key in job.values} - {*typed} - {*DERIVED_KEYS})
    for key in rest:
        choosers = [knob for knob in knobs if knob in ("experiment", key.partition(".")[0])]
        chooses = {CHOSEN_BY.get(knob) for knob in knobs} | {key for key in CHOSEN_BY.values() if key in knobs}
        if not _tells(key) or key in chooses or not _varies(configured, key):
            continue
        if not any(_decides(configured, chooser, key) for chooser in choosers):
            knobs.append(key)
    return knobs


def value_of(job: Job, knob: str) -> Any:
    """The job's value of a key, or its choice of a group; None when it has none."""
    if knob in job.values:
        return job.values[knob]
    if knob in CHOSEN_BY and knob not in job.overrides:
        value = job.values.get(CHOSEN_BY[knob])
        if knob == "quant":
            return f"int{value}" if value else "none"
        return Path(str(value)).name if knob == "model" and value else value
    return job.overrides.get(knob)


def shown(value: Any) -> str:
    """A value as it is shown: 0.001, true, a,b; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(shown, value)) if isinstance(value, list) else str(value)


def _said(knob: str, value: Any) -> str:
    return (
        f"{knob.rpartition('.')[2]} {shown(value)}"
        if value is None or isinstance(value, (int, float))
        else shown(value)
    )


def short_names(knobs: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where two would be the same."""
    lasts = [knob.rpartition(".")[2] for knob in knobs]
    return {knob: last if lasts.count(last) == 1 else knob for knob, last in zip(knobs, lasts, strict=True)}


def _tells(key: str) -> bool:
    return key not in UNTOLD and key not in SEEDS and not key.startswith(("hydra", "tracker."))


def _varies(jobs: Sequence[Job], knob: str) -> bool:
    known = [job for job in jobs if job.values or knob in job.overrides]  # what failed early may not tell
    return len({compared(value_of(job, knob)) for job in known}) > 1


def _decides(jobs: Sequence[Job], chooser: str, key: str) -> bool:
    """Whether jobs that chose the same have the same value."""
    pairs = {(compared(value_of(job, chooser)), compared(value_of(job, key))) for job in jobs}
    return len(pairs) == len({choice for choice, _ in pairs})


def compared(value: Any) -> str:
    """Equal for equal values, however they were typed."""
    if is_number(value) and math.isfinite(value):
        return repr(float(value))
    return shown(value)
