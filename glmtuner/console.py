"""Terminal output; with several ranks, only rank 0 prints.

Texts may come from a data set, a model or a stranger's folder. Whatever is printed is plain text: no markup, and no character
that a terminal obeys.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

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


def say(text: str) -> None:
    """Print one line of plain text."""
    if not is_silent():
        print(plain(SPEAKER.get() + text), flush=True)


def complain(text: str) -> None:
    """Print one line of plain text on standard error, whatever the rank."""
    print(plain(text), file=sys.stderr, flush=True)


Segment = tuple[str, str]  # a text and its style, as rich names styles
GUTTER = 12  # columns for the names of parts


def labelled(title: str, parts: Iterable[tuple[str, Sequence[Segment]]]) -> None:
    """Print a title, and parts of text behind their names: in colour and wrapped in a terminal, else each line as it is.

    Line breaks inside of a part, and spaces at its ends, are shown by marks.
    """
    if is_silent():
        return
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
    Console(soft_wrap=False).print(grid)
