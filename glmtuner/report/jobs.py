"""The jobs of a sweep, from its folders: the state of each, its metrics, and the knobs that were varied between them.

A sweep may be running while it is read: a truncated line, a missing file, a folder that disappears or a damaged one is
never an error.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.overrides import parse
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.report.race import paused_at, pruned_reason, readable_race, reasons
from glmtuner.run_folder.acquire import DERIVED_KEYS, RESUME_IGNORED_KEYS
from glmtuner.run_folder.files import is_number
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import OVERRIDES
from glmtuner.run_folder.redaction import HIDDEN, flatten

SEEDS = ("trainer.seed", "trainer.data_seed")
# Keys that are not knobs: no result depends on them.
IRRELEVANT_KEYS = {*RESUME_IGNORED_KEYS, "name", "objective", "tracker", "trainer.run_name"}
# Groups whose preset is shown instead of the keys that it sets, and the key that identifies the preset.
PRESET_KEYS = {
    "model": "model.model_name_or_path",
    "quant": "quant.quantization_bit",
    "finetuning": "finetuning.finetuning_type",
    "stage": "stage.name",
    "metric": "metric.name",
}


class State(str, Enum):
    """The state of a run."""

    finished = "finished"
    infeasible = "out of memory"
    failed = "failed"
    running = "running"
    unfinished = "unfinished"  # interrupted; the same command resumes it
    paused = "paused"  # at a rung of a race, until the others have reached it
    dropped = "dropped"  # by a race, or by the pruner of a search


@dataclass(frozen=True, eq=False)
class Job:
    """One job of a sweep, as far as its folder has files."""

    folder: RunFolder
    state: State
    reason: str = ""  # of a failure; the progress of an unfinished or running job
    overrides: dict[str, Any] = field(default_factory=dict)  # the user's, by key
    values: dict[str, Any] = field(default_factory=dict)  # the resolved config by dotted key; empty without one
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def seed(self) -> str:
        """trainer.seed, and trainer.data_seed after a slash if it is set, as text."""
        seeds = (format_value(self.values.get(key, self.overrides.get(key))) for key in SEEDS)
        return "/".join(seeds).removesuffix(f"/{format_value(None)}")

    def label(self, knobs: Iterable[str]) -> str:
        """Its values of the knobs on one line, numbers with the knob's name; without knobs, the name of its folder."""
        return ", ".join(_label_part(knob, value_of(self, knob)) for knob in knobs) or self.name


def read_jobs(sweep: Path) -> list[Job]:
    """The sweep's jobs by the names of their folders."""
    try:
        folders = job_folders(sweep)
    except OSError:
        return []
    dropped = reasons(readable_race(sweep))
    return [of_race(job, dropped) for job in map(read_job, folders) if job is not None]


def of_race(job: Job, dropped: dict[str, str]) -> Job:
    """The job as its race or its search sees it: an unfinished one may be dropped, or wait at a rung for the others."""
    if job.state is not State.unfinished:
        return job
    if job.name in dropped:
        return replace(job, state=State.dropped, reason=dropped[job.name])
    try:
        if (reason := pruned_reason(job.folder)) is not None:
            return replace(job, state=State.dropped, reason=f"pruned {reason}")
        paused = paused_at(job.folder)
    except CheckpointError as error:
        return replace(job, reason=f"{error}")
    return replace(job, state=State.paused, reason=paused) if paused else job


def read_job(folder: RunFolder) -> Job | None:
    """The job in the folder; None if the folder has disappeared. With an unreadable file it is a failed job."""
    try:
        failure = folder.failure() or {}
        overrides = read_overrides(folder, failure)
    except Exception as error:  # also any damage that is not a CheckpointError
        return damaged_job(folder, error)
    try:
        values = flatten(OmegaConf.to_container(folder.config(), enum_to_str=True)) if folder.is_run else {}
        metrics, history = folder.metrics(), folder.history()
        state, reason = state_of(folder, failure, values, history)
    except Exception as error:
        return damaged_job(folder, error, overrides)
    return Job(folder, state, reason, overrides, values, metrics, history)


def state_of(
    folder: RunFolder, failure: dict[str, Any], values: dict[str, Any], history: list[dict[str, Any]]
) -> tuple[State, str]:
    """The state of the run, and the reason of its failure or its progress."""
    if folder.is_running:
        return State.running, progress_of(values, history)
    if failure:
        kind = State.infeasible if failure.get("kind") == "infeasible" else State.failed
        return kind, str(failure.get("reason", "for an unknown reason"))
    if folder.is_finished:
        return State.finished, ""
    return State.unfinished, progress_of(values, history)


