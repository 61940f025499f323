"""`report … --paper` of real sweeps, by the command line, and compiled where a LaTeX is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=24", "data.max_target_length=24",
    "trainer.max_steps=2", "trainer.logging_steps=1", "trainer.disable_tqdm=true", "data.dev_ratio=0.25", "trainer.do_eval=true",
]  # fmt: skip
PREDICTS = ["trainer.do_predict=true", "trainer.predict_with_generate=true"]
PIECES = {
    "main.tex",
    "preamble.tex",
    "setup.tex",
    "results.tex",
    "figures.tex",
    "assets.tex",
    "references.bib",
    "figures",
}
HOSTILE = r"50% of $x & #1_{y}^2 ~ \input{a} <b> |c| -- 😀 中文"


def test_a_sweep_and_a_run_have_a_paper(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner("-m", *WORDS, "trainer.learning_rate=1e-3,1e-2", "name=methods")
    assert done.returncode == 0, done.stdout + done.stderr
    told = glmtuner("report", "outputs/sweeps/methods", "--paper", "en")
    assert told.returncode == 0, told.stderr
    assert "paper: outputs/sweeps/methods/paper/main.tex; compile it in its folder: pdflatex main" in told.stdout
    assert "unknown licence" not in told.stdout and "unknown citation" not in told.stdout, "all that ships is known"
    sweep = tmp_path / "outputs/sweeps/methods"
    assert {path.name for path in (sweep / "paper").iterdir()} == PIECES
    setup = (sweep / "paper/setup.tex").read_text()
    run = next(path for path in sweep.iterdir() if (path / "metrics.json").is_file())
    (machine,) = json.loads((run / "provenance.json").read_text())["hardware"]
    assert f"(logical cores: {machine['cores']}, threads of torch: {machine['threads']})" in setup
    assert "A share of 0.25 of the training data is held out" in setup and "evaluated on 6 records each" in setup
    assert r"$p_{\mathrm{Holm}}$" in (sweep / "paper/results.tex").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['trained_parameters']:,} trained parameters" in setup

    one = glmtuner("report", str(run.relative_to(tmp_path)), "--paper", "zh")
    assert one.returncode == 0 and {path.name for path in (run / "paper").iterdir()} == PIECES
    assert f"{metrics['eval_loss']:.4f}" in (run / "paper/results.tex").read_text()
    again = glmtuner("report", "outputs/sweeps")
    assert again.returncode == 2, "paper/ has made no run of the sweep's folder"
    wrong = glmtuner("report", "outputs/sweeps/methods", "--paper", "fr")
    assert wrong.returncode == 2 and "'fr'" in wrong.stderr and "en" in wrong.stderr and "zh" in wrong.stderr
    assert "type python -m glmtuner report" in wrong.stderr and "Traceback" not in wrong.stderr


def has_file(name: str) -> bool:
    """Whether the installed LaTeX has the file."""
    return subprocess.run(["kpsewhich", name], capture_output=True, check=False).returncode == 0


def compiled(folder: Path, engine: str) -> tuple[str, str]:
    """The text of the compiled paper without spaces, and the log; fails the test if LaTeX does."""
    for words in ([engine], ["bibtex"], [engine], [engine]):
        options = [] if words == ["bibtex"] else ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]
        done = subprocess.run([*words, *options, "main"], cwd=folder, capture_output=True, check=False, timeout=1200)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]
    done = subprocess.run(["pdftotext", "main.pdf", "-"], cwd=folder, capture_output=True, text=True, check=True)
    log = re.sub(r"\n(?=\S)", "", (folder / "main.log").read_text(encoding="utf-8", errors="replace"))
    return re.sub(r"\s", "", done.stdout), log


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four runs over a text that LaTeX would obey, one of them damaged."""
    folder = tmp_path_factory.mktemp("hostile")
    words = ["-m", *WORDS, *PREDICTS, f"data.source_prefix='{HOSTILE}',plain", "trainer.seed=1,2", "name=h"]
    done = subprocess.run(
        [sys.executable, "-m", "glmtuner", *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.parent for path in (folder / "outputs/sweeps/h").glob("*/metrics.json"))
    assert len(runs) == 4
    (runs[0] / "metrics.json").write_text('{"half')
    return folder / "outputs/sweeps/h"


def needed(language: str, engine: str) -> list[str]:
    """The programs and files of a LaTeX that this machine lacks."""
    programs = [name for name in (engine, "bibtex", "pdftotext", "kpsewhich") if shutil.which(name) is None]
    files = ["booktabs.sty"]
    if language == "zh":
        files += ["ctex.sty"] if engine == "xelatex" else ["CJKutf8.sty", "c70gbsn.fd"]
    return programs or [name for name in files if not has_file(name)]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("language", "engine"), [("en", "pdflatex"), ("en", "xelatex"), ("zh", "xelatex"), ("zh", "pdflatex")]
)
def test_the_paper_compiles_and_shows_every_text(
    glmtuner: Callable, hostile: Path, tmp_path: Path, language: str, engine: str
) -> None:
    if missing := needed(language, engine):
        pytest.skip(f"needs {', '.join(missing)}: in Debian texlive-latex-recommended and poppler-utils, for xelatex texlive-xetex, "
                    "for Chinese texlive-lang-chinese, or under pdflatex latex-cjk-chinese")  # fmt: skip
    shutil.copytree(hostile, tmp_path / "h")
    told = glmtuner("report", "h", "--paper", language)
    assert told.returncode == 0, told.stderr
    folder = tmp_path / "h/paper"
    text, log = compiled(folder, engine)
    assert not re.search(r"undefined (references|citations)|multiply defined|Citation `", log)
    assert not re.search(r"Missing character: There is no [^ ]+ in font (?!nullfont)", log)
    if (language, engine) == ("zh", "pdflatex"):
        return  # the fonts of CJKutf8 do not tell their characters
    shown = text.replace("\u02dc", "~").replace("\u02c6", "^")
    for part in (r"50%of$x&#1_{y}^2~\input{a}<b>|c|--[U+1F600]", "Edward", "damaged"):
        assert part in shown, part
    best = re.search(r"\\textbf\{([\d.]+)", (folder / "results.tex").read_text(encoding="utf-8"))
    assert best and best[1] in shown
    if language == "en":
        has_chinese = engine == "pdflatex" and has_file("CJKutf8.sty") and has_file("c70gbsn.fd")
        assert "Experimentalset-up" in shown and ("U+4E2DU+6587" in shown) is not has_chinese
    else:
        assert "实验设置" in shown and "中文" in shown


def test_a_latex_that_lacks_something_is_told_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert needed("en", "pdflatex") == ["pdflatex", "bibtex", "pdftotext", "kpsewhich"]
