"""The ranking of a sweep's jobs: one row per setting, seeds averaged, with intervals and differences to the winner."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from glmtuner.config.benchmarks import TASKS as BENCHMARK_TASKS
from glmtuner.config.objective import less_is_better, measured_as, objectives_of
from glmtuner.report.benchmarks import BENCHMARK
from glmtuner.report.bootstrap import Interval, interval
from glmtuner.report.jobs import Job, State, comparable, read_jobs, short_names, value_of, varied_knobs
from glmtuner.report.race import race_notes, readable_race
from glmtuner.report.record_scores import RecordScores, common_records, pooled, read_answers, record_scores
from glmtuner.run_folder.files import read_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.lost import lost_notes
from glmtuner.run_folder.names import SWEEP

DEFAULT_OBJECTIVES = ("predict_rouge-l", "eval_loss", "train_loss")  # the first measured one ranks a sweep without one
COSTS = {
    "train_runtime": "time",
    "train_tokens_per_second": "tokens/s",
    "train_mfu": "MFU",
    "peak_memory_gib": "peak memory",
    "trained_parameters": "trained",
    "total_parameters": "of parameters",
}
NON_SCORE_SUFFIXES = ("_runtime", "_per_second")
TOLERANCE = 0.01  # relative difference between metrics.json and the record scores above which the latter are not used


@dataclass(frozen=True, eq=False)
class Row:
    """One setting: its job, or the jobs that differ in their seed only and the means over them."""

    settings: dict[str, Any]  # the values by knob
    jobs: list[Job]
    metrics: dict[str, float]
    std_devs: dict[str, float] = field(default_factory=dict)  # over seeds
    intervals: dict[str, Interval] = field(default_factory=dict)
    record_scores: dict[str, RecordScores] = field(default_factory=dict)
    difference: Interval | None = None  # of the objective, to the winner's
    seeds: "list[Row]" = field(default_factory=list)  # one row per job if there are several

    @property
    def label(self) -> str:
        return self.jobs[0].label(self.settings)

    @property
    def tied(self) -> bool:
        """Whether the interval of the difference to the winner contains 0."""
        return self.difference is not None and self.difference.contains_zero


@dataclass(frozen=True)
class Ranking:
    """The content of a sweep's report."""

    root: Path  # the sweep's folder
    knobs: dict[str, str]  # dotted key -> short name
    objective: str | None  # a key of metrics.json; None if no job measured a score
    rows: list[Row]  # finished jobs, the best first
    unranked: list[Job]  # running, unfinished, infeasible and failed ones
    notes: list[str]
    commands: list[str]  # the command lines of the sweep

    @property
    def winner(self) -> Row | None:
        """The best row; None if no job measured the objective."""
        return self.rows[0] if self.rows and not sort_key(self.rows[0].metrics, self.objective)[0] else None

    @property
    def best_job(self) -> Job | None:
        """The winner's job, or that of its best seed."""
        return min(self.winner.jobs, key=lambda job: sort_key(job.metrics, self.objective)) if self.winner else None

    @property
    def direction(self) -> str:
        """Which values of the objective are better, in words."""
        return "lower is better" if less_is_better(self.objective or "") else "higher is better"

    @property
    def has_intervals(self) -> bool:
        return any(row.intervals for row in self.rows)

    @property
    def has_differences(self) -> bool:
        return any(row.difference for row in self.rows)

    @property
    def export_command(self) -> str | None:
        """The command that exports the best job; None if it trained nothing that can be exported."""
        if self.best_job is None or self.best_job.folder.trained() is None:
            return None
        path = shlex.quote(str(self.best_job.folder.path))
        return f"python -m glmtuner export {path} --to {shlex.quote(f'{self.root.resolve().name}_best')}"

    @property
    def summary(self) -> str:
        """The number of jobs in each state."""
        count = Counter(job.state for job in self.unranked)
        count[State.finished] = sum(len(row.jobs) for row in self.rows)
        names = {
            State.finished: "finished",
            State.running: "running",
            State.unfinished: "unfinished",
            State.paused: "paused",
            State.dropped: "dropped",
            State.infeasible: "did not fit into memory",
            State.failed: "failed",
        }
        return ", ".join(f"{count[state]} {name}" for state, name in names.items() if count[state]) or "no job yet"

    @property
    def scores(self) -> list[str]:
        """The measured scores, the objective first; one that evaluation and prediction both measured is listed once."""
        measured = dict.fromkeys(name for row in self.rows for name in row.metrics)
        scores = [
            name
            for name in measured
            if name.startswith(("predict_", "eval_")) and not name.endswith(NON_SCORE_SUFFIXES)
            and not (name.startswith("eval_") and f"predict_{name.removeprefix('eval_')}" in measured)
        ]  # fmt: skip
        scores += main_scores(self.rows, measured)
        scores += ["train_loss"] if "train_loss" in measured else []
        scores.sort(key=lambda name: not name.startswith("predict_"))
        return [self.objective, *(name for name in scores if name != self.objective)] if self.objective else scores

    @property
    def costs(self) -> list[str]:
        """The measured costs (time, memory, …), except for the objective."""
        return [name for name in COSTS if name != self.objective and any(name in row.metrics for row in self.rows)]


