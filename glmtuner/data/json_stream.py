"""The records of a JSON array, parsed one by one without reading the whole file."""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from typing import Any, BinaryIO

from glmtuner.data.raw import DECODER, Numbered, Unreadable, as_record, message_of, not_utf8


def array_records(file: BinaryIO) -> Numbered:
    """The objects of the array in a file, parsed one by one while the file is read in chunks; raises Unreadable."""
    text = JsonWindow(file)
    text.skip_space()
    text.advance(1)
    number, ended = 0, text.skip_space() == "]"
    while not ended:
        number += 1
        yield number, as_record(text.parse(number))
        if text.skip_comma():
            continue
        character = text.skip_space()
        ended = character == "]"
        if character != "," and not ended:
            raise text.broken(json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position), number)
        if not ended:
            text.advance(1)
            text.skip_space()
    text.advance(1)
    if text.skip_space():
        raise text.broken(json.JSONDecodeError("text after the array", text.text, text.position), number)


class JsonWindow:
    """A sliding window of a UTF-8 file's text: text before `position` is discarded when more is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_read = 0  # bytes
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.text, self.position = "", 0
        self.lines, self.columns = 0, 0  # whole lines before the window, and characters of the line it begins in
        self.at_end = False  # has the file been read to its end?

    def read_more(self) -> bool:
        """Discard the text before `position` and read at least twice the remaining length; False at the end of the file."""
        if self.at_end:
            return False
        parsed = self.text[: self.position]
        self.lines += parsed.count("\n")
        self.columns = len(parsed) - 1 - parsed.rfind("\n") + (0 if "\n" in parsed else self.columns)
        data = self.file.read(max(CHUNK_BYTES, 2 * (len(self.text) - self.position)))
        offset = self.num_read - len(self.decoder.getstate()[0])
        self.num_read += len(data)
        try:
            self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error, f" at offset {offset + error.start}") from None
        self.position, self.at_end = 0, not data
        return True

    def skip_space(self) -> str:
        """Move to the next character that is not JSON white space, and return it; "" at the end of the file."""
        while True:
            self.position = after_space(self.text, self.position)
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def skip_comma(self) -> bool:
        """Move past a comma and the white space around it; False if there is none, or the next character is not read yet."""
        match = COMMA.match(self.text, self.position)
        if match is None or match.end() == len(self.text):
            return False
        self.position = match.end()
        return True

    def advance(self, count: int) -> None:
        """Move on by `count` characters."""
        self.position += count

    def parse(self, number: int) -> Any:
        """Parse the JSON value at `position`, record `number`, and move past it."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # more text can only help if the error is at the window's end: inside a string, or in the last characters
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_ESCAPE
                if is_cut and self.read_more():
                    continue
                raise self.broken(error, number) from None
            except RecursionError:
                raise Unreadable(f"is nested too deeply in record {number}") from None
            if end > len(self.text) - LONGEST_ESCAPE and self.read_more():  # a number may continue: 12 as 12.5e+10
                continue
            self.position = end
            return value

    def broken(self, error: json.JSONDecodeError, number: int) -> Unreadable:
        """The error with its line and column in the file."""
        error.colno += self.columns if error.lineno == 1 else 0
        error.lineno += self.lines
        end = self.text
        while not self.at_end:  # a decompressed stream cannot be read from its end
            data = self.file.read(CHUNK_BYTES)
            end, self.at_end = end[-4096:] + data.decode(errors="replace"), not data
        return Unreadable(f"is {broken(error, end, number)}")


def after_space(text: str, position: int) -> int:
    """The next position that is not JSON white space."""
    match = SPACE.match(text, position)
    return match.end() if match else position


SPACE = re.compile(r"[ \t\r\n]*")
COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
CHUNK_BYTES = 1 << 20  # read at a time
LONGEST_ESCAPE = 12  # in characters: both halves of a surrogate pair


def broken(error: json.JSONDecodeError, text: str, number: int = 0) -> str:
    """The line, column and record of a JSON error; `text` is the end of the file."""
    record = f", record {number}" if number else ""
    cut = "" if text.rstrip().endswith(("]", "}")) else "; the file is truncated, download it again"
    return f"not JSON at line {error.lineno}, column {error.colno}{record}: {message_of(error)}{cut}"
