"""Files that are written whole or not at all, and read with errors that name them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name, to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The file's value; raises CheckpointError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The file's object; raises CheckpointError when it is damaged, or holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged (it holds no keys)")
    return found


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line that a kill cut short is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
