"""`show RUN`: the run on one page, in the terminal."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a run folder on one page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.report import show_run

    if overrides:
        raise ConfigError(
            f"{overrides[0]}: show takes one run folder and no overrides; type python -m glmtuner show {arguments.run}"
        )
    show_run(arguments.run)
    return 0
