"""`status SWEEP`: which jobs are queued, running, done, failed or dropped, how far they are, and how long they will take."""

import argparse
import shlex
import time
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "the jobs of a sweep (or a run) while it runs"
LONGEST_WAIT = 86400.0  # seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a sweep under outputs/sweeps, or a run folder")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="again every so many seconds, until no job is left"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.sweep.closing import report_at_the_end
    from glmtuner.sweep.status import is_over, lines_of, show

    folder, watch = arguments.folder, arguments.watch
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: status takes one folder and no overrides; type python -m glmtuner status {shlex.quote(str(folder))}"
        )
    if watch is not None and not 0 < watch <= LONGEST_WAIT:
        raise ConfigError(f"--watch {watch:g}: a number of seconds is expected, more than 0; type --watch 30")
    while True:
        lines = lines_of(folder)
        show(folder, lines)
        if watch is None or is_over(lines):
            report_at_the_end(folder, lines)
            return 0
        time.sleep(watch)
