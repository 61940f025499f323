"""The records of a JSON array, parsed one by one without reading the file whole."""

from __future__ import annotations

import json
import os
import re
from codecs import getincrementaldecoder
from typing import Any, BinaryIO

from glmtuner.data.raw import Numbered, Unreadable, as_record, message_of, not_utf8


def array_records(file: BinaryIO) -> Numbered:
    """The objects of the array that a file holds, parsed one by one of a piece of its text at a time."""
    decoder = json.JSONDecoder()
    text = JsonWindow(file)
    text.skip_space()
    text.advance(1)
    number, ended = 0, text.skip_space() == "]"
    while not ended:
        number += 1
        yield number, as_record(text.parsed(decoder, number))
        if text.skip_comma():
            continue
        found = text.skip_space()
        ended = found == "]"
        if found != "," and not ended:
            raise text.broken(json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position), number)
        if not ended:
            text.advance(1)
            text.skip_space()
    text.advance(1)
    if text.skip_space():
        raise text.broken(json.JSONDecodeError("text after the array", text.text, text.position), number)


class JsonWindow:
    """The part of a UTF-8 file's text around a position, which moves on; what lies behind is forgotten."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.text, self.position = "", 0
        self.lines, self.columns = 0, 0  # whole lines before the text, and characters of the last one
        self.whole = False  # is the end of the file in it?

    def more(self) -> bool:
        """Forget what lies behind and read on, twice as far as the text is long; false at the end of the file."""
        if self.whole:
            return False
        behind = self.text[: self.position]
        self.lines += behind.count("\n")
        self.columns = len(behind) - 1 - behind.rfind("\n") + (0 if "\n" in behind else self.columns)
        data = self.file.read(max(PIECE, 2 * (len(self.text) - self.position)))
        before = self.file.tell() - len(data) - len(self.decoder.getstate()[0])
        try:
            self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error, f" at offset {before + error.start}") from None
        self.position, self.whole = 0, not data
        return True

    def skip_space(self) -> str:
        """Go to the next character that is no white space of JSON's; it comes back, empty at the end of the file."""
        while True:
            self.position = after_space(self.text, self.position)
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]

    def skip_comma(self) -> bool:
        """Go behind a comma and the white space around it, if there is one and what follows has been read already."""
        match = COMMA.match(self.text, self.position)
        if match is None or match.end() == len(self.text):
            return False
        self.position = match.end()
        return True

    def advance(self, count: int) -> None:
        self.position += count

    def parsed(self, decoder: json.JSONDecoder, number: int) -> Any:
        """The JSON value here, record `number`; goes behind it."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # more text can only help where the text breaks off: inside a string, or in its last few characters
                breaks_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_ESCAPE
                if breaks_off and self.more():
                    continue
                raise self.broken(error, number) from None
            if end > len(self.text) - LONGEST_ESCAPE and self.more():  # a number may go on, such as 12 as 12.5e+10
                continue
            self.position = end
            return value

    def broken(self, error: json.JSONDecodeError, number: int) -> Unreadable:
        """The error, placed in the file."""
        error.colno += self.columns if error.lineno == 1 else 0
        error.lineno += self.lines
        end = self.text
        if not self.whole:
            self.file.seek(-min(os.fstat(self.file.fileno()).st_size, 4096), os.SEEK_END)
            end = self.file.read().decode(errors="replace")
        return Unreadable(f"is {broken(error, end, number)}")


def after_space(text: str, position: int) -> int:
    """The next position that is no white space of JSON's."""
    match = SPACE.match(text, position)
    return match.end() if match else position


SPACE = re.compile(r"[ \t\r\n]*")
COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
PIECE = 1 << 20  # bytes of an array's file read at a time
LONGEST_ESCAPE = 12  # characters: two halves of a surrogate pair


def broken(error: json.JSONDecodeError, text: str, number: int = 0) -> str:
    """Where JSON breaks off, by line, column and record; `text` ends as the file does."""
    record = f", record {number}" if number else ""
    cut = "" if text.rstrip().endswith(("]", "}")) else "; the file is cut short, fetch it again"
    return f"not JSON at line {error.lineno}, column {error.colno}{record}: {message_of(error)}{cut}"