def main_scores(rows: "Sequence[Row]", measured: Iterable[str]) -> list[str]:
    """The main score of each benchmark that the jobs were asked; leaderboard.csv has the others, and those of its tasks."""
    asked = dict.fromkeys(name for row in rows for job in row.jobs for name in job.values.get(BENCHMARK_TASKS) or [])
    found = (
        next((key for key in measured if key == f"{BENCHMARK}{name}" or key.startswith(f"{BENCHMARK}{name}_")), None)
        for name in asked
    )
    return [key for key in found if key is not None]


def sort_key(metrics: dict[str, float], objective: str | None) -> tuple[bool, float]:
    """Sorts the best first, and a missing or non-finite objective last."""
    value = metrics.get(objective or "", math.nan)
    return (False, value if less_is_better(objective or "") else -value) if math.isfinite(value) else (True, 0.0)


def rank_sweep(root: Path) -> Ranking:
    """The ranking of the sweep in this folder, finished or not."""
    return rank_jobs(root, read_jobs(root))


Scored = Callable[[RunFolder, Mapping[str, Any], Iterable[str]], dict[str, RecordScores]]


def rank_jobs(root: Path, jobs: Sequence[Job], scored: Scored = record_scores) -> Ranking:
    """The ranking of these jobs; `root` is the folder of their sweep, or of the only run. `scored` has the scores of its records."""
    knobs = varied_knobs(jobs)
    finished = [job for job in jobs if job.state is State.finished]
    objective, notes = resolve_objective(finished)
    settings: dict[tuple[str, ...], list[Job]] = {}
    for job in finished:
        settings.setdefault(tuple(comparable(value_of(job, knob)) for knob in knobs), []).append(job)
    rows = [build_row(members, knobs, notes, scored) for members in settings.values()]
    rows.sort(key=lambda row: sort_key(row.metrics, objective))
    if rows and objective:
        rows = [with_difference(row, rows[0], objective) for row in rows]
        notes += notes_on_differences(rows, objective)
    notes += race_notes(readable_race(root), [job.name for job in finished])
    notes += lost_notes(root)
    unranked = [job for job in jobs if job.state is not State.finished]
    return Ranking(root, short_names(knobs), objective, rows, unranked, notes, read_commands(root))


def resolve_objective(finished: Sequence[Job]) -> tuple[str | None, list[str]]:
    """The metric to rank by, a key of metrics.json, and a note if it is not the one asked for.

    It is the `objective` of most jobs, the first of two, else the first of DEFAULT_OBJECTIVES that a job measured; None if none did.
    """
    asked = Counter(names[0] for job in finished if (names := objectives_of(job.values.get("objective"))))
    measured = {name for job in finished for name in job.metrics}
    names = [*(name for name, _ in asked.most_common(1)), *DEFAULT_OBJECTIVES]
    objective = next((key for name in names if (key := measured_as(name, measured))), None)
    if not asked or objective == measured_as(names[0], measured):
        return objective, []
    return objective, [f"No job measured the objective {names[0]}; they are ranked by {objective}."]


