"""Nothing that a model, a data set or a name says is markup, an escape, a formula or a request, in any output of a report."""

import csv
import json
import re
import unicodedata
from html.parser import HTMLParser
from io import StringIO

import pytest
from markdown_it import MarkdownIt

from glmtuner.console import plain
from glmtuner.report import show_run, write_report
from glmtuner.report.escape import markdown_cell, markdown_line, spreadsheet_cell

HOSTILE = [
    r"\[\frac{a}{b}\] \(x^2\) $$E=mc^2$$ $a_b$ \\ \| \` end\\"[:-1],
    "[red]x[/red] [/] [bold [link=http://evil.example]y[/link] [/bold]",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]8;;http://evil.example\x1b\\ \x9b2J \x90q \x85 \x7f \x08\x08 \x00",
    "\u202eevil\u202c \u2066x\u2069 \u2028 \u2029 \ufff9",
    "before\rafter \r\n next\nline\ttab",
    "![x](http://evil.example/p.png) ![y][ref] [x](javascript:alert(1)) [ref]: http://evil.example",
    "[ref]: http://evil.example/p.png",
    '<img src="http://evil.example/p.png" onerror=x> <script>alert(1)</script> <!-- c --> <http://evil.example> &lt;b&gt; &#60;i',
    "http://evil.example https://evil.example ftp://evil.example www.evil.example mailto:a@b.example a@b.example",
    "_a_ *b* **c** ~~d~~ ~e~ `f` ``g` :smile: :+1: [^1] x_y_z __h__",
    "| a | b | `c|d` \\|",
    *("# h", "#", "- l", "+ l", "* l", "1. n", "2) n", "> q", "```", "~~~", "---", "===", "***", "___", "[ ] t", "    code"),
    *("=cmd|' /C calc'!A0", "+1+cmd|x!A0", "-2+3+cmd|x!A0", "@SUM(1)", "\t=1+1", "\r=1+1", "\n=1+1", " =1+1", "\uff1d1+1", "x;=1+1"),
    "{{ 7*7 }} {% raw %} ${7*7} #{7*7}",
    "</pre></td></table>'\"",
]  # fmt: skip
IDS = [f"{number}" for number in range(len(HOSTILE))]


def obeyed(text: str, legal: str = "\n\t") -> set[str]:
    """The characters of the text that a terminal obeys or that reorder it, by the Unicode database."""
    reorders = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {
        each
        for each in text
        if (unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(each) in reorders)
        and each not in legal
    }


