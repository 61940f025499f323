"""Raw records, and what can be wrong with the file that they are read from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from glmtuner.data.records import BadRecord, shown

Raw = dict[str, Any] | BadRecord
Numbered = Iterator[tuple[int, Raw]]


class Row(NamedTuple):
    """One record: the file it is in, its number there (from 1; of a jsonl file the line), and what was read."""

    where: str
    number: int
    raw: Raw


class Unreadable(Exception):
    """What is wrong with a whole file; whoever reads it adds its name."""


def as_record(value: Any) -> Raw:
    """The value when it is an object, else what is wrong with it."""
    return value if isinstance(value, dict) else BadRecord("", f"an object is expected, got {shown(value)}")


def decoded(data: bytes, of_line: str = "") -> str:
    """The text of UTF-8 bytes, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, f" at offset {error.start}{of_line}") from None


def not_utf8(error: UnicodeDecodeError, where: str = "") -> Unreadable:
    """The error for a file in another encoding."""
    byte = error.object[error.start]
    return Unreadable(f"is not UTF-8: byte 0x{byte:02x}{where}; convert it, such as by `iconv -f GB18030 -t UTF-8`")


def message_of(error: json.JSONDecodeError) -> str:
    """What json found, without the "at" that some of its messages end in."""
    return error.msg.removesuffix(" at")


def reason_of(error: BaseException) -> str:
    """An error in one line of bearable length."""
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}"


def listed(names: list[str], most: int = 10) -> str:
    """Names with commas, long lists cut."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
