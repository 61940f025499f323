"""Standard input, output and error: closed ones, readers that go away, characters that an encoding lacks."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READER_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe, a closed terminal


class ReaderGone(BaseException):
    """The reader of standard output has closed the pipe, as `head` does.

    It is not an OSError: rich would answer that with an exit, and `except Exception` would take it for a failed run.
    """


class Output(io.FileIO):
    """Standard output or error, of which a closed pipe ends the command, or is no error, as `discards` says."""

    discards, note = False, ""  # of the command that runs; see `results_in_files`

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
        discard(self.fileno())
        if self.fileno() == 1 and not Output.discards:
            raise ReaderGone
        if self.fileno() == 1 and Output.note and os.environ.get("RANK", "0") == "0":
            print(f"glmtuner: the reader of standard output has gone; {Output.note}", file=sys.stderr)
        return len(data)


def discard(descriptor: int) -> None:
    """Open the null device in place of the descriptor."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


@contextmanager
def results_in_files(note: str = "") -> Iterator[None]:
    """While this lasts, the command goes on without its output when the reader goes away, since its results are in files.

    With a note it says so on standard error.
    """
    before = Output.discards, Output.note
    Output.discards, Output.note = True, note
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        finally:
            Output.discards, Output.note = before


def prepare() -> None:
    """Replace the standard streams of this process by ones that cannot fail for their reader or for a character.

    A closed one is the null device: otherwise the next file that is opened would take its place.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process
    sys.stdout = _writer(1, sys.stdout)
    sys.stderr = _writer(2, sys.stderr)


def _writer(descriptor: int, before: Any) -> io.TextIOWrapper:
    """A text stream on the descriptor with the encoding of the stream before; `\\u4f60` for what it cannot encode."""
    encoding = before.encoding if before is not None else "utf-8"
    if os.name == "nt" and before is not None:  # a console of Windows is written by its own class
        before.reconfigure(errors="backslashreplace")
        return before
    if before is not None:
        before.flush()
    raw = Output(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or descriptor == 2,
        write_through=bool(before is not None and before.write_through),
    )
