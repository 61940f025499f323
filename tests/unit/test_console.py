"""What is printed is plain text: no markup, and nothing that a terminal obeys."""

import ast
import json
import sys
import unicodedata
from pathlib import Path

import pytest

import glmtuner
from glmtuner.cli.chat import answer_line
from glmtuner.console import complain, plain, say, table
from glmtuner.data.records import Message
from glmtuner.run_folder.files import strict_json

OBEYED = [
    *map(chr, [*range(9), *range(11, 32), *range(127, 160)]),
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
]
LATEX = r"\[x^2\] \(\alpha\) [/] [bold]b[/bold] [link=http://evil.example]l[/link] :smile: [[a]] \\"
HARMLESS = "中文，标点！\n\tpython 👩‍🚀 שלום \u200f مرحبا é  […] {{ }} 100% ﬁ \u200d"


PACKAGE = Path(glmtuner.__file__).parent
CONSTANTS = {"Output.note", "os.strerror(error.errno or 0)"}  # of ours, or of the system


class Talk:
    """A conversation whose model answers with these pieces of text."""

    open_calls = ()

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.system, self.turns = pieces, "", []

    def ask(self, question, emit, emit_thought):
        self.turns = [Message("user", question), Message("assistant", "".join(self.pieces))]
        for piece in self.pieces:
            emit(piece)
        return "".join(self.pieces), 0


@pytest.mark.parametrize("code", [ord(each) for each in OBEYED])
def test_what_a_terminal_obeys_is_shown_by_its_number(capsys, code):
    shown = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    say(f"a{chr(code)}b")
    complain(f"c{chr(code)}d")
    answer_line(Talk(f"e{chr(code)}f", chr(code), "g"), "question")
    table(f"t{chr(code)}", [f"h{chr(code)}"], [[f"i{chr(code)}j"]])
    out, err = capsys.readouterr()
    assert f"a{shown}b\n" in out and f"e{shown}f{shown}g\n" in out and err == f"c{shown}d\n"
    assert all(part in out for part in (f"t{shown}", f"h{shown}", f"i{shown}j"))
    assert {each for each in out if unicodedata.category(each) in ("Cc", "Cs")} == {"\n"} and chr(code) not in out


def test_markup_and_latex_stay_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    for text in (LATEX, HARMLESS):
        say(text)
        answer_line(Talk(*text), "question")
        assert capsys.readouterr().out == f"{text}\n" * 2
    table(LATEX, [LATEX, "x"], [[LATEX, "[/a]"]])
    shown = capsys.readouterr().out.splitlines()
    assert [line.count(LATEX) for line in shown if LATEX in line] == [1, 1, 1] and "[/a]" in shown[-2]


def test_lines_of_windows_and_file_names_that_are_not_utf_8_can_be_printed(capsys):
    say("one\r\ntwo\udcff")
    assert capsys.readouterr().out == "one\ntwo\\udcff\n"
    assert plain("\u2028\u2029\ufff9") == "\\u2028\\u2029\\ufff9"


@pytest.mark.parametrize("override", ["data.dataset=a\x1b[2Jb", "finetuning.lora_rnk=\x9b31m", "model=\u202eyt\u202c"])
def test_an_error_shows_a_value_and_does_not_send_it(capsys, override):
    from glmtuner.cli.main import main

    assert main([override]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("glmtuner: ") and not {*override} & {*OBEYED} & {*err}


def test_json_files_hold_every_text_and_no_byte_that_a_terminal_obeys():
    value = {"".join(OBEYED): ["".join(OBEYED), HARMLESS, LATEX, "\ud800", "\\u001b", 1, None, float("nan")]}
    for text in (strict_json(value), strict_json(value, indent=2)):
        found = json.loads(text)
        assert found == {"".join(OBEYED): ["".join(OBEYED), HARMLESS, LATEX, "\ud800", "\\u001b", 1, None, None]}
        assert {each for each in text if unicodedata.category(each) in ("Cc", "Cs")} <= {"\n"} and "中文，" in text
        assert not {*text} & {*OBEYED} and text.encode()


def test_nothing_else_prints_a_text_that_is_not_its_own():
    """Every `print` of the package: constants, or what `plain` returns. Rich, which reads markup, is used by console.py alone."""
    own = {"help_text(options.config_dir)", "f'glmtuner {__version__}'", "code"}  # code: how bright a terminal is
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert not [name for name in names if name in ("rich", "rich.console", "rich.table", "rich.markup")], (
                    path
                )
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                for argument in node.args:
                    text = ast.unparse(argument)
                    values = [part.value for part in ast.walk(argument) if isinstance(part, ast.FormattedValue)]
                    is_own = isinstance(argument, ast.Constant) or text in own or text.startswith("plain(")
                    assert is_own or (all(ast.unparse(value) in CONSTANTS for value in values) and values), (path, text)


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("a")
    table("", ("",), [["b"]])
    print("c", file=sys.stdout)
    assert capsys.readouterr().out == "c\n"
