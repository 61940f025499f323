"""Texts of data sets, models and file names as plain text in Markdown, in a spreadsheet, in a picture.

Nothing in them formats, links, loads or computes anything, and no byte of them is a terminal's command.
"""

import re

from glmtuner.console import plain

# Characters that begin something in CommonMark or in a common extension of it: emphasis, code, links, images, tables,
# strikethrough, mathematics. An underscore inside a word is plain text.
_MARKUP = re.compile(r"[\\`*\[\]|~$@]|(?<![^\W_])_|_(?![^\W_])")
# What GitHub turns into a link or an emoji without any such character: https://…, www.…, mailto:…, :name:
_BARE_LINK = re.compile(
    r"(?:(?<=https)|(?<=http)|(?<=ftp)):(?=//)|(?<=www)\.|(?<=mailto):|(?<=xmpp):|:(?=(?:100|1234|[+-]1|[\w+-]*[a-z_][\w+-]*):)",
    re.IGNORECASE,
)
# What begins a heading, a list, a quotation or a code block at the start of a line.
_BLOCK_START = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")
# Where semicolons separate cells, as in German or French settings, a formula also begins after one.
_FORMULA_START = re.compile(r"(^\s*|[;\t\r\n]\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])|^(?=[\t\r\n])")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|-")


def one_line(text: str) -> str:
    """The text on one line, with single spaces, and without what a terminal obeys."""
    return plain(" ".join(str(text).split()))


def markdown_cell(text: str) -> str:
    """The text on one line of Markdown, inside a table's cell or after other text, where it shows as it is."""
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text))
    escaped = _BARE_LINK.sub(r"\\\g<0>", escaped)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def markdown_line(text: str) -> str:
    """The text as a line of its own, such as a heading's or a list item's, where it shows as it is."""
    escaped = markdown_cell(text)
    if escaped.startswith(">"):
        return f"&gt;{escaped[1:]}"
    # a backslash escapes punctuation only: of "1." the full stop
    return _BLOCK_START.sub(lambda match: f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}", escaped)


def markdown_code(text: str) -> str:
    """The text as code, if that can show it as it is, else as plain text."""
    shown = one_line(text)
    return f"`{shown}`" if shown and not re.search(r"[`|\\]", shown) else markdown_cell(text)


def markdown_code_block(lines: list[str]) -> list[str]:
    """The lines of a code block; its fence is longer than any that they contain."""
    shown = [plain(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(longest + 1, 3)
    return [f"{fence}text", *shown, fence]


def spreadsheet_cell(value: object) -> object:
    """The value for a cell of a CSV file: an apostrophe stands before what a spreadsheet would compute; numbers are kept."""
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return plain(_FORMULA_START.sub(r"\g<0>'", value))
