"""`report FOLDER`: the results of a sweep, running or finished, or of one run; on the terminal and as a page."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a sweep (or a run) as tables, plots and a page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a sweep under outputs/sweeps, or a run folder")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.report import write_report

    if overrides:
        raise ConfigError(
            f"{overrides[0]}: report takes one folder and no overrides; type python -m glmtuner report {arguments.folder}"
        )
    write_report(arguments.folder)
    return 0
