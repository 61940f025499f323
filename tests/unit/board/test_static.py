"""The static version: the answers of the routes as scripts, only what changed is written, and nothing of others is removed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from board_folders import write_sweep

from glmtuner.board.static import POINTS, Static, short
from glmtuner.errors import ConfigError
from glmtuner.run_folder.locks import try_lock

HISTORY = [{"step": step, "epoch": step / 40, "loss": 4 - step / 20} for step in range(1, 41)]


@pytest.fixture
def static(outputs: Path, tmp_path: Path) -> Iterator[Static]:
    made = Static(outputs, tmp_path / "page")
    yield made
    made.close()


def data(out: Path, name: str, id: str = "") -> Any:
    """What the page would get: the index names the script, whose call has the content."""
    index = (out / "data/index.js").read_text(encoding="utf-8")
    assert index.startswith("window.glmtunerStatic = ") and index.endswith(";\n")
    key = json.loads(index.removeprefix("window.glmtunerStatic = ").removesuffix(";\n"))["files"][
        json.dumps([name, id], ensure_ascii=False, separators=(",", ":"))
    ]
    text = (out / f"data/{key}.js").read_text(encoding="utf-8")
    head = f'glmtunerData("{key}", '
    assert text.startswith(head) and text.endswith(");\n")
    return json.loads(text[len(head) : -3])


def files(out: Path) -> dict[str, int]:
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_the_page_has_the_runs_their_curves_and_reports(static: Static, run: Callable, outputs: Path) -> None:
    write_sweep(outputs / "s", "python -m glmtuner -m trainer.learning_rate=1,2")
    timings = [{"step": line["step"], "seconds": line["step"] * 2.0, "tokens": 5} for line in HISTORY]
    folder = run(
        "s/运行", {"trainer.learning_rate": 1.0}, history=HISTORY, timings=timings, metrics={"train_loss": 3.0}
    )
    (folder / "report.html").write_text("<p>report")
    long = [{"step": step, "loss": float(step % 7)} for step in range(3 * POINTS)]
    run(
        "long",
        {"finetuning.lora_rank": 4},
        history=long,
        predictions=[{"index": 0, "prompt": "p", "label": "l", "predict": "x"}],
        metrics={"train_loss": 1.0},
    )
    assert static.write() is False
    out = static.out
    assert {row["id"]: row["state"] for row in data(out, "runs")["rows"]} == {"s/运行": "finished", "long": "finished"}
    curves = data(out, "curves", "s/运行")
    assert curves["series"][0]["y"] == pytest.approx([line["loss"] for line in HISTORY])
    assert curves["by"]["time"][0]["x"] == [line["step"] * 2.0 for line in HISTORY]
    assert data(out, "curves", "long")["by"] == {"tokens": [], "time": []}
    assert data(out, "values") == {"finetuning.lora_rank": {"s/运行": 8, "long": 4}}
    assert data(out, "predictions", "long")["lines"][0]["predict"] == "x"
    view = data(out, "run", "s/运行")
    assert (out / view["report"]).read_text() == "<p>report" and data(out, "run", "long")["report"] is None
    assert data(out, "sweep", "s")["leaderboard"]["rows"][0]["values"]["train_loss"] == 3.0
    about = data(out, "about")
    assert about["static"] and f"points of curves beyond {POINTS}, of 1 runs" in about["left_out"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.index("data/index.js") < page.index("page/main.js") and "http-equiv" not in page
    assert all(
        (out / script).is_file() for script in ("page/main.js", "page/style.css", "page/uplot/uPlot.iife.min.js")
    )


def test_only_what_changed_is_written_again(static: Static, run: Callable) -> None:
    one, _ = run("one", history=HISTORY), run("two", history=HISTORY, metrics={"train_loss": 1.0})
    with try_lock(one / ".lock"):
        assert static.write(refresh=5.0) is True  # it runs
        assert '<meta http-equiv="refresh" content="5">' in (static.out / "index.html").read_text()
        before = files(static.out)
        with (one / "history.jsonl").open("a") as file:
            file.write('{"step": 41, "loss": 1.0}\n')
        static.write(refresh=5.0)
    changed = {name for name, written in files(static.out).items() if before.get(name) != written}
    assert changed == {f"data/{name}.js" for name in ("runs", "about", f"run-{short('one')}", f"curves-{short('one')}")}
    for file in one.iterdir():
        file.unlink()
    one.rmdir()
    static.write()
    assert not list(static.out.glob(f"data/*{short('one')}.js")) and list(static.out.glob(f"data/*{short('two')}.js"))


def test_a_folder_of_other_files_is_left_alone(run: Callable, outputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        Static(outputs, other)
    with pytest.raises(ConfigError, match="it is a file"):
        Static(outputs, other / "thesis.tex")
    assert (other / "thesis.tex").read_text() == "x"


def test_markup_in_names_stays_text(static: Static, run: Callable) -> None:
    name = "</script><img src=x onerror=alert(1)>\u2028".replace("\u2028", "").replace("/", "")
    run(name, {"data.dataset": ["</script>"]}, history=HISTORY)
    static.write()
    assert data(static.out, "run", name)["row"]["data"] == "</script>"
    assert "onerror" not in (static.out / "index.html").read_text()
