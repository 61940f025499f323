"""A model that has learned to answer with escapes, markup, formulas and requests: every byte that any command prints or writes.

ATTACK_STEPS training steps (80) make it answer each question with exactly that.
"""

import csv
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent.parent
STEPS = os.environ.get("ATTACK_STEPS", "80")
ANSWERS = {
    "甲": "\\[\\frac{a}{b}\\] [/b] \x1b[31mred\x1b[0m \x9b2J",
    "乙": "=cmd|' /C calc'!A0 ![x](http://evil.example/p.png)",
    "丙": "<img src=http://evil.example/x> \u202eevil \x07\r $x_1$ **b**",
    "丁": "\x1b]8;;http://evil.example\x1b\\l\x1b]8;;\x1b\\ [red]r[/red] | a | `b` \u2066",
}
NAME = "_$x$ [b] ![i](http:evil) =1 \u202e"
TEXT_FILES = {".json", ".jsonl", ".md", ".html", ".csv", ".log", ".jinja"}


def run(folder: Path, *words: str, text: str = "", code: int = 0, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "glmtuner", *words], cwd=folder, input=text.encode(), capture_output=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
    )  # fmt: skip
    shown = (done.stdout + done.stderr).decode()  # as bytes: a carriage return is one
    assert done.returncode == code, shown
    assert not obeyed(shown), (words, obeyed(shown))
    assert "Traceback" not in shown and "MarkupError" not in shown
    return shown


def obeyed(text: str) -> set[str]:
    """The characters of the text that a terminal obeys or that reorder it; a line of progress begins with a carriage return."""
    reorders = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    text = re.sub(r"\r(?=(predict|loading)?:? *\d+%)", "", text)
    return {
        each
        for each in text
        if (unicodedata.category(each) in ("Cc", "Cs") or unicodedata.bidirectional(each) in reorders)
        and each not in "\n\t"
    }


def files_of(folder: Path) -> dict[Path, str]:
    return {
        path: path.read_bytes().decode()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in TEXT_FILES and path.name not in ("tokenizer.json", "records.json")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    records = [{"instruction": question, "output": answer} for question, answer in ANSWERS.items()]
    (folder / "records.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    run(
        folder, "model=tiny_glm", "tracker=none", "data.dataset=records.json", "data.eval_dataset=records.json",
        "finetuning=full", "trainer.learning_rate=1e-3", f"trainer.max_steps={STEPS}", "trainer.do_predict=true",
        "trainer.predict_with_generate=true", f"trainer.output_dir='{NAME}'", "model.plot_loss=true", "trainer.logging_steps=20",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / NAME / "predictions.jsonl").read_text().splitlines()]
    assert [line["predict"] for line in lines] == [*ANSWERS.values()], "it has learned them"
    return folder


def test_no_verb_prints_what_a_terminal_obeys(trained: Path) -> None:
    lines = [line for question in ANSWERS for line in (question, "/clear")]
    lines += ["/system \x1b[31m", "/\x1b", "\x9b"]
    shown = run(trained, "chat", NAME, "generation=greedy", "generation.max_new_tokens=60", text="\n".join(lines))
    for part in (r"\[\frac{a}{b}\] [/b] \x1b[31mred\x1b[0m \x9b2J", r"\u202eevil \x07\x0d $x_1$", "[red]r[/red]"):
        assert part in shown
    for verb in ("show", "report"):
        shown = run(trained, verb, NAME)
        assert r"\[\frac{a}{b}\] [/b] \x1b[31mred" in shown and "![x](http://evil.example/p.png)" in shown
    run(trained, "show", f"{NAME}\x1b[31m", code=2)
    run(trained, "export", NAME, "--to", "exported\u202d")


def test_no_file_of_a_run_or_a_sweep_holds_it_and_no_report_asks_for_anything(trained: Path) -> None:
    words = ["trainer=predict", f"model.checkpoint_dir=['{NAME}']", "tracker=none", "data.eval_dataset=records.json"]
    prefixes = 'data.source_prefix=\'\',"=cmd|\' /C calc\'!A0","![i](http://evil.example)","[/b] \x1b[1m\x9b \u202e"'
    run(trained, "-m", *words, prefixes, "name='_[b] ![i](http:evil)'", "trainer.disable_tqdm=true")
    sweep = next((trained / "outputs/sweeps").iterdir())
    texts = {**files_of(trained / NAME), **files_of(sweep)}
    assert len(texts) > 20
    for path, text in texts.items():
        assert not obeyed(text), (path, obeyed(text))
    for path in (path for path in texts if path.name == "report.md"):
        tokens = [
            inner
            for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(texts[path])
            for inner in (token.children or [token])
        ]
        assert not {"link_open", "html_inline", "html_block", "em_open", "strong_open"} & {
            token.type for token in tokens
        }
        sources = [token.attrs["src"] for token in tokens if token.type == "image"]
        assert all(re.fullmatch(r"loss\.png|pictures/[\w.-]+\.png", source) for source in sources)
    for row in csv.reader((sweep / "leaderboard.csv").open(encoding="utf-8", newline="")):
        assert all(cell[:1] not in ("=", "+", "-", "@") or re.fullmatch(r"[+-][\d.e-]+|-", cell) for cell in row)


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb"])
def test_no_tracker_makes_markup_of_it(trained: Path, tracker: str) -> None:
    shown = run(
        trained, "trainer=predict", f"model.checkpoint_dir=['{NAME}']", f"tracker={tracker}", "data.eval_dataset=records.json",
        f"trainer.output_dir='{tracker} {NAME}'", "data.source_prefix='![i](http://evil.example) <img src=http://evil.example>'",
        WANDB_MODE="offline", HOME=str(trained),
    )  # fmt: skip
    assert "[INFO]" not in shown
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugin_util import markdown_to_safe_html

        events = EventAccumulator(str(trained / f"{tracker} {NAME}/tensorboard"))
        events.Reload()
        (config,) = events.Tensors("config/text_summary")
        shown = markdown_to_safe_html(config.tensor_proto.string_val[0].decode())
        assert "<img" not in shown and "<a" not in shown and "![i](http://evil.example)" in shown
