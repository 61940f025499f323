"""What the page's scripts compute: against pandas, Python's own csv and values worked out by hand."""

import csv
import io
import json
import math
import random
import shlex
import unicodedata
from typing import Any

import pandas
import pytest
from board_browser import Page, Served

from glmtuner.config.objective import LESS_IS_BETTER, less_is_better


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 0.99])
def test_smoothing_is_the_debiased_moving_average(page: Page, weight: float) -> None:
    values = [random.Random(1).gauss(2, 1) for _ in range(200)]
    found = page.js("return [...board.smooth(arguments[0], arguments[1])]", values, weight)
    assert found == pytest.approx([*pandas.Series(values).ewm(alpha=1 - weight, adjust=True).mean()], rel=1e-9)
    broken = [*values[:50], None, *values[50:]]
    found = page.js("return [...board.smooth(arguments[0].map((value) => value ?? NaN), arguments[1])]", broken, weight)
    without = pandas.Series(values).ewm(alpha=1 - weight, adjust=True).mean()
    assert [value for place, value in enumerate(found) if place != 50] == pytest.approx([*without], rel=1e-9)
    assert found[50] is None or math.isnan(found[50])


def longest_common(before: str, after: str) -> int:
    """The length of the longest common subsequence of two texts."""
    lengths = [0] * (len(after) + 1)
    for mine in before:
        above = 0
        for place, its in enumerate(after, 1):
            above, lengths[place] = (
                lengths[place],
                above + 1 if mine == its else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]


def test_a_difference_is_both_texts_and_no_longer_than_it_must_be(page: Page) -> None:
    draw = random.Random(2)
    pairs = [
        (
            "".join(draw.choices("我你他，。", k=draw.randrange(30))),
            "".join(draw.choices("我你他，。", k=draw.randrange(30))),
        )
        for _ in range(60)
    ]
    pairs += [
        ("", ""),
        ("", "我"),
        ("a b c", "a c"),
        ("<b>x</b>", "<i>x</i>"),
        ("learning rate 1e-3", "learning rate 1e-4"),
    ]
    for before, after in pairs:
        parts = page.js("return board.difference(arguments[0], arguments[1])", before, after)
        assert "".join(part["text"] for part in parts if part["kind"] != "added") == before
        assert "".join(part["text"] for part in parts if part["kind"] != "removed") == after
        if not (before + after).isascii():  # of Chinese a word is a character
            same = sum(len(part["text"]) for part in parts if part["kind"] == "same")
            assert same == longest_common(before, after), (before, after, parts)
    assert page.js("return board.difference('x y '.repeat(2000), 'y z '.repeat(2000))") is None


def test_what_is_not_seen_is_shown_and_what_is_seen_stays(page: Page) -> None:
    overrides = [
        chr(code)
        for code in range(0x110000)
        if unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]
    controls = [
        chr(code) for code in range(0x100) if unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\t\n"
    ]
    separators = ["\u2028", "\u2029", "\u200b", "\ufeff", "\u00ad", "\U000e0041"]
    for character in [*overrides, *controls, *separators]:
        code = ord(character)
        expected = f"a\\u{{{code:x}}}b" if code > 0xFFFF else f"a\\u{code:04x}b"
        assert page.js("return board.visible(arguments[0])", f"a{character}b") == expected
    for text in [
        "你好，世界\n第二行\t列",
        "naïve café",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "می\u200cخواهم",
        "<script>alert(1)</script>",
        "\U0001f600",
    ]:
        assert page.js("return board.visible(arguments[0])", text) == text


def test_a_downloaded_table_is_read_back_and_holds_no_formula(page: Page) -> None:
    rows = [["a,b", 'say "x"', "two\nlines", "中文", ""], ["1.5", "-2", "1e-4", "+3", "0"]]
    assert [*csv.reader(io.StringIO(page.js("return board.csv(arguments[0])", rows), newline=""))] == rows
    dangerous = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1"]
    [found] = csv.reader(io.StringIO(page.js("return board.csv([arguments[0]])", dangerous), newline=""))
    assert found == [f"'{text}" for text in dangerous]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12.0678, "12.07"), (0.0003, "0.0003000"), (1.2e-7, "1.2e-7"), (5, "5"), (1234567, "1,234,567"), (1234.5678, "1,235"), (None, ""), (-0.5, "-0.5000"), (2.5e12, "2.5e+12")],
)  # fmt: skip
def test_numbers_have_four_digits(page: Page, value: float | None, shown: str) -> None:
    assert page.js("return board.number(arguments[0])", value) == shown


