"""Terminal output; with several ranks, only rank 0 prints.

Texts may come from a data set, a model or a stranger's folder. Whatever is printed is plain text: no markup, and no character
that a terminal obeys.

A terminal may have a live region: lines at its bottom that are drawn again and again, while what is printed appears above them.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TextIO, TypeVar

# What a terminal obeys instead of showing: control characters (ESC, BEL, a carriage return, and the C1 controls, which many
# terminals take for ESC sequences), and the characters that change the direction of the text after them (CVE-2021-42574).
# Lone surrogates, as in file names that are not UTF-8, cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]")


def plain(text: str) -> str:
    r"""The text with \x1b, \u202e and so on in place of characters that a terminal obeys; line breaks and tabs remain."""
    return UNPRINTABLE.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_silent() -> bool:
    """Whether this process is a rank other than 0."""
    return os.environ.get("RANK", "0") != "0"


SPEAKER: ContextVar[str] = ContextVar("speaker", default="")  # before each line, of one of several runs in this process
MUTED: ContextVar[bool] = ContextVar("muted", default=False)  # of a thread that only looks


def say(text: str) -> None:
    """Print one line of plain text."""
    if not (is_silent() or MUTED.get() or table_elsewhere()):
        with above_live_region():
            print(plain(SPEAKER.get() + text), flush=True)


def complain(text: str) -> None:
    """Print one line of plain text on standard error, whatever the rank."""
    with above_live_region():
        print(plain(text), file=sys.stderr, flush=True)


# -- the live region ----------------------------------------------------------------------------------------------------------

T = TypeVar("T")
TABLE = "GLMTUNER_LIVE_TABLE"  # set for the processes that a sweep with a table in the terminal starts
DRAW_SECONDS = 0.1  # the least time between two drawings
MARGIN = 3  # columns that stay free: a terminal echoes ^C behind the last line, and must not begin another
PLAIN_SECONDS = 30.0  # between the lines of `tracked` where there is no terminal
POSITION: ContextVar[str] = ContextVar("position", default="")  # before a run's live line: which job of a sweep it is
_lock = threading.RLock()  # of the region below
_region: "LiveRegion | None" = None


class LiveRegion:
    """The lines at the bottom of a terminal; none is wider than it, so that each takes one row."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lines, self.rows, self.drawn = stream, list[str](), 0, 0.0

    @property
    def is_due(self) -> bool:
        """Whether the last drawing was long enough ago."""
        return time.monotonic() - self.drawn >= DRAW_SECONDS

    def size(self) -> tuple[int, int]:
        """The columns and rows of the terminal."""
        with suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.stream.fileno())
            if columns > 0 and rows > 0:
                return columns, rows
        return 80, 24

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines in place of those before."""
        with _lock:
            columns, rows = self.size()
            self.lines = [cut(plain(line), columns - MARGIN) for line in lines[: max(rows - 1, 1)]]
            self.drawn, up = time.monotonic(), self._up()
            self.rows = len(self.lines)  # before they are written: Ctrl-C may end this in between
            self._write(up + "\n".join(f"{line}\x1b[K" for line in self.lines) + "\x1b[J")

    def clear(self) -> None:
        """Remove the lines from the terminal."""
        with _lock:
            if self.rows:
                self._write(self._up() + "\x1b[J")
            self.rows = 0

    def _up(self) -> str:
        """What moves the cursor to the beginning of the first line."""
        return "\r" + (f"\x1b[{self.rows - 1}A" if self.rows > 1 else "")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the terminal has gone, which whoever prints a result will notice
            self.stream.write(text)
            self.stream.flush()


def cut(text: str, columns: int) -> str:
    """The text on one line of at most so many columns; wide (East Asian) characters count as two."""
    from rich.cells import cell_len, set_cell_size

    line = " ".join(text.split("\n"))
    return line if cell_len(line) <= columns else set_cell_size(line, max(columns, 0)).rstrip()


def aligned(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """The rows as lines of cells below each other; the first cell is cut where a line would have more columns."""
    from rich.cells import cell_len, set_cell_size

    widths = [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(columns - sum(width + 2 for width in widths[1:]), 8))
    return [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def terminal() -> TextIO | None:
    """The standard stream that a live region can be drawn on; None if there is none, or this rank is silent."""
    if is_silent() or os.environ.get("TERM") == "dumb":
        return None
    for stream in (sys.stderr, sys.stdout):
        with suppress(AttributeError, ValueError):  # no stream, a closed one
            if stream.isatty():
                return stream
    return None


@contextmanager
def live_region() -> Iterator[LiveRegion | None]:
    """A live region while this lasts; None without a terminal, and where the region is taken. Nothing of it stays."""
    global _region
    stream, own = terminal(), None
    with _lock:
        if stream is not None and _region is None:
            own = _region = LiveRegion(stream)
    try:
        yield own
    finally:
        if own is not None:
            with _lock:
                own.clear()
                _region = None if _region is own else _region


def table_elsewhere() -> bool:
    """Whether the process that started this one draws a table in the terminal, into which a line would be printed."""
    with suppress(AttributeError, ValueError):
        return TABLE in os.environ and _region is None and sys.stdout.isatty()
    return False


def end_live_region() -> None:
    """Remove the live region that an error has left behind."""
    global _region
    with _lock:
        if _region is not None:
            _region.clear()
        _region = None


def replaces_lines() -> bool:
    """Whether the live region stands for lines about progress, because what is printed goes to a terminal as well."""
    with suppress(AttributeError, ValueError):
        return _region is not None and sys.stdout.isatty()
    return False


@contextmanager
def above_live_region() -> Iterator[None]:
    """Whatever is printed meanwhile appears above the live region."""
    with _lock:
        region = _region
        shown = region is not None and region.rows > 0
        if region is not None and shown:
            region.clear()
        try:
            yield
        finally:
            if region is not None and shown and region is _region:
                region.draw(region.lines)


def tracked(items: Iterable[T], total: int, what: str, *, shown: bool = True) -> Iterator[T]:
    """The items, with a live line about how many of `total` have been taken; without a terminal a line now and then."""
    if not shown:
        yield from items
        return
    start = told = time.monotonic()
    with live_region() as region:
        for count, item in enumerate(items):
            now = time.monotonic()
            if count and ((region is not None and region.is_due) or (region is None and now - told >= PLAIN_SECONDS)):
                speed = count / max(now - start, 1e-9)
                text = f"{what}: {count} of {total}, {speed:.3g}/s, {duration((total - count) / speed)} left"
                if region is not None:
                    region.draw([POSITION.get() + text])
                elif not replaces_lines():
                    say(text)
                told = now
            yield item


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# -- several lines ------------------------------------------------------------------------------------------------------------


Segment = tuple[str, str]  # a text and its style, as rich names styles
GUTTER = 12  # columns for the names of parts


def labelled(title: str, parts: Iterable[tuple[str, Sequence[Segment]]]) -> None:
    """Print a title, and parts of text behind their names: in colour and wrapped in a terminal, else each line as it is.

    Line breaks inside of a part, and spaces at its ends, are shown by marks.
    """
    if is_silent():
        return
    with above_live_region():
        _print_labelled(title, parts)


def _print_labelled(title: str, parts: Iterable[tuple[str, Sequence[Segment]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    blank = Text(" " * GUTTER)
    console.print(Text(plain(title), style="bold"), soft_wrap=True)
    for name, segments in parts:
        gutter = Text().append(f"  {name:<{GUTTER - 2}}", style="dim")
        text = Text()
        for content, style in segments:
            text.append(_with_marks(plain(content)), style=style)
        for line in text.split("\n", allow_blank=True):
            wrapped = line.wrap(console, max(console.width - GUTTER, 20)) if console.is_terminal and line else [line]
            for piece in wrapped:
                console.print(gutter + piece, soft_wrap=True)
                gutter = blank
    console.print()


def _with_marks(text: str) -> str:
    """The text with a mark before each line break, and for spaces at its ends."""
    inside = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    end = len(text) - start - len(inside)
    return f"{'␣' * start}{inside}{'␣' * end}".replace("\n", "↵\n")


def width() -> int:
    """The number of columns of the terminal; 80 without a terminal."""
    from rich.console import Console

    return Console().width


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], show_header: bool = True, lines: bool = True
) -> None:
    """Print a table, with rules between rows if `lines`; wide (East Asian) characters count as two columns."""
    if is_silent():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(value: object) -> Text:  # a string would be parsed as markup
        return Text(plain(str(value)))

    grid = Table(
        title=cell(title) if title else None,
        title_justify="left",
        box=box.ROUNDED,
        show_header=show_header,
        show_lines=show_header and lines,
    )
    for column in columns:
        grid.add_column(cell(column), overflow="fold")
    for row in rows:
        grid.add_row(*map(cell, row))
    with above_live_region():
        Console(soft_wrap=False).print(grid)
