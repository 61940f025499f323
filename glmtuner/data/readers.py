"""Readers, one for each file type; each yields (number, record)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmtuner.data.json_stream import array_records, broken
from glmtuner.data.raw import Numbered, Unreadable, as_record, decoded, listed, message_of, not_utf8, reason_of
from glmtuner.data.records import BadRecord, shown


def json_records(path: Path) -> Numbered:
    """The objects of an array, by itself or as `data` of an object; a .json file with an object on each line works, too.

    An array by itself is read lazily; one inside an object is read as a whole.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if head.startswith(b"["):
            yield from array_records(file)
            return
        if head.startswith(b"{"):
            lines = (line for line in file if line.strip())
            if is_object(next(lines)) and next(lines, None):
                yield from jsonl_records(path)
                return
    text = decoded(path.read_bytes())
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is {'empty' if not text.strip() else broken(error, text)}") from None
    if isinstance(document, dict):
        document = document.get("data", document)
    if not isinstance(document, list):
        raise Unreadable(
            f"holds {kind_of(json.loads(text))} where an array of objects is expected; put it in [ ], or rename the file "
            "to .jsonl if each line is a record"
        )
    yield from ((number, as_record(value)) for number, value in enumerate(document, start=1))


def jsonl_records(path: Path) -> Numbered:
    """The object on each line; a line that is not an object is a bad record, and blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, f" of line {number}").strip()
            if not text:
                continue
            try:
                yield number, as_record(json.loads(text))
            except json.JSONDecodeError as error:
                yield number, BadRecord("", f"not JSON: {message_of(error)} at column {error.colno}")


def csv_records(path: Path) -> Numbered:
    """The rows under a header line; quoting is strict, since a stray quote would swallow the rows after it."""
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            header = list(rows.fieldnames or [])
            if len(set(header)) < len(header):
                raise Unreadable(f"names a column twice in its header: {', '.join(header)}")
            for number, row in enumerate(rows, start=1):
                complete = None not in row and None not in row.values()
                yield (
                    number,
                    row if complete else BadRecord("", f"the row does not have the {len(header)} cells of the header"),
                )
        except csv.Error as error:
            raise Unreadable(f"is not CSV at line {rows.reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise not_utf8(error) from None


def parquet_records(path: Path) -> Numbered:
    """The rows of a parquet file, a batch at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise Unreadable(f"is not a readable parquet file: {reason_of(error)}") from None


def text_records(path: Path) -> Numbered:
    """The lines of a plain text file as records with one column, `text`; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, f" of line {number}").rstrip("\n")
            if text.strip():
                yield number, {"text": text.rstrip("\r")}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".json": json_records,
    ".jsonl": jsonl_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
    ".txt": text_records,
}


def is_object(line: bytes) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def kind_of(document: Any) -> str:
    """What a JSON document is, for an error."""
    return f"one object ({listed(list(document))})" if isinstance(document, dict) else shown(document)
