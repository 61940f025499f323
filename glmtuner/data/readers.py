"""Readers, one for each file type; each yields (number, record), with the columns that are asked for if the type allows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from glmtuner.data.arrow_files import arrow_records, parquet_records
from glmtuner.data.csv_files import csv_records
from glmtuner.data.json_stream import array_records, broken
from glmtuner.data.raw import Numbered, Unreadable, as_record, decoded, message_of, parsed, reason_of
from glmtuner.data.records import BadRecord, shown
from glmtuner.data.streams import BOMS, check_regular, data_suffix, open_utf8, read_errors

Columns = Collection[str] | None  # None: all
BLANK = b"\xef\xbb\xbf \t\r\n"  # white space, and the byte order mark before it


def file_records(path: Path, columns: Columns = None) -> Numbered:
    """The records of a file; of `columns` at least, where only these need to be decoded. Raises Unreadable."""
    check_regular(path)
    try:
        yield from READERS[data_suffix(path)](path, columns)
    except read_errors() as error:
        raise Unreadable(f"is not a readable {path.suffix.lower()} file: {reason_of(error)}") from None


def json_records(path: Path, columns: Columns = None) -> Numbered:
    """The objects of an array, on a line each, or of an array that is `data` of an object; the content tells which it is.

    An array by itself is read lazily; an object that goes over several lines is read as a whole.
    """
    read = _layout(path)
    with open_utf8(path, is_json=True) as file:
        yield from read(file)


def _layout(path: Path) -> Callable[[BinaryIO], Numbered]:
    """The function that reads a JSON file, by its first two lines that are not blank."""
    is_named_json = data_suffix(path) == ".json"
    if is_named_json and _begins_with_bracket(path):
        return array_records  # whose only line may be the whole file
    with open_utf8(path, is_json=True) as file:
        first = list(islice((line for line in file if line.strip(BLANK)), 2))
    if len(first) < 2:
        is_array = bool(first) and first[0].lstrip(BLANK).startswith(b"[")
        return array_records if is_array else _document_records if is_named_json else line_records
    if _is_json(first[0]):
        return line_records
    if first[0].lstrip(BLANK).startswith(b"["):
        return array_records
    if is_named_json:
        return _document_records
    if not _is_json(first[1]):
        with open_utf8(path, is_json=True) as file:
            return _document_records if _is_json(file.read()) else line_records
    return line_records


def _begins_with_bracket(path: Path) -> bool:
    """Whether the first character of a JSON file that is not blank is a bracket."""
    with open_utf8(path, is_json=True) as file:
        while (head := file.read(4096)) and not head.lstrip(BLANK):
            pass
    return head.lstrip(BLANK).startswith(b"[")


def line_records(lines: Iterable[bytes], first: int = 1) -> Numbered:
    """The object on each line, numbered from `first`; a line that is not an object is a bad record, and blank lines are skipped."""
    for number, line in enumerate(lines, start=first):
        text = decoded(line, f" of line {number}").strip(" \t\r\n")
        if not text:
            continue
        try:
            yield number, as_record(parsed(text))
        except json.JSONDecodeError as error:
            yield number, BadRecord("", f"not JSON: {message_of(error)} at column {error.colno}")
        except Unreadable as error:
            yield number, BadRecord("", str(error))


def _document_records(file: BinaryIO) -> Numbered:
    """The objects of the array that is `data` of one object; an object without it is one record."""
    text = decoded(file.read())
    if not text.strip():
        raise Unreadable("is empty")
    try:
        document = parsed(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is {broken(error, text)}") from None
    except Unreadable:
        raise Unreadable("is nested too deeply") from None
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    if not isinstance(document, list):
        raise Unreadable(f"holds {shown(document)} where an array of objects is expected")
    yield from ((number, as_record(value)) for number, value in enumerate(document, start=1))


def text_records(path: Path, columns: Columns = None) -> Numbered:
    """The lines of a plain text file as records with one column, `text`; blank lines are skipped."""
    with open_utf8(path) as file:
        yield from text_lines(file)


def text_lines(lines: Iterable[bytes], first: int = 1) -> Numbered:
    """Lines as records with one column, `text`, numbered from `first`; blank lines are skipped."""
    for number, line in enumerate(lines, start=first):
        text = decoded(line, f" of line {number}").rstrip("\n")
        if text.strip():
            yield number, {"text": text.rstrip("\r")}


def reads_lines(path: Path) -> bool:
    """Whether an uncompressed file is read line by line, as it is on the disk, so that it can be read from any line on."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((*BOMS,)) or b"\x00" in head:  # UTF-16 and UTF-32 are recoded from their beginning
        return False
    return data_suffix(path) == ".txt" or _layout(path) is line_records


READERS: dict[str, Callable[[Path, Columns], Numbered]] = {
    ".json": json_records,
    ".jsonl": json_records,
    ".ndjson": json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
    ".parquet": parquet_records,
    ".arrow": arrow_records,
    ".feather": arrow_records,
    ".txt": text_records,
}


def _is_json(line: bytes) -> bool:
    """Whether a line, or a whole file, is a JSON object or array by itself."""
    try:
        return isinstance(parsed(decoded(line)), dict | list)
    except (ValueError, Unreadable):
        return False


def is_data_file(path: str | Path) -> bool:
    """Whether a file of this name is read."""
    return data_suffix(path) in READERS


def legal_suffixes() -> str:
    """The suffixes of the files that are read, for an error."""
    return ", ".join(READERS)
