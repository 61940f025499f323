"""JSON that every reader accepts, and lines that end at line feeds alone."""

import json
import math
from contextlib import suppress
from multiprocessing import get_context

import pytest

from glmtuner.run_folder.files import read_lines, strict_json, write_json, write_text


def test_numbers_that_json_lacks_become_null(tmp_path):
    value = {
        "a": math.nan,
        "b": [math.inf, -math.inf, 1.5, (math.nan, 2)],
        "c": {"d": math.nan},
        "e": "nan",
        "f": True,
        "g": 3,
    }
    expected = {"a": None, "b": [None, None, 1.5, [None, 2]], "c": {"d": None}, "e": "nan", "f": True, "g": 3}
    assert json.loads(strict_json(value), parse_constant=pytest.fail) == expected
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_a_text_with_another_line_separator_is_one_line(tmp_path, separator):
    rows = [{"index": 0, "predict": f"a{separator}b"}, {"index": 1, "predict": separator}]
    write_text(tmp_path / "rows.jsonl", "".join(f"{strict_json(row)}\n" for row in rows))
    assert list(read_lines(tmp_path / "rows.jsonl")) == rows


def test_a_line_that_cannot_be_read_is_named_unless_it_is_a_cut_last_one(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n\n{"a": 2}\n{"a": 3', encoding="utf-8")
    assert list(read_lines(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "line 2" in said[0] and "line 3" in said[1] and "rows.jsonl" in said[0]


def test_processes_that_write_one_file_at_once_write_it_whole(tmp_path):
    def write(letter):
        for _ in range(150):
            write_text(tmp_path / "results.yaml", letter * 50_000)

    children = [get_context("fork").Process(target=write, args=(letter,)) for letter in "abcd"]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        with suppress(FileNotFoundError):
            text = (tmp_path / "results.yaml").read_text()
            assert text == text[0] * 50_000
    assert [child.exitcode for child in children] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["results.yaml"]
