"""The files of a report: their content, whatever the sweep's folders contain."""

import csv
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest

from glmtuner.errors import CheckpointError
from glmtuner.report import write_loss_plot, write_report
from glmtuner.report.plots import plot_by_knob, plot_sweep_losses
from glmtuner.report.ranking import rank_sweep
from glmtuner.run_folder.folder import RunFolder

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>"\'|`{{ 7*7 }}\n</pre>'
ANSWERS = [(f"{EVIL}{place}", f"好的，{place}", EVIL) for place in range(12)]


class Parsed(HTMLParser):
    """The tags of a page, what it would load, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def read(sweep):
    return {
        name: (sweep / name).read_text(encoding="utf-8") for name in ("report.html", "report.md", "leaderboard.csv")
    }


@pytest.fixture
def evil(sweep, job, failed):
    """A sweep whose names, values, answers, reasons and commands all try to be HTML."""
    for rate, said in ((0.1, ANSWERS), (0.2, [(prompt, label, label) for prompt, label, _ in ANSWERS])):
        values = {"trainer.learning_rate": rate, "data.source_prefix": f"{EVIL}{rate}"}
        job(f"<b>{rate}", values, [f"trainer.learning_rate={rate}", f"data.source_prefix={EVIL!r}"], answers=said)
    failed("<i>broken", [f"data.source_prefix={EVIL}"], reason=EVIL)
    (sweep / "sweep.json").write_text(f'{{"typed": ["python {"<script>"}"]}}')
    return sweep


def test_html_in_data_is_escaped(evil):
    write_report(evil)
    page = Parsed(read(evil)["report.html"])
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "b", "i"} and not page.handlers
    assert 'alert("1")' in page.text and "{{ 7*7 }}" in page.text and "好的，3" in page.text
    markdown, _, typed = read(evil)["report.md"].partition("```text")
    assert "<script" not in markdown and "<img" not in markdown and typed.count("```") == 1


def test_the_page_loads_nothing(evil):
    write_report(evil)
    text = read(evil)["report.html"]
    page = Parsed(text)
    assert page.loaded and all(value.startswith("data:") for value in page.loaded)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text and 'charset="utf-8"' in text


def test_markdown_tables_have_as_many_cells_in_every_line(evil):
    write_report(evil)
    tables = re.findall(r"(?:^\|.*\n)+", read(evil)["report.md"], flags=re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_files_name_the_winner_the_failures_and_the_plots(sweep, job, failed):
    folder = job("best", {"trainer.learning_rate": 1e-5}, answers=[(p, label, label) for p, label, _ in ANSWERS],
                 metrics={"train_runtime": 200.0, "train_tokens_per_second": 1234.5, "peak_memory_gib": 1.5,
                          "trained_parameters": 10, "total_parameters": 1000})  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    job("worst", {"trainer.learning_rate": 0.1}, answers=ANSWERS)
    job("half", {"trainer.learning_rate": 0.5})
    failed("big", ["trainer.learning_rate=1"], kind="infeasible", reason="CUDA out of memory")
    write_report(sweep)
    found = read(sweep)
    for text in (found["report.md"], Parsed(found["report.html"]).text):
        assert f"python -m glmtuner export {sweep}/best --to {sweep.name}_best" in text
        for part in ("CUDA out of memory", "step 4 of 4", "3 min 20 s", "1.50 GiB", "10 (1.00%)", "1,234", "好的，0"):
            assert part in text, part
        assert "python -m glmtuner -m trainer.learning_rate=1,2" in text
    assert {path.name for path in (sweep / "pictures").iterdir()} == {
        "loss.png",
        "predict_rouge-l_by_learning_rate.png",
    }
    for name in re.findall(r"\]\((.*?)\)", found["report.md"]):
        assert (sweep / name).read_bytes().startswith(b"\x89PNG")
    lines = [*csv.DictReader(StringIO(found["leaderboard.csv"]))]
    assert [(line["rank"], line["job"], line["state"]) for line in lines] == [
        ("1", "best", "finished"), ("2", "worst", "finished"), ("", "big", "out of memory"), ("", "half", "unfinished"),
    ]  # fmt: skip
    assert float(lines[1]["difference_high"]) < 0 and lines[1]["told_apart"] == "true"
    assert lines[0]["trainer.learning_rate"] == "1e-05" and lines[0]["peak_memory_gib"] == "1.5"


def test_plots_of_knobs_that_are_no_longer_varied_are_removed(sweep, job):
    job("a", {"trainer.learning_rate": 0.1}, metrics={"eval_loss": 1.0})
    job("b", {"trainer.learning_rate": 0.2}, metrics={"eval_loss": 2.0})
    write_report(sweep)
    assert (sweep / "pictures/eval_loss_by_learning_rate.png").is_file()
    for path in sweep.glob("*/metrics.json"):
        path.write_text('{"train_loss": 1.0}')
    write_report(sweep)
    assert {path.name for path in (sweep / "pictures").iterdir()} == {"loss.png", "train_loss_by_learning_rate.png"}


def test_plots_of_many_runs_with_any_names_cause_no_warnings(sweep, job):
    for place in range(14):
        values = {"trainer.learning_rate": 10.0 ** -(place % 3 + 2), "data.source_prefix": f"_前缀$x^{place}$ {'长' * 40}",
                  "finetuning.use_rslora": place % 2 == 0}  # fmt: skip
        job(f"j{place}", values, metrics={"eval_loss": 1.0 + place})
    ranking = rank_sweep(sweep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = [plot_sweep_losses(ranking), *plot_by_knob(ranking)]
    assert [picture.name for picture in pictures] == [
        "loss", "eval_loss_by_learning_rate", "eval_loss_by_source_prefix", "eval_loss_by_use_rslora",
    ]  # fmt: skip
    assert all(picture.light != picture.dark for picture in pictures)


def test_a_sweep_without_anything_to_draw_has_a_report(sweep, failed):
    write_report(sweep)
    assert "no job yet" in read(sweep)["report.html"]
    failed("a", [])
    write_report(sweep)
    assert "1 failed" in read(sweep)["report.html"] and "a cable was pulled" in read(sweep)["report.md"]
    assert not [*sweep.rglob("*.png")]


@pytest.mark.parametrize(
    "logged", ["", '{"step": 1, "loss": null}\n', '{"loss": 1}\n', '{"step": 1, "loss": NaN}\n{"st']
)
def test_any_history_is_drawn_or_left_out(sweep, job, logged):
    for rate in (0.1, 0.2):
        (job(f"r{rate}", {"trainer.learning_rate": rate}, metrics={"eval_loss": rate}) / "history.jsonl").write_text(
            logged
        )
    write_report(sweep)
    assert "r0.1" in read(sweep)["leaderboard.csv"]
    assert ("loss.png" in read(sweep)["report.md"]) is ("NaN" in logged)


def test_a_run_has_a_page_of_its_own(sweep, job):
    folder = job("run", {"model.dtype": "auto"}, answers=ANSWERS, metrics={"eval_loss": 1.5})
    (folder / "provenance.json").write_text('{"command": "python <script>"}')
    write_report(folder)
    page = Parsed((folder / "report.html").read_text())
    assert (
        not page.tags & {"script", "b"} and not page.handlers and all(link.startswith("data:") for link in page.loaded)
    )
    assert (
        "python <script>" in page.text and "1.5000" in page.text and "finished" in page.text and "picture" in page.tags
    )
    assert "[" in re.search(r"predict_rouge-l.*?\n", page.text.replace("predict_rouge-l\n", "predict_rouge-l"))[0]
    assert (folder / "report.md").is_file() and not (folder / "loss.png").exists()
    assert write_loss_plot(RunFolder(folder)).read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_has_a_page_too(sweep, job):
    folder = job("run", {"model.dtype": "auto"})
    write_report(folder)
    assert "unfinished: step 4 of 4" in Parsed((folder / "report.html").read_text()).text


@pytest.mark.parametrize("damage", [("config.yaml", "a: [1"), ("metrics.json", "{"), ("provenance.json", "{")])
def test_a_damaged_run_is_an_error_that_names_the_file(sweep, job, damage):
    folder = job("run", {"model.dtype": "auto"}, metrics={"eval_loss": 1.0})
    (folder / damage[0]).write_text(damage[1])
    with pytest.raises(CheckpointError, match=rf"{damage[0]} is damaged \([^\n]*\)"):
        write_report(folder)


def test_no_model_library_is_loaded_for_a_report(sweep, job):
    job("a", answers=ANSWERS)
    code = "import sys; from pathlib import Path; from glmtuner.report import write_report; write_report(Path(sys.argv[1])); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(sweep)], capture_output=True, text=True, check=True)
    loaded = {*done.stdout.splitlines()[-1].split()}
    assert "glmtuner.report.page" in loaded and not loaded & {"torch", "transformers", "datasets", "pandas"}


def test_a_folder_of_neither_a_sweep_nor_a_run_is_refused(tmp_path, sweep, failed):
    with pytest.raises(
        CheckpointError, match=r"report nowhere: no such folder; .*python -m glmtuner report outputs/sweeps"
    ):
        write_report(Path("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"report .*empty: .*neither a sweep nor a run; .*python -m glmtuner report"
    ):
        write_report(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"report .*early: .* a cable was pulled"):
        write_report(failed("early", []))
