"""The live region of a terminal: what its screen shows, by an interpreter of its escape codes."""

import io
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from terminal import Terminal, on_screen

from glmtuner import console
from glmtuner.console import aligned, complain, cut, duration, end_live_region, live_region, say, table, tracked

WIDE = "训练第三步，损失 1.5"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 40 columns, on which standard output and error of this process are."""
    terminal = Terminal(40, 12)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    yield terminal
    terminal.close()


@on_screen
def test_lines_are_printed_above(screen):
    say("before")
    with live_region() as region:
        region.draw(["step 1 of 3"])
        say("a line")
        assert screen.lines() == ["before", "a line", "step 1 of 3"]
        region.draw(["step 2 of 3", "second row"])
        complain("an error")
        table("", ("x", "y"), [["1", "2"]])
        shown = screen.lines()
        assert shown[:3] == ["before", "a line", "an error"] and shown[-2:] == ["step 2 of 3", "second row"]
        assert len(shown) == 3 + 5 + 2
        region.draw(["step 3"])
        assert screen.lines()[-1] == "step 3" and len(screen.lines()) == 9
        say("two\nlines")
    assert screen.lines()[-2:] == ["two", "lines"] and screen.screen.cursor.x == 0
    say("after")
    assert screen.lines()[-1] == "after" and not any("step" in line for line in screen.lines())


@on_screen
def test_no_line_is_wider_than_the_terminal(screen):
    with live_region() as region:
        region.draw([WIDE * 4, "x" * 200])
        first, second = screen.lines()
        assert second == "x" * 37 and first.replace(" ", "").startswith("训练第三步，损失1.5")
        screen.resize(20, 12)
        region.draw([WIDE * 4, "y" * 200])
        assert "y" * 17 in screen.lines() and "y" * 18 not in screen.lines()
        screen.resize(90, 12)
        region.draw(["z" * 200, "step"])
        assert screen.lines()[-2:] == ["z" * 87, "step"]
    assert not any("z" in line or "y" * 17 in line for line in screen.lines())


@on_screen
def test_no_more_lines_than_the_terminal_has(screen):
    with live_region() as region:
        for number in range(30):
            region.draw([f"row {row} of {number}" for row in range(30)])
        assert screen.lines() == [f"row {row} of 29" for row in range(11)]
    assert screen.lines() == []


@on_screen
def test_what_a_terminal_obeys_is_not_sent(screen):
    with live_region() as region:
        region.draw(["a\x1b[2Jb\rc\nd"])
        assert screen.lines() == ["a\\x1b[2Jb\\x0dc d"]


@on_screen
def test_one_region_at_a_time_and_none_is_left_by_an_error(screen):
    with pytest.raises(KeyboardInterrupt), live_region() as region:
        with live_region() as other:
            assert other is None
        region.draw(["step 1"])
        raise KeyboardInterrupt
    assert screen.lines() == [] and console._region is None
    items = tracked(range(5), 5, "predict")
    assert [next(items), next(items)] == [0, 1] and console._region is not None
    console._region.draw(["left"])
    end_live_region()
    say("stopped")
    assert screen.lines() == ["stopped"] and console._region is None
    items.close()


@on_screen
def test_many_threads(screen):
    with live_region() as region:

        def speak(name: int) -> None:
            for line in range(2):
                say(f"thread {name} line {line}")
                region.draw([f"by {name}", "last row"])

        threads = [threading.Thread(target=speak, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shown = screen.lines()
    assert sorted(shown[:8]) == [f"thread {name} line {line}" for name in range(4) for line in range(2)]
    assert shown[-1] == "last row" and len(shown) == 10


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"RANK": "1"}])
@on_screen
def test_no_region_without_need(screen, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with live_region() as region:
        assert region is None
    assert list(tracked([1, 2], 2, "predict")) == [1, 2] and screen.lines() == []


def test_where_there_is_no_terminal_lines_come_now_and_then(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    assert list(tracked(range(4), 4, "predict")) == [0, 1, 2, 3] and out.getvalue() == ""
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    assert list(tracked(range(3), 3, "predict")) == [0, 1, 2]
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("predict: 1 of 3, ") and lines[1].endswith(" left")
    assert list(tracked(range(3), 3, "predict", shown=False)) == [0, 1, 2] and len(out.getvalue().splitlines()) == 2
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


@on_screen
def test_tracked_items_are_counted_in_a_terminal(screen, monkeypatch):
    monkeypatch.setattr(console, "DRAW_SECONDS", 0.0)
    items = tracked("abc", 3, "预测")
    assert [next(items), next(items)] == ["a", "b"]
    assert "".join(screen.lines()).replace(" ", "").startswith("预测:1of3,")
    assert [*items] == ["c"] and screen.lines() == []


@on_screen
def test_a_terminal_that_has_gone_is_no_error(screen):
    with live_region() as region:
        region.stream = open(os.devnull)  # noqa: SIM115
        region.draw(["x"])
        region.stream.close()
        region.draw(["y"])


def test_widths():
    assert [cut("训练abc", columns) for columns in (3, 4, 5, 7, 0)] == ["训", "训练", "训练a", "训练abc", ""]
    rows = [["job", "state"], ["学习率-0.001_很长的名字", "running"], ["b", "done"]]
    assert aligned(rows, 40) == [
        "job" + " " * 22 + "state",
        "学习率-0.001_很长的名字  running",
        "b" + " " * 24 + "done",
    ]
    assert [len(line.encode("gbk")) for line in aligned(rows, 20)][
        1
    ] <= 20  # GBK has two bytes for what takes two columns
    expected = ["0 s", "89 s", "2 min", "1 h 30 min", "3 h 20 min"]
    assert [duration(seconds) for seconds in (0.4, 89, 90, 5400, 12000)] == expected
