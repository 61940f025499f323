"""`python -m glmtuner …`; the command line is in cli/."""

import sys

from glmtuner.cli.main import main


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