def progress_of(values: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The last logged step, and the total number of steps if it is known or can be extrapolated from the epochs."""
    last = max(history, key=lambda line: line["step"], default={"step": 0})
    step, epoch = last["step"], last.get("epoch")
    total, epochs = values.get("trainer.max_steps"), values.get("trainer.num_train_epochs")
    if not step:
        return "no step logged yet"
    if is_number(total) and total > 0:
        return f"step {step} of {total}"
    if epoch and is_number(epochs):
        return f"step {step} of about {round(step * epochs / epoch)}"
    return f"step {step}"


def damaged_job(folder: RunFolder, error: Exception, overrides: dict[str, Any] | None = None) -> Job | None:
    """The job whose files cannot be read, as a failed one; None if its folder has disappeared."""
    if not folder.path.is_dir():
        return None
    message = " ".join(str(error).split())[:300]
    reason = message if "damaged" in message else f"its folder is damaged: {message}"
    return Job(folder, State.failed, reason, overrides=overrides or {})


def read_overrides(folder: RunFolder, failure: dict[str, Any]) -> dict[str, Any]:
    """The values of the job's overrides by key, from overrides.txt, else from failed.json; redacted ones are left out."""
    overrides = failure.get("words") or []
    if (folder / OVERRIDES).is_file():
        overrides = (folder / OVERRIDES).read_text(encoding="utf-8", errors="replace").split("\n")
    values: dict[str, Any] = {}
    for override in map(str, overrides):
        key, equals, text = override.partition("=")
        if not equals or text == HIDDEN:
            continue
        try:
            parsed_key, value = _parsed(override)
            values[parsed_key] = value
        except (ConfigError, ValueError):  # a value that Hydra's grammar does not accept
            values[key.lstrip("+~")] = text
    return values


# What Hydra's grammar reads in the same way, in a thousandth of its time: a key with a number, or with one word.
PLAIN = re.compile(
    r"([a-z_]\w*(?:\.[a-z_]\w*)*|[a-z_]+(?:/[a-z_]+)+)=(?:(-?(?:0|[1-9]\d*))|(-?(?:0|[1-9]\d*)\.\d+)|([A-Za-z_][\w-]*))",
    re.ASCII,
)
WORDS = re.compile("true|false|null|nan|inf|on|off|yes|no", re.IGNORECASE)


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of an override."""
    plain = PLAIN.fullmatch(override)
    if plain is None or (plain[4] is not None and WORDS.fullmatch(plain[4])):
        return _parsed_by_hydra(override)
    key, whole, fraction, word = plain.groups()
    return key, int(whole) if whole is not None else float(fraction) if fraction is not None else word


@lru_cache(maxsize=4096)  # the jobs of a sweep share most of theirs
def _parsed_by_hydra(override: str) -> tuple[str, Any]:
    (parsed,) = parse([override])
    return parsed.key_or_group, unquoted(parsed.value())


def unquoted(value: Any) -> Any:
    """A value from Hydra's parser with its quoted strings as plain ones."""
    if isinstance(value, list):
        return [unquoted(each) for each in value]
    return value if isinstance(value, (bool, int, float, dict, type(None))) else str(getattr(value, "text", value))


# -- knobs ---------------------------------------------------------------------------------------------------------------


def varied_knobs(jobs: Sequence[Job]) -> list[str]:
    """The keys and groups whose values differ between the jobs, except for seeds: first the user's, then the others.

    The keys that a group's preset sets (finetuning=lora,freeze) are left out; those that differ for one preset are not.
    """
    user_keys = [key for key in dict.fromkeys(key for job in jobs for key in job.overrides) if _may_be_knob(key)]
    knobs = [key for key in user_keys if _differs(jobs, key)]
    configured = [job for job in jobs if job.values]
    knobs += [
        group for group, key in PRESET_KEYS.items() if not {group, key} & {*user_keys} and _differs(configured, group)
    ]
    others = sorted({key for job in configured for key in job.values} - {*user_keys} - {*DERIVED_KEYS})
    for key in others:
        choices = [knob for knob in knobs if knob in ("experiment", key.partition(".")[0])]
        identifying = {PRESET_KEYS.get(knob) for knob in knobs} | {key for key in PRESET_KEYS.values() if key in knobs}
        if not _may_be_knob(key) or key in identifying or not _differs(configured, key):
            continue
        if not any(_determines(configured, choice, key) for choice in choices):
            knobs.append(key)
    return knobs


def value_of(job: Job, knob: str) -> Any:
    """The job's value of a key, or its preset of a group; None if it has none."""
    if knob in job.values:
        return job.values[knob]
    if knob in PRESET_KEYS and knob not in job.overrides:
        value = job.values.get(PRESET_KEYS[knob])
        if knob == "quant":
            return f"int{value}" if value else "none"
        return Path(str(value)).name if knob == "model" and value else value
    return job.overrides.get(knob)


def format_value(value: Any) -> str:
    """A value as in an override: 0.001, true, a,b; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(format_value, value)) if isinstance(value, list) else str(value)


def _label_part(knob: str, value: Any) -> str:
    needs_name = value is None or isinstance(value, (int, float))
    return f"{knob.rpartition('.')[2]} {format_value(value)}" if needs_name else format_value(value)


def short_names(knobs: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if several end with the same part."""
    leaves = [knob.rpartition(".")[2] for knob in knobs]
    return {knob: leaf if leaves.count(leaf) == 1 else knob for knob, leaf in zip(knobs, leaves, strict=True)}


def _may_be_knob(key: str) -> bool:
    return key not in IRRELEVANT_KEYS and key not in SEEDS and not key.startswith(("hydra", "tracker."))


def _differs(jobs: Sequence[Job], knob: str) -> bool:
    known = [job for job in jobs if job.values or knob in job.overrides]  # a job may fail before it writes its config
    values = [value_of(job, knob) for job in known]
    if all(value is values[0] for value in values):  # hundreds of jobs share most of their values
        return False
    return len({*map(comparable, values)}) > 1


def _determines(jobs: Sequence[Job], choice: str, key: str) -> bool:
    """Whether all jobs with the same choice have the same value of the key."""
    pairs = {(comparable(value_of(job, choice)), comparable(value_of(job, key))) for job in jobs}
    return len(pairs) == len({chosen for chosen, _ in pairs})


def comparable(value: Any) -> str:
    """Equal for equal values, however they are written (1e-3, 0.001)."""
    if is_number(value) and math.isfinite(value):
        return repr(float(value))
    return format_value(value)
