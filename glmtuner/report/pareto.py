"""The Pareto front of a sweep with two objectives: the jobs that no other job beats in one of them and equals in the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtuner.config.objective import less_is_better, measured_as, objectives_of
from glmtuner.report.escape import markdown_line, one_line
from glmtuner.report.jobs import Job
from glmtuner.report.leaderboard import format_cost
from glmtuner.report.plots import COLOURS, LOG_SCALE_RATIO, OTHERS_COLOUR, Plot
from glmtuner.report.ranking import COSTS, Ranking, format_score, metric_title
from glmtuner.report.run import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Front:
    """The measured jobs of a sweep with two objectives, keys of metrics.json."""

    objectives: tuple[str, str]
    best: list[Job]  # those on the front, ordered by the first objective, the best first
    others: list[Job]
    labels: dict[str, str]  # of the jobs' values, by the names of their folders

    def header(self) -> list[str]:
        """The heading of each column of `rows`."""
        return [*map(metric_title, self.objectives), "settings"]

    def rows(self) -> list[list[str]]:
        """The jobs on the front: both values and the settings."""
        return [[*(format_value(name, job) for name in self.objectives), self.labels[job.name]] for job in self.best]

    def sentence(self) -> str:
        """What the front is, in one line."""
        first, second = map(metric_title, self.objectives)
        return (
            f"{len(self.best)} of {len(self.best) + len(self.others)} jobs are on the Pareto front of {first} and {second}: no other "
            "job is better in one of them without being worse in the other."
        )


def format_value(name: str, job: Job) -> str:
    """The job's value of the metric, with the unit of a cost."""
    return format_cost(name, job.metrics) if name in COSTS else format_score(name, job.metrics[name])


def pareto_front(ranking: Ranking) -> Front | None:
    """The front of a sweep whose jobs name two objectives; None for other sweeps, and where no job measured both."""
    jobs = [job for row in ranking.rows for job in row.jobs]
    asked = next((names for job in jobs if len(names := objectives_of(job.values.get("objective"))) == 2), None)
    if asked is None:
        return None
    keys = [next((key for job in jobs if (key := measured_as(name, job.metrics))), None) for name in asked]
    if None in keys:
        return None
    first, second = map(str, keys)
    measured = [job for job in jobs if all(math.isfinite(job.metrics.get(name, math.nan)) for name in (first, second))]
    if not measured:
        return None
    best = [job for job in measured if not any(dominates(other, job, (first, second)) for other in measured)]
    best.sort(key=lambda job: [_cost(name, job.metrics[name]) for name in (first, second)])
    labels = {job.name: job.label(ranking.knobs) for job in measured}
    return Front((first, second), best, [job for job in measured if job not in best], labels)


def dominates(one: Job, other: Job, objectives: Sequence[str]) -> bool:
    """Whether one job is at least as good in every objective, and better in one."""
    pairs = [(_cost(name, one.metrics[name]), _cost(name, other.metrics[name])) for name in objectives]
    return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


def _cost(name: str, value: float) -> float:
    return value if less_is_better(name) else -value


def plot_front(front: Front | None) -> Plot | None:
    """One objective against the other, a point for each job; the front as a line of steps. None without a front."""
    if front is None:
        return None
    first, second = front.objectives

    def points(jobs: Sequence[Job]) -> tuple[list[float], list[float]]:
        return [job.metrics[second] for job in jobs], [job.metrics[first] for job in jobs]

    def paint(axes: "Axes") -> None:
        if front.others:
            axes.scatter(*points(front.others), s=30, color=OTHERS_COLOUR, alpha=0.7, linewidths=0, label="other jobs")
        along = sorted(front.best, key=lambda job: job.metrics[second])
        # between two jobs of the front nothing better than the worse of them was measured
        axes.step(
            *points(along),
            where="post" if less_is_better(second) else "pre",
            color=COLOURS[1],
            linewidth=1.4,
            alpha=0.8,
        )
        axes.scatter(*points(along), s=46, color=COLOURS[1], linewidths=0, label="the Pareto front", zorder=3)
        costs = [job.metrics[second] for job in (*front.best, *front.others)]
        if min(costs) > 0 and max(costs) / min(costs) > LOG_SCALE_RATIO:
            axes.set_xscale("log")
        axes.margins(0.08)
        axes.set_xlabel(one_line(axis_title(second)))
        axes.set_ylabel(one_line(axis_title(first)))
        axes.figure.legend(loc="outside upper right", ncols=2, fontsize=9)

    caption = f"{metric_title(first)} against {metric_title(second)}, and the Pareto front of both"
    return Plot("pareto", caption, paint, size=(6.8, 4.2))


def front_markdown(front: Front | None) -> list[str]:
    """The section of report.md on the front; no lines without one."""
    if front is None:
        return []
    return [
        "",
        "## Pareto front",
        "",
        markdown_line(front.sentence()),
        "",
        *markdown_table(front.header(), front.rows()),
    ]


def show_front(front: Front | None) -> None:
    """Print the front."""
    from glmtuner.console import say, table

    if front is not None:
        table("", front.header(), front.rows(), lines=False)
        say(front.sentence())


def axis_title(name: str) -> str:
    """The metric's name on an axis, with the unit and which way is better."""
    units = {"train_runtime": " in seconds", "peak_memory_gib": " in GiB"}
    return f"{metric_title(name)}{units.get(name, '')} ({'lower' if less_is_better(name) else 'higher'} is better)"
