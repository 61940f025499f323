"""What a run says on the terminal; of several ranks the first one alone speaks."""

import os
from collections.abc import Iterable, Sequence


def silent() -> bool:
    return os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """One line, as plain text."""
    if not silent():
        print(text, flush=True)


def width() -> int:
    """The terminal's columns; 80 where there is no terminal."""
    from rich.console import Console

    return Console().width


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], show_header: bool = True, lines: bool = True
) -> None:
    """A table, with lines between rows when `lines`; wide characters are counted as two columns."""
    if silent():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(
        title=title or None,
        title_justify="left",
        box=box.ROUNDED,
        show_header=show_header,
        show_lines=show_header and lines,
    )
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    Console(soft_wrap=False).print(drawn)