def test_a_value_and_its_interval_have_the_same_decimals(page: Page) -> None:
    assert page.js("return board.score(12.0678, [9.814, 14.399])") == "12.07 [9.81, 14.40]"
    assert page.js("return board.score(12.0678, null)") == "12.07"


def test_the_front_is_what_no_other_run_beats(page: Page) -> None:
    draw = random.Random(3)
    for _ in range(30):
        points = [{"id": str(place), "x": draw.randrange(6), "y": draw.randrange(6)} for place in range(12)]
        for less_x, less_y in ((True, True), (True, False), (False, False)):
            costs = {
                point["id"]: (point["x"] * (1 if less_x else -1), point["y"] * (1 if less_y else -1))
                for point in points
            }
            expected = [
                mine for mine, (a, b) in costs.items()
                if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs.values())
            ]  # fmt: skip
            assert (
                page.js("return board.front(arguments[0], arguments[1], arguments[2])", points, less_x, less_y)
                == expected
            )


def test_the_page_and_the_reports_agree_on_what_is_better(page: Page) -> None:
    names = [
        *LESS_IS_BETTER,
        *(f"eval_{name}" for name in LESS_IS_BETTER),
        "accuracy",
        "predict_rouge-l",
        "loss_margin",
        "reward",
        "trained_parameters",
    ]
    assert page.js("return arguments[0].map(board.isLessBetter)", names) == [less_is_better(name) for name in names]


FILTERED = {
    "a": {"name": "a", "state": "running", "stage": "sft", "varied": {"trainer.learning_rate": 0.001, "finetuning": "lora"}, "metrics": {"eval_loss": 2.5}},
    "b": {"name": "b", "state": "finished", "stage": "rm", "varied": {"trainer.learning_rate": 0.01, "finetuning": "full"}, "metrics": {"eval_loss": 0.5}},
    "c": {"name": "c c", "state": "failed", "mark": None, "stage": "sft", "varied": {"trainer.learning_rate": "1e-5"}, "metrics": {}, "note": "out of disk"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "abc"), ("state:running", "a"), ("-state:running", "bc"), ("lr>1e-4", "ab"), ("lr>=0.01", "b"), ("lr<1e-4", "c"), ("eval_loss<2", "b"),
        ("loss:2.5", ""), ("learning_rate=1e-3", "a"), ("trainer.learning_rate!=0.01", "ac"), ('"out of"', "c"), ('note:"of disk"', "c"), ("stage:sft lora", "a"),
        ("finetuning=ful", ""), ("finetuning:ful", "b"), ("c", "c"), ("-c", "ab"),
    ],
)  # fmt: skip
def test_the_filter_keeps_what_its_terms_say(page: Page, text: str, found: str) -> None:
    script = """
    const [rows, text, done] = arguments;
    board.store.rows = new Map(Object.entries(rows));
    for (const [id, row] of board.store.rows) row.id = id;
    board.keys = async () => ["trainer.learning_rate", "finetuning"];
    board.valuesOf = async (key) => Object.fromEntries([...board.store.rows].filter(([, row]) => key in row.varied).map(([id, row]) => [id, row.varied[key]]));
    board.filter(text).then(({ test, error }) => done([error, [...board.store.rows.values()].filter(test).map((row) => row.id).join("")]));
    """
    page.driver.refresh()
    page.wait(lambda: page.js("return board.store.version !== null"))
    assert page.driver.execute_async_script(script, FILTERED, text) == [None, found]


def test_the_filter_says_what_it_does_not_know(page: Page) -> None:
    script = "const [text, done] = arguments; board.filter(text).then((found) => done(found.error))"
    assert "learning_rate" in page.driver.execute_async_script(script, "learning_rat>1")
    assert "lots" in page.driver.execute_async_script(script, "lr>lots")


