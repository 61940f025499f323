"""The report of a folder, a sweep's or a run's: its files written, its numbers shown."""

from pathlib import Path

from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.report.answers import best_answers
from glmtuner.report.leaderboard import csv_of, markdown_of, show_ranking
from glmtuner.report.page import run_page, sweep_page
from glmtuner.report.pictures import by_knob, sweep_losses
from glmtuner.report.ranking import ranking
from glmtuner.report.run import show, write_run
from glmtuner.run_folder.files import write_bytes, write_text
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import FAILED, REPORT, REPORT_PAGE, SWEEP

LEADERBOARD, PICTURES = "leaderboard.csv", "pictures"


def report(path: Path) -> None:
    """Write the folder's report and show it; raises CheckpointError for a folder that is neither a sweep nor a run."""
    if RunFolder(path).is_run:
        report_run(path)
    elif (path / SWEEP).is_file() or job_folders(path):
        report_sweep(path)
    else:
        failure = RunFolder(path).failure() if (path / FAILED).is_file() else None
        what = (
            f"the run failed before it started: {failure.get('reason')}" if failure
            else "it is neither a sweep nor a run" if path.is_dir() else "no such folder"
        )  # fmt: skip
        raise CheckpointError(
            f"report {path}: {what}; type python -m glmtuner report outputs/sweeps/<sweep>, or outputs/<date>/<run>"
        )


def report_sweep(root: Path) -> None:
    """Write report.md, report.html, leaderboard.csv and pictures/ into the sweep's folder, running or not, and show it."""
    board = ranking(root)
    pictures = [picture for picture in (sweep_losses(board), *by_knob(board)) if picture is not None]
    for picture in pictures:
        write_bytes(root / PICTURES / f"{picture.name}.png", picture.light)
    for stale in {*(root / PICTURES).glob("*.png")} - {root / PICTURES / f"{picture.name}.png" for picture in pictures}:
        stale.unlink(missing_ok=True)  # of an earlier report, when other knobs were varied
    files = [(f"{PICTURES}/{picture.name}.png", picture.about) for picture in pictures]
    write_text(root / LEADERBOARD, csv_of(board))
    write_text(root / REPORT, markdown_of(board, files, best_answers(board)))
    write_text(root / REPORT_PAGE, sweep_page(board, pictures))
    show_ranking(board)
    say(f"report: {root / REPORT_PAGE}, {REPORT}, {LEADERBOARD}, {PICTURES}/")


def report_run(path: Path) -> None:
    """Write report.md and report.html into the run's folder and show the run."""
    folder = RunFolder(path)
    write_run(folder, folder.metrics())
    write_text(folder / REPORT_PAGE, run_page(folder))
    show(path)
    say(f"report: {folder / REPORT_PAGE}, {REPORT}")
