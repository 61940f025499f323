"""`python -m glmtuner …`; the command line is in cli/."""

import os
import sys

from glmtuner.cli import streams
from glmtuner.cli.main import SIGPIPE, main
from glmtuner.distributed.ranks import Leaving


def run() -> None:
    """The console script."""
    with Leaving():
        run_and_exit()


def run_and_exit() -> None:
    """Run the command line and exit with its code."""
    streams.prepare()
    code = main()
    try:
        sys.stdout.flush()
    except streams.ReaderGone:
        code = code or 128 + SIGPIPE
    except OSError as error:  # `> file` on a full disk
        if not code:
            print(f"glmtuner: standard output cannot be written ({os.strerror(error.errno or 0)})", file=sys.stderr)
        streams.discard(1)
        code = code or 1
    sys.exit(code)


if __name__ == "__main__":
    run()
