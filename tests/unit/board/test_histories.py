"""Logged lines as columns: what is appended, cut, replaced or damaged; thinned curves."""

import json
import math
import random
from pathlib import Path

import numpy
import pytest

from glmtuner.board import histories
from glmtuner.board.curves import at_steps, increasing, thinned
from glmtuner.board.histories import Columns, last_values


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def of(columns: Columns, name: str) -> list[float]:
    return columns.of(name)[1].tolist()


def test_what_is_appended_is_read_on_from_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(line(1, loss=3.0) + line(2, loss=2.0)[:-4])
    columns = Columns(path)
    assert columns.update()
    assert of(columns, "loss") == [3.0]
    assert not columns.update()
    with path.open("a") as file:
        file.write(line(2, loss=2.0)[-4:] + line(2, eval_loss=2.5))
    assert columns.update()
    assert of(columns, "loss") == [3.0, 2.0]
    lines, values = columns.of("eval_loss")
    assert (lines.tolist(), values.tolist()) == ([2], [2.5])
    assert of(columns, "step") == [1, 2, 2]


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(line(step, loss=step) for step in range(1, 6)))
    columns = Columns(path)
    columns.update()
    text = line(1, loss=10.0) + line(2, loss=20.0)
    if how == "replaced":
        longer = text + "".join(line(step, loss=0.0) for step in range(3, 20))
        (tmp_path / "new").write_text(longer)
        (tmp_path / "new").replace(path)
    else:
        path.write_text(text)
    assert columns.update()
    assert of(columns, "loss")[:2] == [10.0, 20.0]
    path.unlink()
    assert columns.update()
    assert (columns.lines, of(columns, "loss")) == (0, [])


def test_damaged_lines_are_counted_and_leave_the_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    bad = [
        '{"step": 1',
        '"loss": 7}',
        "[1, 2]",
        "\x00\xff",
        '{"loss": 4}',
        '{"step": "x", "loss": 4}',
        '{"step": true, "loss": 4}',
        "[" * 5000,
    ]
    path.write_bytes(
        b"".join(text.encode("latin-1") + b"\n" for text in bad)
        + line(3, loss=math.nan).encode()
        + b'{"step": 4, "loss": null, "note": "text"}\n'
    )
    columns = Columns(path)
    columns.update()
    assert columns.damaged == len(bad)
    assert of(columns, "step") == [3, 4]
    assert all(map(math.isnan, of(columns, "loss")))
    assert "note" not in columns.columns


def test_long_files_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "CHUNK", 50)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(line(step, loss=step / 7) for step in range(100)))
    columns = Columns(path)
    columns.update()
    assert of(columns, "loss") == [step / 7 for step in range(100)]


def test_the_last_values_are_those_at_the_end_however_long_the_lines_after_them(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    evaluation = {f"eval_{number}": number * 1.0 for number in range(500)}
    path.write_text(
        "".join(line(step, loss=step * 1.0, epoch=step / 10) for step in range(2000)) + line(2000, **evaluation)
    )
    found = last_values(path, "loss")
    assert (found["loss"], found["step"], found["eval_499"], found["epoch"]) == (1999.0, 2000, 499.0, 199.9)
    assert last_values(tmp_path / "none.jsonl", "loss") == {}


def test_thinning_keeps_every_peak_and_every_gap() -> None:
    noise = random.Random(1)
    y = numpy.array([noise.random() for _ in range(10_000)])
    y[1234], y[7777], y[5000] = 50.0, -50.0, math.nan
    kept = thinned(y, 500)
    assert {0, 1234, 5000, 7777, 9999} <= {*kept.tolist()}
    assert len(kept) <= 500 + 3
    assert kept.tolist() == sorted({*kept.tolist()})
    parts = numpy.array_split(numpy.arange(10_000), 250)
    for part in parts:  # each part's lowest and highest, by a loop
        inside = [place for place in part if math.isfinite(y[place])]
        assert min(inside, key=lambda place: y[place]) in kept and max(inside, key=lambda place: y[place]) in kept
    assert thinned(y[:500], 500).tolist() == list(range(500))
    assert thinned(numpy.full(1000, math.nan), 10).tolist()[0] == 0


def test_x_increases_and_of_equal_steps_the_last_counts() -> None:
    x, y = increasing(numpy.array([1.0, 3.0, 3.0, 2.0, math.nan]), numpy.array([10.0, 30.0, 31.0, 20.0, 0.0]))
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [10, 20, 31])


def test_steps_get_the_time_of_the_last_timing_before_them(tmp_path: Path) -> None:
    path = tmp_path / "timings.jsonl"
    path.write_text(line(10, seconds=1.0) + line(20, seconds=5.0))
    timings = Columns(path)
    timings.update()
    found = at_steps(timings, "seconds", numpy.array([5.0, 10.0, 15.0, 20.0]))
    assert math.isnan(found[0]) and found[1:].tolist() == [1.0, 1.0, 5.0]
    assert at_steps(timings, "tokens", numpy.array([5.0])) is None
