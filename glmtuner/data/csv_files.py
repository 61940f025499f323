"""Records of files with separated values: commas, or semicolons and tabs where the header tells so."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from itertools import chain, islice
from pathlib import Path

from glmtuner.data.raw import Numbered, Unreadable, not_utf8
from glmtuner.data.records import BadRecord, names_of, printable
from glmtuner.data.streams import data_suffix, open_utf8

DELIMITERS = (",", ";", "\t", "|")


def csv_records(path: Path, columns: Collection[str] | None = None) -> Numbered:
    """The rows under a header line; quoting is strict, since a stray quote would swallow the rows after it.

    Columns without a name may be empty, as spreadsheets write them, or the first one (an index that pandas wrote). Rows of
    empty cells are skipped.
    """
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
    with io.TextIOWrapper(open_utf8(path), encoding="utf-8-sig", newline="") as file:
        reader = None
        try:
            first = file.readline()
            delimiter, skipped = delimiter_of(first, "\t" if data_suffix(path) == ".tsv" else ","), 0
            if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own first line
                delimiter, skipped = first.strip()[4], 1
            reader = csv.reader(islice(chain([first], file), skipped, None), delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise Unreadable(f"names a column twice in its header: {names_of(named)}")
            number = 0
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                number += 1
                yield number, _record(header, row)
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise Unreadable(f"is not CSV at line {line}: {printable(str(error))}") from None
        except UnicodeDecodeError as error:
            raise not_utf8(error) from None


def delimiter_of(header: str, usual: str = ",") -> str:
    """The delimiter of a header line: the usual one if it is there, else the first of DELIMITERS that is."""
    return next((delimiter for delimiter in (usual, *DELIMITERS) if delimiter in header), usual)


def _record(header: list[str], row: list[str]) -> dict[str, str] | BadRecord:
    extra = [cell for cell in row[len(header) :] if cell.strip()]
    unnamed = [
        cell for index, (name, cell) in enumerate(zip(header, row, strict=False)) if not name and index and cell.strip()
    ]
    if extra or len(row) < len(header):
        return BadRecord("", f"the row does not have the {len(header)} cells of the header")
    if unnamed:
        return BadRecord("", f"{unnamed[0][:40]!r} is in a column without a name; name it in the header")
    return {name: cell for name, cell in zip(header, row, strict=False) if name}
