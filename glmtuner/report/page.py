"""report.html: one page that holds all it shows, opens without a network and runs no script."""

from base64 import b64encode
from datetime import datetime
from pathlib import Path
from typing import Any

from glmtuner import __version__
from glmtuner.errors import CheckpointError
from glmtuner.report.answers import best_answers
from glmtuner.report.jobs import read_job
from glmtuner.report.leaderboard import method_told, score_with_interval, table_of, told_of, winner_told
from glmtuner.report.pictures import Picture, run_loss
from glmtuner.report.ranking import Ranking, row_of, score, title
from glmtuner.report.run import MISSING, answers, facts, scores_before
from glmtuner.run_folder.folder import RunFolder


def filled(template: str, **given: Any) -> str:
    """A template of this folder, filled; whatever comes from data is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters["inline"] = lambda png: f"data:image/png;base64,{b64encode(png).decode()}"
    written = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, glmtuner {__version__}"
    return found.get_template(template).render(written=written, **given)


def sweep_page(board: Ranking, pictures: list[Picture]) -> str:
    """The report of a sweep as HTML."""
    header, rows = table_of(board, board.scores, knob_columns=True)
    marks = ["best" if row is board.winner else "" for row in board.rows]
    marks = [
        mark for row, first in zip(board.rows, marks, strict=True) for mark in (first, *("seed" for _ in row.seeds))
    ]
    answers_header, answered = best_answers(board)
    return filled(
        "sweep.html",
        name=board.root.resolve().name,
        board=board,
        objective=title(board.objective or ""),
        winner=winner_told(board),
        header=header,
        rows=[*zip(rows, marks, strict=True)],
        pictures=pictures,
        answers_header=answers_header,
        answers=answered,
        unfit=[told_of(job, board) for job in board.others],
        method=method_told(board.paired),
    )


def run_page(folder: RunFolder) -> str:
    """The report of a run as HTML, finished or not; raises CheckpointError for a folder that holds no run."""
    config = folder.config()
    job = read_job(folder)
    if job is None:
        raise CheckpointError(f"{folder.path} went away while it was read")
    row = row_of([job], [], notes := [])
    before = scores_before(folder)
    scores = [[name, score_with_interval(row, name)] for name in job.metrics]
    if before:
        scores = [[*line, score(line[0], before[line[0]]) if line[0] in before else ""] for line in scores]
    header, rows = answers(folder)
    picture = run_loss(folder)
    trained = folder.trained()
    return filled(
        "run.html",
        name=folder.path.resolve().name,
        state=job.state.value,
        reason=job.reason,
        facts=[*facts(config, folder.provenance()), ("weights", str(trained) if trained else MISSING)],
        scores=scores,
        scores_header=["metric", "value", *(["before training"] if before else [])],
        notes=notes,
        method=method_told(paired=False) if row.intervals else "",
        pictures=[picture] if picture else [],
        answers_header=header,
        answers=rows,
    )
