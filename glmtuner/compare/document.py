"""A comparison as sections, on the terminal, as Markdown and as a page; texts are escaped by each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glmtuner.compare.curves import plot_losses
from glmtuner.compare.loaded import LoadedRun
from glmtuner.console import say, table
from glmtuner.report.escape import markdown_cell, markdown_line
from glmtuner.report.page import render
from glmtuner.report.run import markdown_table
from glmtuner.run_folder.files import write_text


@dataclass(frozen=True)
class Section:
    """One thing that is compared: sentences, and a table below them where it has rows."""

    title: str
    sentences: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    has_texts: bool = False  # are the cells texts of data sets and models, which are long?
    is_difference: bool = True  # False: for information, as times are


@dataclass(frozen=True)
class Document:
    """A comparison: its verdict in one sentence, and its sections."""

    title: str
    verdict: str
    sections: list[Section] = field(default_factory=list)
    runs: Sequence[LoadedRun] = ()  # whose losses the page shows

    @property
    def differs(self) -> bool:
        """Whether any section is of a difference."""
        return any(section.is_difference for section in self.sections)


def show(document: Document) -> None:
    """Print the comparison."""
    for section in document.sections:
        say(section.title)
        for sentence in section.sentences:
            say(f"  {sentence}")
        if section.rows:
            table("", section.header, section.rows, lines=section.has_texts)
    say(document.verdict)


def write(document: Document, markdown: Path | None, html: Path | None) -> None:
    """Write the comparison to the files that are named."""
    if markdown is not None:
        write_text(markdown, as_markdown(document))
        say(f"Markdown: {markdown}")
    if html is not None:
        write_text(html, as_page(document))
        say(f"page: {html}")


def as_markdown(document: Document) -> str:
    """The comparison as Markdown."""
    lines = [f"# {markdown_line(document.title)}", "", markdown_line(document.verdict)]
    for section in document.sections:
        lines += ["", f"## {markdown_line(section.title)}"]
        if section.sentences:
            lines += ["", *(f"- {markdown_cell(sentence)}" for sentence in section.sentences)]
        if section.rows:
            lines += ["", *markdown_table(section.header, section.rows)]
    return "\n".join(lines) + "\n"


def as_page(document: Document) -> str:
    """The comparison as a self-contained page that loads nothing and runs no scripts."""
    plots = plot_losses(document.runs)
    return render("compare.html", name=document.title, document=document, plots=plots)
