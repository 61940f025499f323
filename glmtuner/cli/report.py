"""`report FOLDER`: the results of a sweep, running or finished, or of one run; on the terminal, as a page and as LaTeX."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a sweep (or a run) as tables, plots and a page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a sweep under outputs/sweeps, or a run folder")
    parser.add_argument(
        "--paper", choices=("en", "zh"), help="also write paper/: LaTeX tables, pictures, set-up and references"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.report import write_report

    if overrides:
        raise ConfigError(
            f"{overrides[0]}: report takes one folder and no overrides; type python -m glmtuner report {arguments.folder}"
        )
    write_report(arguments.folder)
    if arguments.paper:
        from glmtuner.report.paper import write_paper

        write_paper(arguments.folder, arguments.paper)
    return 0