def pixels_near(page: Page, points: list[tuple[float, float]]) -> list[list[int]]:
    """Of each point of the picture whether the canvas has the colour of its line at most two pixels away."""
    script = """
    const [points, colour] = arguments;
    const u = board.charts[0];
    const wanted = colour.match(/[0-9a-f]{2}/g).map((part) => parseInt(part, 16));
    const { width } = u.ctx.canvas;
    const { data } = u.ctx.getImageData(0, 0, width, u.ctx.canvas.height);
    const isThere = (x, y) => wanted.every((part, index) => Math.abs(part - data[4 * (y * width + x) + index]) < 40);
    return points.map(([x, y]) => {
      const [left, top] = [Math.round(u.valToPos(x, "x", true)), Math.round(u.valToPos(y, "y", true))];
      for (let row = -2; row <= 2; row += 1) for (let column = -2; column <= 2; column += 1) if (isThere(left + column, top + row)) return 1;
      return 0;
    });
    """
    return list(page.js(script, points, "#5891ed"))


def test_the_drawn_line_goes_through_the_points_of_the_history(board: Served, page: Page) -> None:
    page.go("#/run/first")
    page.find("[data-chart=loss]")
    lines = [json.loads(line) for line in (board.folder / "first" / "history.jsonl").read_text().splitlines()]
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(points) > 20
    page.wait(lambda: page.js("return board.charts[0].scales.x.max") >= points[-1][0])
    page.js("window.scrollTo(0, document.querySelector('[data-chart=loss]').offsetTop)")
    away = [(step, loss + (1.5 if loss < 4 else -1.5)) for step, loss in points[5:-5]]  # shows that the test can fail
    found = pixels_near(page, [*points, *away])
    assert found[: len(points)] == [1] * len(points)
    assert sum(found[len(points) :]) < len(away) / 3


def told(page: Page) -> str:
    return str(page.js("return document.querySelector('[data-chart=loss] .tip').textContent"))


def test_the_keyboard_reads_the_exact_points(board: Served, page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go("#/run/first")
    chart = page.find("[data-chart=loss]")
    lines = [json.loads(line) for line in (board.folder / "first" / "history.jsonl").read_text().splitlines()]
    losses: list[dict[str, Any]] = [line for line in lines if "loss" in line]
    page.wait(lambda: page.js("return board.charts[0].scales.x.max") >= losses[-1]["step"])
    chart.send_keys(Keys.END)
    page.wait(lambda: f"{losses[-1]['loss']:.7g}" in told(page))  # the board sends seven digits
    chart.send_keys(Keys.ARROW_LEFT)
    page.wait(lambda: f"{losses[-2]['loss']:.7g}" in told(page) and f" {losses[-2]['step']}" in told(page))
    chart.send_keys(Keys.HOME)
    page.wait(lambda: f"{losses[0]['loss']:.7g}" in told(page))
    whole = page.js("return board.charts[0].scales.x.max - board.charts[0].scales.x.min")
    chart.send_keys("+")
    assert page.wait(
        lambda: (
            page.js("return board.charts[0].scales.x.max - board.charts[0].scales.x.min") == pytest.approx(whole / 2)
        )
    )
    chart.send_keys("0")
    assert page.wait(
        lambda: page.js("return board.charts[0].scales.x.max - board.charts[0].scales.x.min") == pytest.approx(whole)
    )


def test_a_command_line_is_read_and_written_as_a_shell_does(page: Page) -> None:
    draw = random.Random(7)
    lines = ["".join(draw.choices("ab=,. '\"\\\n$`~我[]{}#", k=draw.randrange(1, 25))) for _ in range(400)]
    for line in lines:
        try:
            expected = shlex.split(line)
        except ValueError:  # a quote is not closed, or nothing stands behind a backslash
            expected = None
        if any(
            escape in line for escape in ("\\\n", "\\$", "\\`")
        ):  # a shell reads these so, and Python's shlex does not
            continue
        assert page.js("return board.commandLine.split(arguments[0])", line) == expected, line
    words = ["".join(draw.choices("ab=,. '\"\\\n$`~我[]{}#", k=draw.randrange(25))) for _ in range(400)]
    quoted = page.js("return arguments[0].map(board.commandLine.quoted)", words)
    assert [shlex.split(text) for text in quoted] == [[word] for word in words]
    assert quoted == [shlex.quote(word) for word in words]
    joined = "python -m glmtuner -m model=tiny_glm \\\n  trainer.seed=1,2"
    assert page.js("return board.commandLine.split(arguments[0])", joined) == [
        "python", "-m", "glmtuner", "-m", "model=tiny_glm", "trainer.seed=1,2",
    ]  # fmt: skip
