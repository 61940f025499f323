"""Raw records, and errors of the files that they are read from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from glmtuner.data.records import BadRecord, shown

Raw = dict[str, Any] | BadRecord
Numbered = Iterator[tuple[int, Raw]]


class Row(NamedTuple):
    """One record: its file or hub dataset, its number in it (from 1; in a jsonl file the line), and its content."""

    source: str
    number: int
    raw: Raw


class Unreadable(Exception):
    """What is wrong with a whole file; the caller adds the file's name."""


def as_record(value: Any) -> Raw:
    """The value if it is an object, else what is wrong with it."""
    return value if isinstance(value, dict) else BadRecord("", f"an object is expected, got {shown(value)}")


def decoded(data: bytes, of_line: str = "") -> str:
    """The text of UTF-8 bytes, without a byte order mark; raises Unreadable."""
    try:
        return data.decode("utf-8-sig")
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
    return f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}"


def listed(names: list[str], limit: int = 10) -> str:
    """The names separated by commas; of a long list the first `limit`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
