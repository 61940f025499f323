"""The files of a run or a sweep that the page shows: its report, its pictures, its log."""

import os
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.names import OUTPUT

# A report holds its styles and its pictures, and runs nothing; it is shown in a frame without an origin of its own.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
MOST_OF_LOG = 2**18  # bytes in one answer


def file_in(root: Path, folder: Path, name: str) -> Path:
    """The regular file of this name in the folder; raises CheckpointError for any path that leads out of it, and for links out of it."""
    parts = name.split("/")
    problem = CheckpointError(f"{name[:200]!r} is no file of {folder.relative_to(root).as_posix()}")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        raise problem
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise problem from None
    if not path.is_relative_to(folder) or not path.is_file():
        raise problem
    return path


def picture_of(root: Path, folder: Path, name: str) -> tuple[Path, str]:
    """The picture of this name in the folder, and its media type."""
    path = file_in(root, folder, name)
    if path.suffix.lower() not in PICTURES:
        raise CheckpointError(f"{name[:200]!r} is no picture: legal are files that end with {', '.join(PICTURES)}")
    return path, PICTURES[path.suffix.lower()]


def pictures_of(folder: Path) -> list[str]:
    """The names of the pictures in a run's or a sweep's folder, and in its folder of pictures."""
    found = []
    for below in (".", "pictures"):
        try:
            names = sorted(os.listdir(folder / below))
        except OSError:
            continue
        found += [
            name if below == "." else f"{below}/{name}" for name in names if Path(name).suffix.lower() in PICTURES
        ]
    return found


def log_of(root: Path, folder: Path, offset: int | None) -> dict[str, Any]:
    """A part of the output of a run: from the offset on, or the end of it; `offset` in the answer is where to read on.

    A file that is shorter than the offset was begun anew, and is read from its start.
    """
    try:
        path = file_in(root, folder, OUTPUT)
    except CheckpointError:
        return {"text": "", "offset": 0, "size": 0, "start": 0}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - MOST_OF_LOG, 0) if offset is None else 0 if offset > size else offset
        file.seek(start)
        content = file.read(MOST_OF_LOG)
    content = content[: len(content) - incomplete_bytes(content)]
    text = content.decode("utf-8", errors="replace")
    return {"text": text, "offset": start + len(content), "size": size, "start": start}


def incomplete_bytes(content: bytes) -> int:
    """How many bytes at the end are the beginning of a character whose rest is not there yet."""
    for count in range(1, min(4, len(content) + 1)):
        first = content[-count]
        if first >= 0xC0:
            length = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return count if count < length else 0
        if first < 0x80:
            return 0
    return 0
