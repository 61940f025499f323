"""Checkpoints in a run folder: which are complete, and which is the latest."""

import os
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.names import CHECKPOINTS, MARKER


def mark_complete(folder: Path, about: dict[str, Any]) -> None:
    """Write the marker: every file of the checkpoint with its size, all of them on the disk before it."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MARKER, {**about, "files": files})


REQUIRED_FILES = {
    "optimizer.pt": "its optimizer state",
    "scheduler.pt": "its scheduler state",
    "trainer_state.json": "its step",
}


def checkpoint_problem(folder: Path, ranks: int | None = None) -> str | None:
    """Why a checkpoint cannot be resumed from (by so many ranks), in a few words; None when it is whole."""
    if not (folder / MARKER).is_file():
        return f"half-written: it has no {MARKER}"
    try:
        about = read_json(folder / MARKER)
        sizes = about["files"]
    except (CheckpointError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    for name, what in REQUIRED_FILES.items():
        if not (folder / name).is_file():
            return f"it lacks {what} ({name})"
    if not list(folder.glob("rng_state*.pth")):
        return "it lacks its random states (rng_state.pth)"
    if ranks not in (None, about.get("ranks", 1)):
        return f"{about.get('ranks', 1)} processes wrote it, and this run has {ranks}"
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
    """The run's checkpoints, oldest step first, whole or not."""
    found = [path for path in (run / CHECKPOINTS).glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def latest_complete_checkpoint(run: Path, ranks: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint to resume from, and a sentence for each one that was passed over."""
    passed = [f"{path.name} is passed over: half-written" for path in sorted((run / CHECKPOINTS).glob(".partial-*"))]
    for folder in reversed(checkpoints(run)):
        reason = checkpoint_problem(folder, ranks)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} is passed over: {reason}")
    return None, passed
