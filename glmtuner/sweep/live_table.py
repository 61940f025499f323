"""A table of a sweep's jobs at the bottom of the terminal, while jobs run in other processes or together in this one."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmtuner.console import MARGIN, MUTED, TABLE, LiveRegion, aligned, live_region, say
from glmtuner.errors import CheckpointError
from glmtuner.sweep.status import ORDER, Line, lines_of, summary

LAUNCHERS = (
    "JoblibLauncher",
    "SharedLauncher",
    "RayLauncher",
)  # of the others each job shows a line of its own, or SLURM has its output
DRAW_SECONDS = 1.0  # between two drawings
SHARE = 0.05  # of the time that may be spent on reading the folders


@contextmanager
def live_table(root: Path, target: str) -> Iterator[None]:
    """Show the table while this lasts, for a sweep in `root` by the launcher `target`; without a terminal there is none."""
    if not target.endswith(LAUNCHERS):
        yield
        return
    with live_region() as region:
        if region is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=keep_drawing, args=(region, root, ended), daemon=True)
        thread.start()
        os.environ[TABLE] = "1"  # joblib's processes share the terminal: their lines would tear the table apart
        try:
            yield
        finally:
            os.environ.pop(TABLE, None)
            ended.set()
            thread.join()


def keep_drawing(region: LiveRegion, root: Path, ended: threading.Event) -> None:
    """Draw the table until the event is set. An error ends the table, which one line says, and nothing else."""
    pause = DRAW_SECONDS
    MUTED.set(True)  # what is wrong with a folder is said by who uses it, not in every drawing
    while not ended.wait(pause):
        start = time.monotonic()
        try:
            lines = lines_of(root)
            if not ended.is_set():
                region.draw(table_lines(root, lines, *region.size()))
        except CheckpointError:  # no job has a folder yet
            pass
        except Exception as error:
            region.clear()
            MUTED.set(False)
            say(
                f"the table of the jobs is switched off ({type(error).__name__}: {error}); python -m glmtuner status {root} shows it"
            )
            return
        pause = max(DRAW_SECONDS, (time.monotonic() - start) / SHARE)


def table_lines(root: Path, lines: Sequence[Line], columns: int, rows: int) -> list[str]:
    """The jobs, those that run first, as many as there are rows for, and a line about all of them."""
    ordered = sorted(lines, key=lambda line: ORDER.index(line.state))
    most = max(rows - 4, 1)
    shown = ordered if len(ordered) <= most else ordered[: most - 1] if most > 1 else ordered[:1]
    cells = [["job", "state", "step", "loss", "speed", "left"]]
    for line in shown:
        name, state, step, speed, left, _ = line.cells()
        cells.append([name, state, step, "" if line.loss is None else f"{line.loss:.4g}", speed, left])
    more = [f"and {len(ordered) - len(shown)} more"] if len(shown) < len(ordered) else []
    return [*aligned(cells, columns - MARGIN), *more, f"{summary(lines)}: {root}"]
