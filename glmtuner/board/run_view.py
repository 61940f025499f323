"""Everything about one run, as its page shows it."""

import math
import os
import stat
from pathlib import Path
from typing import Any

from glmtuner.board.index import Index
from glmtuner.board.records import Record
from glmtuner.errors import CheckpointError, GlmtunerError
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.names import (
    CONFIG,
    LOSS_PLOT,
    OUTPUT,
    PREDICTIONS,
    PROVENANCE,
    REPORT_PAGE,
    SAMPLED,
)

MOST_FILES = 500


def run_view(index: Index, record: Record) -> dict[str, Any]:
    """The answer to api/run."""
    index.refresh()
    with index.lock:
        row = index.rows.get(record.id)
        values, metrics, failure = dict(record.values), dict(record.metrics), dict(record.failure)
    if row is None:
        raise CheckpointError(f"{record.id!r} was removed meanwhile")
    provenance = readable_object(index, record, PROVENANCE)
    return {
        "row": row,
        "command": provenance.get("command") or command_of(failure),
        "cwd": provenance.get("cwd"),
        "plan": [],
        "config": values,
        "defaults": {},
        "yaml": text_of(index, record, CONFIG),
        "provenance": provenance,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "files": files_of(record.path),
        "failure": failure or None,
        "has": {
            "report": (record.path / REPORT_PAGE).is_file(),
            "predictions": (record.path / PREDICTIONS).is_file(),
            "samples": bool(values),
            "log": bool(logs_of(record.path)),
            "sampled": (record.path / SAMPLED).is_file(),
            "picture": (record.path / LOSS_PLOT).is_file(),
        },
    }


def file_of(index: Index, record: Record, name: str) -> Path:
    """The path of one of the run's files; raises CheckpointError unless it is a file in the board's folder."""
    path = (record.path / name).resolve()
    if not path.is_relative_to(index.root.path) or not path.is_file():
        raise CheckpointError(f"{name[:200]!r} is no file of {record.id!r}")
    return path


def command_of(failure: dict[str, Any]) -> str | None:
    """The command line of a run that failed before it wrote its provenance."""
    words = failure.get("words")
    return " ".join(["python -m glmtuner", *map(str, words)]) if isinstance(words, list) else None


def readable_object(index: Index, record: Record, name: str) -> dict[str, Any]:
    """The content of one of the run's JSON files; what is wrong with it under `error` where it cannot be read."""
    if not (record.path / name).exists():
        return {}
    try:
        return read_object(file_of(index, record, name))
    except GlmtunerError as error:
        return {"error": str(error)}


def text_of(index: Index, record: Record, name: str) -> str:
    """The content of one of the run's text files; empty where it cannot be read."""
    try:
        return file_of(index, record, name).read_text(encoding="utf-8", errors="replace")
    except (GlmtunerError, OSError):
        return ""


def files_of(path: Path) -> list[dict[str, Any]]:
    """Names and sizes of the files in a run folder and below it, at most MOST_FILES; links are not followed."""
    found: list[dict[str, Any]] = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            try:
                status = os.lstat(file)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and len(found) < MOST_FILES:
                found.append({"name": file.relative_to(path).as_posix(), "bytes": status.st_size})
    return found


def logs_of(path: Path) -> list[str]:
    """The names of the run's files of output: that of a job of a sweep, and those of ranks."""
    return [OUTPUT] if (path / OUTPUT).is_file() else []
