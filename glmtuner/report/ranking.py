"""A sweep's jobs ranked: settings, their seeds together, intervals, differences to the winner."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from glmtuner.config.objective import less_is_better, measured_as
from glmtuner.report.bootstrap import Interval, interval
from glmtuner.report.jobs import Job, State, compared, knobs_of, read_jobs, short_names, value_of
from glmtuner.report.samples import Samples, samples_of, shared, together
from glmtuner.run_folder.files import read_json
from glmtuner.run_folder.names import SWEEP

OBJECTIVES = ("predict_rouge-l", "eval_loss", "train_loss")  # what jobs are ranked by when the sweep names no objective
COSTS = {
    "train_runtime": "time",
    "train_tokens_per_second": "tokens/s",
    "train_mfu": "MFU",
    "peak_memory_gib": "peak memory",
    "trained_parameters": "trained",
    "total_parameters": "of parameters",
}
NO_SCORES = ("_runtime", "_per_second")  # how the names of what is no score end
DRIFT = 0.01  # relative: further from metrics.json than this, a file of samples is not what was measured


@dataclass(frozen=True, eq=False)
class Row:
    """One setting: the job, or the jobs that differ in their seed only, with means over them."""

    settings: dict[str, Any]  # by knob
    jobs: list[Job]
    metrics: dict[str, float]
    std_devs: dict[str, float] = field(default_factory=dict)  # standard deviation over seeds
    intervals: dict[str, Interval] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    difference: Interval | None = None  # to the winner, in the objective
    seeds: "list[Row]" = field(default_factory=list)  # each job by itself, when there are several

    @property
    def label(self) -> str:
        return self.jobs[0].label(self.settings)

    @property
    def tied(self) -> bool:
        """Whether the row cannot be told apart from the winner."""
        return self.difference is not None and self.difference.holds_zero


@dataclass(frozen=True)
class Ranking:
    """All that the report of a sweep says, in the order in which it says it."""

    root: Path
    knobs: dict[str, str]  # key -> how it is called
    objective: str | None  # a key of metrics.json; None when no job measured anything
    rows: list[Row]  # finished jobs, the best first
    others: list[Job]  # unfinished, infeasible and failed ones
    notes: list[str]
    commands: list[str]

    @property
    def winner(self) -> Row | None:
        return self.rows[0] if self.rows and not rank_of(self.rows[0].metrics, self.objective)[0] else None

    @property
    def chosen(self) -> Job | None:
        """The winner's run, with several seeds the best of them."""
        return min(self.winner.jobs, key=lambda job: rank_of(job.metrics, self.objective)) if self.winner else None

    @property
    def way(self) -> str:
        return "less is better" if less_is_better(self.objective or "") else "more is better"

    @property
    def compared(self) -> bool:
        """Whether there are intervals to explain."""
        return any(row.intervals for row in self.rows)

    @property
    def paired(self) -> bool:
        """Whether there are differences to the winner to explain."""
        return any(row.difference for row in self.rows)

    @property
    def export(self) -> str | None:
        """The command that exports the winner; None when there is nothing trained to export."""
        if self.chosen is None or self.chosen.folder.trained() is None:
            return None
        path = shlex.quote(str(self.chosen.folder.path))
        return f"python -m glmtuner export {path} --to {shlex.quote(f'{self.root.resolve().name}_best')}"

    @property
    def told(self) -> str:
        """How many jobs came to which end."""
        count = Counter(job.state for job in self.others)
        finished = sum(len(row.jobs) for row in self.rows)
        names = {
            State.finished: "finished", State.running: "running", State.unfinished: "unfinished",
            State.infeasible: "did not fit into memory",
            State.failed: "failed",
        }  # fmt: skip
        count[State.finished] = finished
        return ", ".join(f"{count[state]} {word}" for state, word in names.items() if count[state]) or "no job yet"

    @property
    def scores(self) -> list[str]:
        """The measured scores, the objective first; what evaluation and prediction both measured is listed once."""
        measured = dict.fromkeys(name for row in self.rows for name in row.metrics)
        kept = [
            name
            for name in measured
            if name.startswith(("predict_", "eval_")) and not name.endswith(NO_SCORES)
            and not (name.startswith("eval_") and f"predict_{name.removeprefix('eval_')}" in measured)
        ]  # fmt: skip
        kept += ["train_loss"] if "train_loss" in measured else []
        kept.sort(key=lambda name: not name.startswith("predict_"))
        return [self.objective, *(name for name in kept if name != self.objective)] if self.objective else kept

    @property
    def costs(self) -> list[str]:
        """What the jobs took, as far as that was measured and is not the objective itself."""
        return [name for name in COSTS if name != self.objective and any(name in row.metrics for row in self.rows)]


def rank_of(metrics: dict[str, float], objective: str | None) -> tuple[bool, float]:
    """Sorts the best first; what was not measured, or is no number, last."""
    value = metrics.get(objective or "", math.nan)
    return (False, value if less_is_better(objective or "") else -value) if math.isfinite(value) else (True, 0.0)


