"""The budget of a running sweep: its jobs count their hours in the sweep's folder, and none starts once a limit is reached."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmtuner.config.budget import Budget
from glmtuner.run_folder.spent import ROOT, hours_spent


def reached(root: Path, budget: Budget) -> list[str]:
    """A clause for each limit that the sweep in the folder has reached, over all attempts; raises CheckpointError for a damaged file."""
    if not budget.limits():
        return []
    hours = hours_spent(root)
    return budget.passed(hours.gpu, hours.cpu)


@contextmanager
def hours_in(root: Path) -> Iterator[None]:
    """Within it, the runs of this process and of those that it starts count their hours in the sweep's folder."""
    before = os.environ.get(ROOT)
    os.environ[ROOT] = str(root.resolve())
    try:
        yield
    finally:
        os.environ.pop(ROOT)
        if before is not None:
            os.environ[ROOT] = before