def rendered(markdown: str) -> list:
    """The tokens of the text as GitHub's flavour of Markdown reads it, the inner ones in place of what holds them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    return [inner for token in tokens for inner in (token.children or [token])]


def visible(text: str) -> str:
    return plain(" ".join(text.split()))


@pytest.mark.parametrize("text", HOSTILE, ids=IDS)
def test_markdown_shows_the_text_itself(text):
    kinds = [token.type for token in rendered(f"| {markdown_cell(text)} |\n| --- |\n| {markdown_cell(text)} |\n")]
    assert {*kinds} == {
        "table_open", "thead_open", "tr_open", "th_open", "text", "th_close", "tr_close", "thead_close", "tbody_open",
        "td_open", "td_close", "tbody_close", "table_close",
    }  # fmt: skip
    for markdown in (
        f"| {markdown_cell(text)} |\n| --- |\n",
        f"- {markdown_line(text)}\n",
        f"# {markdown_line(text)}\n",
    ):
        tokens = rendered(markdown)
        assert "".join(token.content for token in tokens if token.type == "text") == visible(text)
        assert not {"image", "link_open", "html_inline", "html_block", "code_inline", "fence", "hr", "em_open"} & {
            token.type for token in tokens
        }
        assert [token.type for token in tokens].count("bullet_list_open") == markdown.startswith("- ")
        assert not re.search(r"(https?|ftp)://|www\.|!\[|<", markdown), "what GitHub links by itself"


@pytest.mark.parametrize("text", HOSTILE, ids=IDS)
def test_a_spreadsheet_computes_no_text(text):
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow([spreadsheet_cell(text), 1])
    for separator in ",;\t":
        for row in csv.reader(StringIO(line.getvalue()), delimiter=separator):
            for cell in row:
                assert cell.strip()[:1] not in ("=", "+", "-", "@", "\uff1d"), cell
    assert not obeyed(line.getvalue())


@pytest.mark.parametrize("number", ["-1", "+0.5", "-1e-05", "-.5", "1e3", -0.25, 7, None, "-", "2023-01-01", "a-b=c"])
def test_numbers_and_harmless_texts_stay_as_they_are(number):
    assert spreadsheet_cell(number) == number


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[str] = [""]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


@pytest.fixture
def hostile(sweep, job, failed):
    """A sweep that says hostile things wherever a data set, a model or a name can."""
    for rate in (0.1, 0.2):
        said = [(f"{text} {place}", text, text[::-1] if rate == 0.1 else text) for place, text in enumerate(HOSTILE)]
        values = {"trainer.learning_rate": rate, "data.source_prefix": f"{HOSTILE[0]}{HOSTILE[2]}{rate}"}
        values |= {"data.dataset": [HOSTILE[5 if rate == 0.1 else 16]], "name": HOSTILE[1]}
        folder = job(f"_{rate} $x$ \x1b[31m[b] \u202e![i](http:evil)", values, [], answers=said)
        skipped = [f"{text}: broken" for text in HOSTILE]
        about = {"command": f"python {HOSTILE[2]}", "data": {HOSTILE[7]: {"records": 1, "skipped": skipped}}}
        (folder / "provenance.json").write_text(json.dumps(about))
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(
            json.dumps({**metrics, f"eval_{HOSTILE[1]}": rate, f"eval_{HOSTILE[5]}": 1})
        )
    for place, text in enumerate(HOSTILE):
        failed(f"=failed {place}", [f"data.source_prefix={text}"], reason=text)
    (sweep / "sweep.json").write_text(json.dumps({"typed": [f"python {text}" for text in HOSTILE]}))
    return sweep


def test_every_output_of_a_report_is_plain(hostile, capsys):
    runs = [path for path in hostile.iterdir() if (path / "config.yaml").is_file()]
    for folder in (hostile, *runs):
        write_report(folder)
    show_run(runs[0])
    shown = capsys.readouterr().out
    assert not obeyed(shown) and "\\x1b" in shown
    assert r"\[\frac" in shown.replace("│", " ") and "[/red]" in shown and "[bold" in shown

    table = [*csv.reader(StringIO((hostile / "leaderboard.csv").read_text()))]
    assert len({len(row) for row in table}) == 1 and len(table) == 1 + 2 + len(HOSTILE)
    numbers = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?|-")
    assert all(cell.strip()[:1] not in ("=", "+", "-", "@") or numbers.fullmatch(cell) for row in table for cell in row)

    for folder in (hostile, *runs):
        markdown, page = ((folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
        assert not obeyed(markdown) and not obeyed(page)
        images = [token.attrs["src"] for token in rendered(markdown) if token.type == "image"]
        assert all(re.fullmatch(r"loss\.png|pictures/[\w.-]+\.png", source) for source in images)
        assert not {"link_open", "html_inline", "html_block"} & {token.type for token in rendered(markdown)}
        parsed = Page(page)
        assert all(link.startswith("data:") for link in parsed.links)
        assert not parsed.tags & {"script", "iframe", "object", "embed", "form", "a", "b", "i"}
        cells = {token.content for token in rendered(markdown) if token.type == "text"}
        for wanted, shown in (
            ({visible(plain(text)) for text in HOSTILE}, {visible(cell) for cell in parsed.cells}),
            ({visible(text) for text in HOSTILE}, cells),
        ):  # a run shows some answers, a sweep every failure
            assert len(wanted & shown) >= 5 and (folder != hostile or wanted <= shown), wanted - shown
