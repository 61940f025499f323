"""A sweep as its page shows it: the leaderboard with intervals, the Pareto front, and the decisions of a race."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glmtuner.board.index import Index
from glmtuner.board.rows import shown
from glmtuner.board.sweeps import Sweep
from glmtuner.config.objective import less_is_better, measured_as, objectives_of
from glmtuner.report.bootstrap import Interval
from glmtuner.report.jobs import Job, format_value, value_of
from glmtuner.report.pareto import Front, pareto_front
from glmtuner.report.race import readable_race, rung_table, rung_title
from glmtuner.report.ranking import COSTS, Ranking, Row, format_score, metric_title, rank_jobs
from glmtuner.report.run import MISSING
from glmtuner.run_folder.names import REPORT_PAGE

SEARCH = "hydra/sweeper=optuna"


def sweep_view(index: Index, sweep: Sweep) -> dict[str, Any]:
    """The answer to api/sweep. Until the intervals are computed it has the ranking without them, and `pending` is true."""
    index.refresh()
    with index.lock:
        jobs = [*sweep.jobs.values()]
        rows = [row for row in index.rows.values() if row["sweep"] == sweep.id]
        rankings = index.rankings
        ranked = rankings.get(sweep) if rankings is not None else None
        is_pending = rankings is not None and rankings.is_pending(sweep)
        failure = rankings.failure(sweep) if rankings is not None else None
        summary = sweep.summary
        commands = list(sweep.commands)
    if ranked is None:
        ranking = rank_jobs(sweep.path, jobs, scored=lambda *_: {})
        ranked = {**ranking_view(ranking), "notes": [f"there are no intervals: {failure}"] if failure else []}
    rungs = readable_race(sweep.path)
    return {
        "id": sweep.id,
        "name": sweep.path.name,
        "command": commands[-1] if commands else None,
        "commands": commands,
        "objective": summary["objective"],
        "knobs": [{"key": key, "title": sweep.names.get(key, key)} for key in sweep.knobs],
        "summary": summary,
        **ranked,
        "pending": is_pending,
        "race": [race_view(rung) for rung in rungs] or None,
        "search": search_view(sweep, jobs),
        "jobs": rows,
        "has": {"report": (sweep.path / REPORT_PAGE).is_file()},
    }


def ranking_view(ranking: Ranking) -> dict[str, Any]:
    """A ranking as JSON: the leaderboard with its columns, notes, the winner, and the Pareto front."""
    objective = ranking.objective
    columns = [{"key": key, "title": title, "kind": "knob", "better": None} for key, title in ranking.knobs.items()]
    scores = [*ranking.scores, *(name for name in ranking.costs if name != "total_parameters")]
    columns += [
        {
            "key": name,
            "title": metric_title(name),
            "kind": "cost" if name in COSTS else "score",
            "better": "low" if less_is_better(name) else None if name in COSTS else "high",
        }
        for name in scores
    ]
    return {
        "leaderboard": {"columns": columns, "rows": [row_view(ranking, row, scores) for row in ranking.rows]},
        "winner": ranking.best_job.name if ranking.best_job else None,
        "ranked_by": objective,
        "notes": ranking.notes,
        "export": ranking.export_command,
        "pareto": front_view(pareto_front(ranking)),
    }


def row_view(ranking: Ranking, row: Row, scores: Sequence[str]) -> dict[str, Any]:
    """A row of the leaderboard; `differs` is whether its difference to the winner's objective is told apart, null if not known."""
    difference = row.difference
    return {
        "label": row.label,
        "jobs": [job.name for job in row.jobs],
        "seed": row.jobs[0].seed if len(row.jobs) == 1 else None,
        "settings": {knob: shown(value) for knob, value in row.settings.items()},
        "values": {name: finite(row.metrics.get(name)) for name in scores},
        "deviations": {name: finite(value) for name, value in row.std_devs.items() if name in scores},
        "intervals": bounds_of(row.intervals),
        "records": {name: interval.num_records for name, interval in row.intervals.items()},
        "difference": None if difference is None else [difference.value, difference.low, difference.high],
        "differs": None if difference is None else not row.tied,
        "seeds": [row_view(ranking, seed, scores) for seed in row.seeds],
    }


def bounds_of(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    """The bounds by the names of the metrics."""
    return {name: [interval.low, interval.high] for name, interval in intervals.items()}


def front_view(front: Front | None) -> dict[str, Any] | None:
    """The Pareto front as JSON."""
    if front is None:
        return None

    def points(jobs: Sequence[Job]) -> list[dict[str, Any]]:
        return [
            {
                "job": job.name,
                "label": front.labels[job.name],
                "values": [job.metrics[name] for name in front.objectives],
            }
            for job in jobs
        ]

    return {
        "objectives": [
            {"key": name, "title": metric_title(name), "better": "low" if less_is_better(name) else "high"}
            for name in front.objectives
        ],
        "best": points(front.best),
        "others": points(front.others),
        "sentence": front.sentence(),
    }


def race_view(rung: dict[str, Any]) -> dict[str, Any]:
    """The decision of a rung with its evidence: a title and a table."""
    header, rows = rung_table(rung)
    return {"title": rung_title(rung), "header": header, "rows": rows}


def search_view(sweep: Sweep, jobs: Sequence[Job]) -> list[dict[str, Any]] | None:
    """The trials of a search, each with its values, what it measured, and why it was pruned; None for other sweeps."""
    if not sweep.commands or SEARCH not in sweep.commands[-1]:
        return None
    objectives = next((names for job in jobs if (names := objectives_of(job.values.get("objective")))), [])
    measured = {name for job in jobs for name in job.metrics}
    keys = [key for name in objectives if (key := measured_as(name, measured)) is not None]
    rows = [
        [
            *(format_value(value_of(job, knob)) for knob in sweep.knobs),
            *(format_score(key, job.metrics[key]) if key in job.metrics else MISSING for key in keys),
            job.state.value,
            job.reason,
        ]
        for job in jobs
    ]
    header = [*(sweep.names[knob] for knob in sweep.knobs), *map(metric_title, keys), "state", "why"]
    return [{"title": "trials", "header": header, "rows": rows}]


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
