"""`report FOLDER`: what came out of a sweep, running or ended, or of one run; on the terminal and as a page."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a sweep (or a run) as tables, pictures and a page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a sweep under outputs/sweeps, or a run folder")


def run(given: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.report import report

    if overrides:
        raise ConfigError(
            f"report takes one folder, and {overrides[0]!r} stands behind it: type python -m glmtuner report {given.folder}"
        )
    report(given.folder)
    return 0
