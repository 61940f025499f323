"""`show RUN`: the run on one page, in the terminal."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a run folder on one page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)


def run(given: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.report import show

    if overrides:
        raise ConfigError(
            f"show takes one run folder, and {overrides[0]!r} stands behind it: type python -m glmtuner show {given.run}"
        )
    show(given.run)
    return 0