def build_row(jobs: list[Job], knobs: Sequence[str], notes: list[str], scored: Scored = record_scores) -> Row:
    """The row of one setting's jobs; a mean is over those that measured the metric. Notes are appended to `notes`."""
    settings = {knob: value_of(jobs[0], knob) for knob in knobs}
    if len(jobs) == 1:
        job = jobs[0]
        scores = {}
        for name, records in scored(job.folder, job.values, job.metrics).items():
            totals, weights = zip(*records.values(), strict=True)
            recomputed = sum(totals) / max(sum(weights), 1e-9)
            if math.isclose(recomputed, job.metrics[name], rel_tol=TOLERANCE, abs_tol=1e-6):
                scores[name] = records
            else:
                notes.append(
                    f"{job.name}: {name} has no interval, because its records score {format_score(name, recomputed)} and "
                    f"metrics.json says {format_score(name, job.metrics[name])}."
                )
        return Row(settings, jobs, job.metrics, intervals=intervals_of(scores), record_scores=scores)
    seeds = sorted(
        (build_row([job], knobs, notes, scored) for job in jobs),
        key=lambda row: (len(row.jobs[0].seed), row.jobs[0].seed),
    )
    names = dict.fromkeys(name for job in jobs for name in job.metrics)
    values = {name: [job.metrics[name] for job in jobs if name in job.metrics] for name in names}
    scores = {
        name: pooled(row.record_scores[name] for row in seeds)
        for name in names
        if all(name in row.record_scores for row in seeds)
    }
    return Row(
        settings,
        [row.jobs[0] for row in seeds],
        {name: fmean(each) for name, each in values.items()},
        {name: stdev(each) for name, each in values.items() if len(each) > 1 and all(map(math.isfinite, each))},
        intervals_of(scores),
        scores,
        seeds=seeds,
    )


def intervals_of(scores: dict[str, RecordScores]) -> dict[str, Interval]:
    """The interval of each metric that has one."""
    intervals = {name: interval(list(records.values())) for name, records in scores.items()}
    return {name: each for name, each in intervals.items() if each is not None}


def with_difference(row: Row, winner: Row, objective: str) -> Row:
    """The row, and its seeds, with the paired interval of the difference to the winner if it has the same records."""
    own, best = row.record_scores.get(objective), winner.record_scores.get(objective)
    difference = None
    if own and best and row is not winner:
        records = common_records(own, best)
        difference = interval([own[record] for record in records], [best[record] for record in records])
    seeds = [] if row is winner else [with_difference(seed, winner, objective) for seed in row.seeds]
    return replace(row, difference=difference, seeds=seeds or row.seeds)


def notes_on_differences(rows: Sequence[Row], objective: str) -> list[str]:
    """What a reader of the differences must know."""
    winner, *rest = rows
    notes = []
    if len(winner.seeds) > 1:
        notes.append(
            "Settings are ranked by their mean over seeds, and ± is the standard deviation over them; the exported run is "
            "the winner's best seed."
        )
    if objective not in winner.intervals:
        notes.append(
            f"There is no file with the {metric_title(objective)} of each record, so differences have no intervals."
        )
        return notes
    incomparable = sum(objective in row.record_scores and row.difference is None for row in rest)
    if incomparable:
        notes.append(
            f"{incomparable} of the {len(rows)} settings were evaluated on other records than the winner, so they have no "
            "paired difference (a dash); data.eval_dataset=… evaluates all jobs of a sweep on the same records."
        )
    if objective.startswith("predict_"):
        best = references_of(winner)
        others = [references_of(row) for row in rest if row.difference is not None]
        num_other = sum(any(best.get(record, text) != text for record, text in each.items()) for each in others)
        if num_other:
            notes.append(
                f"{num_other} of the {len(rows)} settings were scored against other texts of the same labels than the winner: "
                "tokenizers write them differently, and data.max_target_length cuts them."
            )
    return notes


def references_of(row: Row) -> dict[tuple[str, str], str]:
    """What the answers of the row's first job were scored against, by question and label."""
    job = row.jobs[0]
    answers = read_answers(job.folder, job.values.get("metric.without_reasoning") is True)
    return {(line.prompt, line.label): line.reference.strip() for line in answers}


def read_commands(root: Path) -> list[str]:
    """The command lines in the sweep's sweep.json; empty if it is missing or damaged."""
    try:
        commands = read_json(root / SWEEP)["typed"]
        return [str(line) for line in commands] if isinstance(commands, list) else []
    except Exception:  # the report does without them
        return []


def format_score(name: str, value: float, like: float | None = None) -> str:
    """A value of the metric as text, with as many decimals as the value `like` would have."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 or (name.endswith("loss") and size < 100) else f"{value:,.2f}"


def metric_title(name: str) -> str:
    """A metric's name in a heading."""
    titles = {**COSTS, "eval_loss": "evaluation loss", "train_loss": "training loss"}
    return titles.get(name, name.removeprefix("predict_").removeprefix(BENCHMARK))
