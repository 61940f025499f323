"""Parts of a dataset's files that are read apart: by several processes, on several nodes, and again after a process was killed.

What a piece is depends on the files alone, so every process that looks at them finds the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from glmtuner.data.raw import Row
from glmtuner.data.readers import line_records, reads_lines, text_lines
from glmtuner.data.streams import COMPRESSIONS, data_suffix

if TYPE_CHECKING:
    from glmtuner.data.raw import Numbered
    from glmtuner.data.readers import Columns

PIECE_BYTES = 32 << 20  # of the files; a process that was killed loses at most this much work
LINE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")


class Span(NamedTuple):
    """A part of one file, or of a dataset in memory: bytes, row groups, batches or rows, by what it is; None: to the end."""

    label: str
    start: int
    end: int | None
    size: int  # bytes


Piece = tuple[Span, ...]


@dataclass
class Count:
    """How far a span has been read: the number of its last record, counted from the number before its first."""

    number: int = 0


@dataclass
class PieceRows:
    """The rows of a piece, numbered by their files from the `before` on; `counts` are how many numbers each file's spans took."""

    read: Callable[[Span, int, Count], Iterator[Row]]
    piece: Piece
    before: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        for span in self.piece:
            taken = self.counts.get(span.label, 0)
            count = Count()
            yield from self.read(span, self.before.get(span.label, 0) + taken, count)
            self.counts[span.label] = taken + count.number


def grouped(spans: Iterable[Span], size: int) -> list[Piece]:
    """The spans in pieces of at least half of `size` bytes, in their order: cut at a line's end, a span may be smaller than `size`."""
    pieces: list[Piece] = []
    group: list[Span] = []
    grown = 0
    for span in spans:
        group.append(span)
        grown += span.size
        if 2 * grown >= size:
            pieces.append(tuple(group))
            group, grown = [], 0
    return [*pieces, tuple(group)] if group else pieces


def spans_of(label: str, path: Path, size: int) -> list[Span]:
    """A file's spans of about `size` bytes; one span for a file that can only be read from its beginning."""
    total, suffix = path.stat().st_size, data_suffix(path)
    whole = [Span(label, 0, None, total)]
    if path.suffix.lower() in COMPRESSIONS:
        return whole
    if suffix == ".parquet":
        return parquet_spans(label, path) or whole
    if total <= size or suffix not in LINE_SUFFIXES or not reads_lines(path):
        return whole
    starts = [0]
    with path.open("rb") as file:
        for place in range(size, total, size):
            file.seek(place - 1)
            file.readline()  # to the end of the line that this place is in
            if starts[-1] < file.tell() < total:
                starts.append(file.tell())
    ends = [*starts[1:], total]
    return [Span(label, start, end, end - start) for start, end in zip(starts, ends, strict=True)]


def parquet_spans(label: str, path: Path) -> list[Span]:
    """The row groups of a parquet file; none of a file that is broken."""
    from glmtuner.data.arrow_files import BROKEN

    try:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(str(path)) as file:
            about = file.metadata
            return [Span(label, n, n + 1, about.row_group(n).total_byte_size) for n in range(about.num_row_groups)]
    except BROKEN:
        return []


def span_records(path: Path, span: Span, columns: Columns, first: int, count: Count) -> Numbered:
    """The records of a span that is not a whole file, the first of which has the number `first` + 1; raises Unreadable."""
    if data_suffix(path) == ".parquet":
        from glmtuner.data.arrow_files import parquet_records

        reading: Numbered = parquet_records(path, columns, range(span.start, int(span.end or 0)))
        for number, raw in reading:
            count.number = number
            yield first + number, raw
        return
    records = text_lines if data_suffix(path) == ".txt" else line_records
    yield from records(lines_between(path, span.start, int(span.end or 0), count), first + 1)


def lines_between(path: Path, start: int, end: int, count: Count) -> Iterator[bytes]:
    """The lines of a file from one place to another, both of which are beginnings of lines."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (line := file.readline()):
            start += len(line)
            count.number += 1
            yield line


def numbers_before(path: Path, span: Span) -> int:
    """How many numbers the records before a span of the file take; read anew, for an error's message."""
    if data_suffix(path) == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(str(path)) as file:
            return sum(file.metadata.row_group(number).num_rows for number in range(span.start))
    lines, left = 0, span.start
    with path.open("rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            lines += chunk[:left].count(b"\n")
            left -= len(chunk)
            if left <= 0:
                break
    return lines
