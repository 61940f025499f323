"""Writes and shows the report of a folder: of a sweep or of a run."""

from pathlib import Path

from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.report.answers import best_answers
from glmtuner.report.leaderboard import leaderboard_csv, show_ranking, sweep_markdown
from glmtuner.report.page import run_page, sweep_page
from glmtuner.report.pareto import front_markdown, pareto_front, plot_front, show_front
from glmtuner.report.plots import plot_by_knob, plot_sweep_losses
from glmtuner.report.ranking import rank_sweep
from glmtuner.report.run import show_run, write_run_markdown
from glmtuner.run_folder.files import write_bytes, write_text
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import FAILED, REPORT, REPORT_PAGE, SWEEP

LEADERBOARD, PLOTS = "leaderboard.csv", "pictures"


def write_report(path: Path) -> None:
    """Write the folder's report and print it; raises CheckpointError if it is the folder of neither a sweep nor a run."""
    if RunFolder(path).is_run:
        write_run_report(path)
    elif (path / SWEEP).is_file() or job_folders(path):
        write_sweep_report(path)
    else:
        failure = RunFolder(path).failure() if (path / FAILED).is_file() else None
        problem = (
            f"the run failed before it started: {failure.get('reason')}" if failure
            else "it is neither a sweep nor a run" if path.is_dir() else "no such folder"
        )  # fmt: skip
        raise CheckpointError(
            f"report {path}: {problem}; type python -m glmtuner report outputs/sweeps/<sweep>, or outputs/<date>/<run>"
        )


def write_sweep_report(root: Path) -> None:
    """Write report.md, report.html, leaderboard.csv and pictures/ into the sweep's folder, and print the ranking.

    The sweep need not be finished. Plots of an earlier report that this one does not have are removed.
    """
    ranking = rank_sweep(root)
    front = pareto_front(ranking)
    drawn = (plot_front(front), plot_sweep_losses(ranking), *plot_by_knob(ranking))
    plots = [plot for plot in drawn if plot is not None]
    files = {root / PLOTS / f"{plot.name}.png": plot for plot in plots}
    for file, plot in files.items():
        write_bytes(file, plot.light)
    for outdated in {*(root / PLOTS).glob("*.png")} - files.keys():
        outdated.unlink(missing_ok=True)
    captions = [(f"{PLOTS}/{plot.name}.png", plot.caption) for plot in plots]
    write_text(root / LEADERBOARD, leaderboard_csv(ranking))
    write_text(root / REPORT, sweep_markdown(ranking, captions, best_answers(ranking), front_markdown(front)))
    write_text(root / REPORT_PAGE, sweep_page(ranking, plots, front))
    show_ranking(ranking)
    show_front(front)
    say(f"report: {root / REPORT_PAGE}, {REPORT}, {LEADERBOARD}, {PLOTS}/")


def write_run_report(path: Path) -> None:
    """Write report.md and report.html into the run folder, and print the run."""
    folder = RunFolder(path)
    write_run_markdown(folder, folder.metrics())
    write_text(folder / REPORT_PAGE, run_page(folder))
    show_run(path)
    say(f"report: {folder / REPORT_PAGE}, {REPORT}")
