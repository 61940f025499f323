"""Raw records, and errors of the files that they are read from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from glmtuner.data.records import BadRecord, printable, shown

Raw = dict[str, Any] | BadRecord
Numbered = Iterator[tuple[int, Raw]]


class Row(NamedTuple):
    """One record: its file or hub dataset, its number in it (from 1; in a jsonl file the line), and its content."""

    source: str
    number: int
    raw: Raw


class Unreadable(Exception):
    """What is wrong with a whole file; the caller adds the file's name."""


@dataclass(frozen=True)
class LongInteger:
    """An integer with more digits than Python converts; harmless in a column that is not read."""

    num_digits: int

    def __repr__(self) -> str:
        return f"an integer of {self.num_digits:,} digits"


def integer(digits: str) -> int | LongInteger:
    """The integer of a JSON text."""
    try:
        return int(digits)
    except ValueError:
        return LongInteger(len(digits))


DECODER = json.JSONDecoder(parse_int=integer)


def parsed(text: str) -> Any:
    """The value of a JSON text; raises JSONDecodeError, and Unreadable if it is nested too deeply for Python."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise Unreadable("nested too deeply") from None


def as_record(value: Any) -> Raw:
    """The value if it is an object, else what is wrong with it."""
    return value if isinstance(value, dict) else BadRecord("", f"an object is expected, got {shown(value)}")


def decoded(data: bytes, of_line: str = "") -> str:
    """The text of UTF-8 bytes, without a byte order mark; raises Unreadable."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(error, f" at offset {error.start}{of_line}") from None


def not_utf8(error: UnicodeDecodeError, place: str = "") -> Unreadable:
    """The error for a file in another encoding; `place` is where the byte is."""
    byte = error.object[error.start]
    return Unreadable(f"is not UTF-8: byte 0x{byte:02x}{place}; convert it, such as by `iconv -f GB18030 -t UTF-8`")


def message_of(error: json.JSONDecodeError) -> str:
    """The error's message without the "at" in which some of them end."""
    return error.msg.removesuffix(" at")


def reason_of(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    line = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}")
