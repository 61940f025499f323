"""What a run says on the terminal."""

from collections.abc import Iterable, Sequence


def say(text: str) -> None:
    """One line, as plain text."""
    print(text, flush=True)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], show_header: bool = True, lines: bool = True
) -> None:
    """A table, with lines between rows when `lines`; wide characters are counted as two columns."""
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
