"""Atomic writes, and reads whose errors name the file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name, flushed to the disk, then renamed. Parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, atomically; non-ASCII characters are kept."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The parsed value; raises CheckpointError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The parsed JSON object; raises CheckpointError if the file is damaged or holds another type."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (it is not a JSON object)")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSON Lines file; lines that are not one, such as a truncated last line, are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
