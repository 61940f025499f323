"""Atomic writes, and reads whose errors name the file."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmtuner.console import say
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


def strict_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON (RFC 8259), non-ASCII characters kept: NaN and the infinities, which JSON lacks, become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        return [finite(item) for item in part] if isinstance(part, (list, tuple)) else part

    return json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, atomically; see `strict_json`."""
    write_text(path, strict_json(value, indent=2) + "\n")


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
    """The JSON objects of a JSON Lines file; a truncated last line is skipped, any other that is none is skipped and named."""
    if not path.is_file():
        return
    # not splitlines(): answers may hold U+2028, U+2029 or U+0085, which JSON does not escape
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last], start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            yield value
        elif line.strip() and number <= len(lines):
            say(f"{path}: line {number} is not a JSON object and is left out")
