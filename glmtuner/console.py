"""Terminal output of a run; with several ranks, only rank 0 prints."""

import os
from collections.abc import Iterable, Sequence


def is_silent() -> bool:
    """Whether this process is a rank other than 0."""
    return os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """Print one line of plain text."""
    if not is_silent():
        print(text, flush=True)


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

    grid = Table(
        title=title or None,
        title_justify="left",
        box=box.ROUNDED,
        show_header=show_header,
        show_lines=show_header and lines,
    )
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))  # a plain string would be parsed as markup
    Console(soft_wrap=False).print(grid)
