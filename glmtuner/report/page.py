"""report.html: a self-contained page that loads nothing, so it opens offline, and runs no scripts."""

from base64 import b64encode
from datetime import datetime
from pathlib import Path
from typing import Any

from glmtuner import __version__
from glmtuner.console import plain
from glmtuner.errors import CheckpointError
from glmtuner.report.answers import best_answers
from glmtuner.report.benchmarks import SUBJECT, benchmarks_table, method_of_bounds
from glmtuner.report.jobs import read_job
from glmtuner.report.leaderboard import (
    EXPORT,
    UNRANKED_HEADER,
    leaderboard_table,
    method_note,
    score_with_interval,
    unranked_row,
    winner_facts,
)
from glmtuner.report.pareto import Front
from glmtuner.report.plots import Plot, plot_run_loss
from glmtuner.report.ranking import Ranking, build_row, format_score, metric_title
from glmtuner.report.run import MISSING, answers_table, format_number, run_facts, sampled_table, scores_before_training
from glmtuner.run_folder.folder import RunFolder


def render(template: str, **variables: Any) -> str:
    """The HTML of a template in this package; the variables are escaped, and hold nothing that a terminal obeys."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def without_controls(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=without_controls,
    )  # fmt: skip
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{b64encode(png).decode()}"
    written = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, glmtuner {__version__}"
    return environment.get_template(template).render(written=written, **variables)


def sweep_page(ranking: Ranking, plots: list[Plot], front: Front | None = None) -> str:
    """The report of a sweep as HTML."""
    header, rows = leaderboard_table(ranking, ranking.scores, knob_columns=True)
    row_classes = []
    for row in ranking.rows:
        row_classes += ["best" if row is ranking.winner else "", *("seed" for _ in row.seeds)]
    answers_header, answers = best_answers(ranking)
    return render(
        "sweep.html",
        name=ranking.root.resolve().name,
        ranking=ranking,
        front=front,
        objective=metric_title(ranking.objective or ""),
        winner=winner_facts(ranking),
        export=EXPORT,
        header=header,
        rows=[*zip(rows, row_classes, strict=True)],
        plots=plots,
        answers_header=answers_header,
        answers=answers,
        unranked_header=UNRANKED_HEADER,
        unranked=[unranked_row(job, ranking) for job in ranking.unranked],
        method=method_note(ranking.has_differences),
    )


def run_page(folder: RunFolder) -> str:
    """The report of a run as HTML, finished or not; raises CheckpointError if the folder holds no run."""
    config = folder.config(complete=True)
    job = read_job(folder)
    if job is None:
        raise CheckpointError(f"{folder.path} was removed while it was read")
    notes: list[str] = []
    row = build_row([job], [], notes)
    before = scores_before_training(folder)
    scores = [
        [
            name,
            format_number(value) if isinstance(value, int) else score_with_interval(row, name),
        ]  # no decimals of a count
        for name, value in job.metrics.items()
        if not name.startswith(SUBJECT)  # in the table of benchmarks
    ]
    if before:
        scores = [[*cells, format_score(cells[0], before[cells[0]]) if cells[0] in before else ""] for cells in scores]
    answers_header, answers = answers_table(folder)
    sampled_header, sampled = sampled_table(folder)
    benchmarks_header, benchmarks = benchmarks_table(folder)
    plot = plot_run_loss(folder)
    return render(
        "run.html",
        name=folder.path.resolve().name,
        state=job.state.value,
        reason=job.reason,
        facts=[*run_facts(config, folder.provenance()), ("weights", str(folder.trained() or MISSING))],
        scores=scores,
        scores_header=["metric", "value", *(["before training"] if before else [])],
        notes=notes,
        method=method_note(paired=False) if row.intervals else "",
        plots=[plot] if plot else [],
        benchmarks_header=benchmarks_header,
        benchmarks=benchmarks,
        benchmarks_method=method_of_bounds(folder),
        answers_header=answers_header,
        answers=answers,
        sampled_header=sampled_header,
        sampled=sampled,
    )
