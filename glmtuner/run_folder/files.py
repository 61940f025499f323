"""Atomic writes, and reads whose errors name the file."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from glmtuner.console import UNPRINTABLE, say
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.names import PARTIAL

MAX_NAMED_LINES = 3  # of the lines of a file that are left out


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name, flushed to the disk, then renamed. Parent folders are created.

    Several processes may write the same file at once, as searches that share a folder do: one after another, each of them whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with _opened_alone(partial) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":
                partial.replace(path)  # while the lock is held: afterwards the name may be another process's
        if os.name != "posix":
            partial.replace(path)  # Windows renames no open file
    except OSError:
        with suppress(OSError):
            partial.unlink()  # a full disk needs the space
        raise


def _opened_alone(partial: Path) -> BinaryIO:
    """The empty file, locked against other processes and threads that open it here (not on Windows)."""
    try:
        import fcntl
    except ImportError:
        return partial.open("wb")
    while True:
        file = partial.open("ab")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                file.truncate(0)  # of a process that was killed
                return file
        file.close()  # it was renamed by who had the lock


def strict_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON (RFC 8259): NaN and the infinities, which JSON lacks, become null.

    Non-ASCII characters are kept, but for those that a terminal obeys (`console.UNPRINTABLE`): they are escaped, so that a file can
    be looked at, and lone surrogates can be encoded.
    """

    def finite(part: Any) -> Any:
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        return [finite(item) for item in part] if isinstance(part, (list, tuple)) else part

    text = json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, atomically; see `strict_json`."""
    write_text(path, strict_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The parsed value; raises CheckpointError if the file is damaged or cannot be read."""
    require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} is damaged (it is nested too deeply)") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def require_file(path: Path) -> None:
    """Raise CheckpointError unless the path is a file: a folder, a dangling link, or a pipe, which would be read for ever."""
    if not path.is_file():
        problem = "it is not a file" if os.path.lexists(path) else "it is missing"
        raise CheckpointError(f"{path} cannot be read ({problem})")


def read_object(path: Path) -> dict[str, Any]:
    """The parsed JSON object; raises CheckpointError if the file is damaged or holds another type."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (it is not a JSON object)")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSON Lines file; a truncated last line is skipped, any other that is none is skipped and named.

    Nothing if there is no such file; raises CheckpointError if it cannot be read.
    """
    if not os.path.lexists(path):
        return
    require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    # not splitlines(): answers may hold U+2028, U+2029 or U+0085, which JSON does not escape
    lines = content.split(b"\n")
    skipped = []
    for number, line in enumerate(lines, start=1):
        value = _object_or_none(line)
        if value is not None:
            yield value
        elif line.strip() and number < len(lines):
            skipped.append(number)
    for number in skipped[:MAX_NAMED_LINES]:
        say(f"{path}: line {number} is not a JSON object and is left out")
    if len(skipped) > MAX_NAMED_LINES:
        say(f"{path}: {len(skipped) - MAX_NAMED_LINES:,} more lines are not JSON objects and are left out")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a float, or an int that a float can hold, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _object_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None
    return value if isinstance(value, dict) else None
