"""Everything about one run, as its page shows it."""

import math
import os
import stat
from pathlib import Path
from typing import Any

from glmtuner.board.index import Index
from glmtuner.board.records import Record
from glmtuner.board.run_files import file_in, pictures_of
from glmtuner.board.workers import Worker
from glmtuner.errors import CheckpointError, GlmtunerError
from glmtuner.run_folder.acquire import DERIVED_KEYS
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.names import (
    CONFIG,
    OUTPUT,
    PLAN,
    PREDICTIONS,
    PROVENANCE,
    REPORT_PAGE,
    SAMPLED,
)

MOST_FILES = 500
NOT_COMPARED = (*DERIVED_KEYS, "trainer.output_dir")  # with the defaults


def run_view(index: Index, record: Record, worker: Worker) -> dict[str, Any]:
    """The answer to api/run; the worker composes the defaults."""
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
        "plan": plan_of(index, record),
        "config": values,
        "defaults": defaults_of(record, values, worker),
        "yaml": text_of(index, record, CONFIG),
        "provenance": provenance,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "files": files_of(record.path),
        "failure": failure or None,
        "has": {
            "report": (record.path / REPORT_PAGE).is_file(),
            "predictions": (record.path / PREDICTIONS).is_file(),
            "samples": bool(values),
            "log": (record.path / OUTPUT).is_file(),
            "sampled": (record.path / SAMPLED).is_file(),
        },
        "pictures": pictures_of(record.path),
    }


def plan_of(index: Index, record: Record) -> list[list[str]]:
    """The table that the run printed before its training, a name and a text each; empty of a run that did not come so far."""
    rows = readable_object(index, record, PLAN).get("plan")
    return [[str(name), str(text)] for name, text in rows] if isinstance(rows, list) and all(map(is_pair, rows)) else []


def is_pair(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2


_defaults: dict[tuple[str, ...], dict[str, Any]] = {}  # by the presets that were chosen


def defaults_of(record: Record, values: dict[str, Any], worker: Worker) -> dict[str, Any] | None:
    """What the values that differ would be with the same presets and nothing else typed; None where that cannot be composed."""
    groups = {key.partition(".")[0] for key in values}
    words = tuple(
        f"{key}={value}" for key, value in record.overrides.items() if key in groups and isinstance(value, str)
    )
    if words not in _defaults:
        try:
            _defaults[words] = worker.ask("defaults", words=list(words))
        except GlmtunerError:
            return None
    defaults = _defaults[words]
    keys = [key for key in values if key in defaults and (key not in NOT_COMPARED or key in record.overrides)]
    return {key: defaults[key] for key in keys if defaults[key] != values[key]}


def command_of(failure: dict[str, Any]) -> str | None:
    """The command line of a run that failed before it wrote its provenance."""
    words = failure.get("words")
    return " ".join(["python -m glmtuner", *map(str, words)]) if isinstance(words, list) else None


def readable_object(index: Index, record: Record, name: str) -> dict[str, Any]:
    """The content of one of the run's JSON files; what is wrong with it under `error` where it cannot be read."""
    if not (record.path / name).exists():
        return {}
    try:
        return read_object(file_in(index.root.path, record.path, name))
    except GlmtunerError as error:
        return {"error": str(error)}


def text_of(index: Index, record: Record, name: str) -> str:
    """The content of one of the run's text files; empty where it cannot be read."""
    try:
        return file_in(index.root.path, record.path, name).read_text(encoding="utf-8", errors="replace")
    except (GlmtunerError, OSError):
        return ""


def files_of(path: Path) -> list[dict[str, Any]]:
    """Names and sizes of the files in a run folder and below it, at most MOST_FILES and an entry that says so; links are not followed."""
    found: list[dict[str, Any]] = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            try:
                status = os.lstat(file)
            except OSError:
                continue
            if len(found) == MOST_FILES:
                return [*found, {"name": "… and more", "bytes": None}]
            if stat.S_ISREG(status.st_mode):
                found.append({"name": file.relative_to(path).as_posix(), "bytes": status.st_size})
    return found
