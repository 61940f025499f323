"""The checkpoints in a run folder: which are complete, and which complete one is the latest."""

import os
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.names import CHECKPOINTS, MARKER, PARTIAL


def mark_complete(folder: Path, about: dict[str, Any]) -> None:
    """Write the marker: `about` and the size of every file in the checkpoint, after flushing all of them to the disk."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes only files opened for writing
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_json(folder / MARKER, {**about, "files": sizes})


def saved_ranks(folder: Path) -> int:
    """The number of processes that wrote a complete checkpoint; raises CheckpointError where its marker is damaged."""
    return _counted(folder, "ranks") or 1


def saved_rows(folder: Path) -> int | None:
    """The rows of an optimizer step of the run that wrote a complete checkpoint, None of earlier versions; raises CheckpointError."""
    return _counted(folder, "rows_per_step")


def _counted(folder: Path, name: str) -> int | None:
    """What a checkpoint's marker counts under a name, at least 1; None where it does not."""
    about = read_json(folder / MARKER)
    value = about.get(name) if isinstance(about, dict) else ""
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder / MARKER} is damaged ({name} is {value!r}); use another checkpoint")
    return int(value)


REQUIRED_FILES = {
    "optimizer.pt": "optimizer state",
    "scheduler.pt": "scheduler state",
    "trainer_state.json": "trainer state",
}


def checkpoint_problem(folder: Path, ranks: int | None = None) -> str | None:
    """Why a checkpoint cannot be resumed from (with `ranks` processes), in a few words; None if it can."""
    if not (folder / MARKER).is_file():
        return f"incomplete: it has no {MARKER}"
    try:
        about = read_json(folder / MARKER)
        sizes = {str(name): int(size) for name, size in about["files"].items()}
        saved_by, rows = saved_ranks(folder), saved_rows(folder)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return f"its {MARKER} is damaged"
    for name, content in REQUIRED_FILES.items():
        if not (folder / name).is_file():
            return f"it has no {content} ({name})"
    if not list(folder.glob("rng_state*.pth")):
        return "it has no RNG state (rng_state.pth)"
    if ranks not in (None, saved_by) and rows is None:
        return f"it was saved by {saved_by} processes, by a version for which this run must have as many, and it has {ranks}"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} is truncated ({(folder / name).stat().st_size} of {size} bytes)"
    return None


def step_of(folder: Path) -> int:
    """The step in `checkpoint-<step>`; -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdecimal() else -1


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints by step, complete or not."""
    folders = [path for path in (run / CHECKPOINTS).glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of)


def latest_complete_checkpoint(run: Path, ranks: int | None = None) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that can be resumed from, and a sentence about each later one that was skipped."""
    skipped = [f"{path.name} is skipped: incomplete" for path in sorted((run / CHECKPOINTS).glob(f"{PARTIAL}-*"))]
    for folder in reversed(checkpoints(run)):
        problem = checkpoint_problem(folder, ranks)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder.name} is skipped: {problem}")
    return None, skipped