def ranking(root: Path) -> Ranking:
    """The sweep in this folder, as far as it has come."""
    jobs = read_jobs(root)
    knobs = knobs_of(jobs)
    done = [job for job in jobs if job.state is State.finished]
    objective, notes = objective_of(done)
    cells: dict[tuple[str, ...], list[Job]] = {}
    for job in done:
        cells.setdefault(tuple(compared(value_of(job, knob)) for knob in knobs), []).append(job)
    rows = [row_of(members, knobs, notes) for members in cells.values()]
    rows.sort(key=lambda row: rank_of(row.metrics, objective))
    if rows and objective:
        rows = [against(row, rows[0], objective) for row in rows]
        notes += notes_on(rows, objective)
    others = [job for job in jobs if job.state is not State.finished]
    return Ranking(root, short_names(knobs), objective, rows, others, notes, typed_in(root))


def objective_of(done: Sequence[Job]) -> tuple[str | None, list[str]]:
    """What the jobs are ranked by: their `objective`, else the first of OBJECTIVES that one of them measured."""
    asked = Counter(job.values["objective"] for job in done if job.values.get("objective"))
    measured = {name for job in done for name in job.metrics}
    names = [*(name for name, _ in asked.most_common(1)), *OBJECTIVES]
    found = next((key for name in names if (key := measured_as(name, measured))), None)
    if not asked or found == measured_as(names[0], measured):
        return found, []
    return found, [f"No job measured the objective {names[0]}; they are ranked by {found}."]


def row_of(jobs: list[Job], knobs: Sequence[str], notes: list[str]) -> Row:
    """The jobs of one setting as a row; a mean is of those that measured it."""
    settings = {knob: value_of(jobs[0], knob) for knob in knobs}
    if len(jobs) == 1:
        metrics = jobs[0].metrics
        samples = {}
        for name, found in samples_of(jobs[0].folder, jobs[0].values, metrics).items():
            totals, weights = zip(*found.values(), strict=True)
            measured = sum(totals) / max(sum(weights), 1e-9)
            if math.isclose(measured, metrics[name], rel_tol=DRIFT, abs_tol=1e-6):
                samples[name] = found
            else:
                notes.append(
                    f"{jobs[0].name}: its file of samples gives {name} {score(name, measured)}, and metrics.json says "
                    f"{score(name, metrics[name])}; it has no interval."
                )
        return Row(settings, jobs, metrics, intervals=intervals_of(samples), samples=samples)
    seeds = sorted(
        (row_of([job], knobs, notes) for job in jobs), key=lambda row: (len(row.jobs[0].seed), row.jobs[0].seed)
    )
    names = dict.fromkeys(name for job in jobs for name in job.metrics)
    values = {name: [job.metrics[name] for job in jobs if name in job.metrics] for name in names}
    samples = {
        name: together(row.samples[name] for row in seeds)
        for name in names
        if all(name in row.samples for row in seeds)
    }
    return Row(
        settings,
        [row.jobs[0] for row in seeds],
        {name: fmean(found) for name, found in values.items()},
        {name: stdev(found) for name, found in values.items() if len(found) > 1 and all(map(math.isfinite, found))},
        intervals_of(samples),
        samples,
        seeds=seeds,
    )


def intervals_of(samples: dict[str, Samples]) -> dict[str, Interval]:
    found = {name: interval(list(each.values())) for name, each in samples.items()}
    return {name: each for name, each in found.items() if each is not None}


def against(row: Row, winner: Row, objective: str) -> Row:
    """The row with the paired interval of its difference to the winner, where both were scored on the same records."""
    mine, theirs = row.samples.get(objective), winner.samples.get(objective)
    difference = None
    if mine and theirs and row is not winner:
        records = shared(mine, theirs)
        difference = interval([mine[record] for record in records], [theirs[record] for record in records])
    seeds = [] if row is winner else [against(each, winner, objective) for each in row.seeds]
    return replace(row, difference=difference, seeds=seeds or row.seeds)


def notes_on(rows: Sequence[Row], objective: str) -> list[str]:
    """What a reader must know about the differences."""
    winner, *rest = rows
    notes = []
    if len(winner.seeds) > 1:
        notes.append(
            "Settings are ranked by their mean over seeds, and ± is the standard deviation over them; the exported run is "
            "the winner's best seed."
        )
    if objective not in winner.intervals:
        notes.append(f"No file holds {title(objective)} sample by sample, so there are no intervals of differences.")
        return notes
    apart = sum(objective in row.samples and row.difference is None for row in rest)
    if apart:
        notes.append(
            f"{apart} of the {len(rows)} settings were evaluated on other records than the winner, and so are not compared "
            "with it sample by sample (a dash); data.eval_dataset=… gives all jobs of a sweep the same records."
        )
    return notes


def typed_in(root: Path) -> list[str]:
    """The commands of the sweep; empty when they are not known."""
    try:
        typed = read_json(root / SWEEP)["typed"]
        return [str(line) for line in typed] if isinstance(typed, list) else []
    except Exception:  # missing or damaged: the report goes without
        return []


def score(name: str, value: float, like: float | None = None) -> str:
    """A value of the metric as people read it, with as many decimals as `like`, a value of the same kind, would have."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 or (name.endswith("loss") and size < 100) else f"{value:,.2f}"


def title(name: str) -> str:
    """A metric's name in a heading."""
    return COSTS.get(name) or {"eval_loss": "evaluation loss", "train_loss": "training loss"}.get(
        name, name.removeprefix("predict_")
    )
