"""The logged lines of a run as columns of numbers, read on from where the last look at the file ended."""

import json
import math
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.run_folder.files import is_number

if TYPE_CHECKING:
    import numpy

CHUNK = 2**22  # bytes that are read at a time
LONGEST_LINE = 2**20  # bytes; a longer one is no line of numbers
TAILS = (2**11, 2**16)  # bytes at the end of a file in which its last lines are looked for


class Columns:
    """The numbers of a JSON Lines file by their names, each with the numbers of its lines. Texts are left out.

    `update` reads what was appended. A file that was replaced or cut is read anew. Lines that are damaged are counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.offset, self.lines, self.damaged = 0, 0, 0
        self.columns: dict[str, tuple[array[int], array[float]]] = {}
        self._file: tuple[int, int] | None = None  # device and inode
        self._begin = b""

    def update(self) -> bool:
        """Read what is new; returns whether anything is."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                begin = file.read(64)
                if (
                    (status.st_dev, status.st_ino) != self._file
                    or status.st_size < self.offset
                    or not begin.startswith(self._begin)
                ):
                    had = self.lines
                    self._forget()
                    self._file, self._begin = (status.st_dev, status.st_ino), begin
                else:
                    had = 0
                    if len(self._begin) < 64:
                        self._begin = begin
                before = self.lines
                while self._read_on(file):
                    pass
                return self.lines != before or had > 0
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            had = self.lines
            self._forget()
            return had > 0

    def _read_on(self, file: Any) -> bool:
        """Read a chunk of whole lines; False at the end, where a line without an end waits for its rest."""
        file.seek(self.offset)
        chunk = file.read(CHUNK)
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            if len(chunk) > LONGEST_LINE:  # it never was a line of a run
                self.damaged += 1
                self.offset += len(chunk)
                return True
            return False
        self.offset += end
        for line in parsed(chunk[:end]):
            self._add(line)
        return len(chunk) == CHUNK

    def _add(self, line: Any) -> None:
        if not isinstance(line, dict) or not is_number(line.get("step")):
            self.damaged += 1
            return
        number = self.lines
        for name, value in line.items():
            if value is None:
                value = math.nan
            elif not is_number(value):
                continue
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = (array("I"), array("d"))
            column[0].append(number)
            column[1].append(value)
        self.lines += 1

    @property
    def points(self) -> int:
        """How many numbers it holds."""
        return sum(len(values) for _, values in self.columns.values())

    def of(self, name: str) -> tuple["numpy.ndarray", "numpy.ndarray"]:
        """The numbers of the lines that have the name, uint32, and its values, float64; both empty where none has it."""
        import numpy

        lines, values = self.columns.get(name, (array("I"), array("d")))
        return numpy.array(lines, dtype=numpy.uint32), numpy.array(values, dtype=numpy.float64)


def parsed(chunk: bytes) -> list[Any]:
    """The values of whole lines; None for one that is not JSON."""
    try:  # one call for all of them takes a third of the time
        values = json.loads(b"[" + chunk.rstrip(b"\n").replace(b"\n", b",") + b"]")
        if len(values) == chunk.count(b"\n"):
            return list(values)
    except (ValueError, RecursionError):
        pass
    return [_parsed(line) for line in chunk.split(b"\n") if line.strip()]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def last_values(path: Path, wanted: str) -> dict[str, float]:
    """The last value of each name in the last lines of a file, in as many of them as it takes to find the wanted name."""
    for size in TAILS:
        values, is_whole = _last_values(path, size)
        if wanted in values or is_whole:
            break
    return values


def _last_values(path: Path, tail: int) -> tuple[dict[str, float], bool]:
    """The last values in so many bytes at the end, and whether that is the whole file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - tail, 0))
            content = file.read(tail)
    except OSError:
        return {}, True
    start = 0 if size <= tail else content.find(b"\n") + 1
    values: dict[str, float] = {}
    for line in reversed(parsed(content[start : content.rfind(b"\n") + 1])):
        if not isinstance(line, dict) or not is_number(line.get("step")):
            continue
        for name, value in line.items():
            if name not in values and (value is None or is_number(value)):
                values[name] = math.nan if value is None else value
    return values, size <= tail
