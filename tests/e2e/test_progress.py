"""Progress of runs and sweeps: a live line or a table in a real terminal, plain lines elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import ROOT, Terminal, shown

TINY = [
    "model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "trainer.per_device_train_batch_size=1",
    "trainer.logging_steps=2", "trainer.learning_rate=1e-3", "finetuning=lora", "trainer.use_cpu=true",
]  # fmt: skip
EVALUATED = ["data.dev_ratio=0.7", "trainer.do_eval=true", "trainer.eval_strategy=steps", "trainer.eval_steps=8",
             "trainer.per_device_eval_batch_size=1"]  # fmt: skip
PLAIN = re.compile(
    r"step (\d+) of (\d+): loss ([\d.e+-]+), grad_norm [\d.e+-]+, learning_rate [\d.e+-]+, epoch [\d.]+, [\d,]+ tokens/s,"
    r"(?: [\w ]+ left,)? peak \d+\.\d\d GiB"
)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_run_in_a_terminal(tmp_path):
    terminal = Terminal(120, 60)
    seen: set[str] = set()
    run = [*TINY, *EVALUATED, "trainer.max_steps=16", "trainer.output_dir=run"]
    code = terminal.run(run, tmp_path, watch=lambda lines: seen.update(line.rstrip() for line in lines))
    lines = terminal.lines()
    assert code == 0, lines
    live = [line for line in seen if re.match(r"step \d+ of 16, ", line) and line.endswith(" GiB")]
    assert any("evaluation " in line for line in live) and any(" left, peak " in line for line in live), live
    assert any(re.search(r"epoch \d+\.\d\d, loss [\d.]+, [\d,]+ tokens/s, ", line) for line in live), live
    steps = [line for line in lines if line.startswith("step ")]
    # the last is that after the training
    evaluations = [line for line in history(tmp_path / "run") if "eval_loss" in line]
    assert [line.partition(",")[0] for line in steps[:-1]] == [
        f"step {line['step']} of 16: eval_loss {line['eval_loss']:.4g}" for line in evaluations[:-1]
    ]
    last = history(tmp_path / "run")
    loss = [line["loss"] for line in last if "loss" in line][-1]
    assert re.fullmatch(
        rf"step 16 of 16, epoch [\d.]+, loss {loss:.4g}, [\d,]+ tokens/s, peak \d+\.\d\d GiB, took \d+ s", steps[-1]
    )
    assert "{'" not in shown(terminal.written) and "it/s" not in shown(terminal.written)
    terminal.close()


def test_ctrl_c_leaves_a_clean_line_in_a_narrow_terminal(tmp_path):
    terminal = Terminal(20, 60)
    run = [*TINY, "trainer.max_steps=2000", "trainer.output_dir=run", "trainer.save_strategy=no"]
    assert terminal.run(run, tmp_path, interrupt_at="of 2000,") == 130
    lines = terminal.lines()
    text = "".join(lines)
    assert text.replace(" ", "").endswith("glmtuner:stopped;thesamecommandwiththesametrainer.output_dirresumes"), lines
    assert not [line for line in lines if line.startswith("step ")] and "of 2000," in shown(terminal.written)
    terminal.close()


def test_a_run_without_a_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "glmtuner", *TINY, "trainer.max_steps=4", "trainer.output_dir=run", "trainer.do_predict=true",
         "trainer.predict_with_generate=true", "data.max_target_length=4", "data.dev_ratio=0.2"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert b"\x1b" not in text and b"\r" not in text
    found = [PLAIN.fullmatch(line) for line in done.stdout.decode().splitlines() if line.startswith("step ")]
    assert [(each[1], each[2], each[3]) for each in found] == [
        (str(line["step"]), "4", f"{line['loss']:.4g}") for line in history(tmp_path / "run") if "loss" in line
    ]
    assert done.stderr == b""


SWEEP = ["-m", *TINY, "trainer.max_steps=40", "trainer.learning_rate=1e-3,2e-3", "name=学习率", "objective=train_loss"]


@pytest.mark.heavy
def test_a_sweep_by_the_basic_launcher(tmp_path):
    terminal = Terminal(140, 90)
    assert terminal.run(SWEEP, tmp_path) == 0, terminal.lines()
    text = shown(terminal.written)
    for number in (0, 1):
        assert re.search(rf"job {number} \({number + 1} of 2\): step \d+ of 40, ", text)
    assert len([line for line in terminal.lines() if line.startswith("step 40 of 40, ")]) == 2
    terminal.close()


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["joblib", pytest.param("shared", marks=pytest.mark.matrix)])
def test_a_table_of_a_sweep(tmp_path, launcher):
    terminal = Terminal(140, 60)
    screens: list[list[str]] = []
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    words = [*SWEEP, f"hydra/launcher={launcher}", "trainer.max_steps=600", *more]
    assert terminal.run(words, tmp_path, watch=screens.append) == 0, terminal.lines()
    tables = [screen for screen in screens if any(line.startswith("job ") and " state " in line for line in screen)]
    rows = [
        line.rstrip()
        for screen in tables
        for line in screen
        if re.match(r"learning_rate-\S+ +running +\d+ of \d00", line)
    ]
    # speed and time left come with progress.json's second writing, after five seconds: test_live_table.py has them
    assert any(re.search(r"of 600 +[\d.]+", row) for row in rows), rows[-3:]
    assert any(re.search(r"2 running.*: \S*outputs/sweeps/", line) for screen in tables for line in screen)
    lines = terminal.lines()
    assert not [line for line in lines if re.match(r"learning_rate-\S+ +(running|done)", line) or " state " in line], (
        lines
    )
    terminal.close()


@pytest.mark.heavy
def test_ctrl_c_ends_a_table(tmp_path):
    terminal = Terminal(140, 60)
    words = [*SWEEP, "hydra/launcher=shared", "trainer.max_steps=3000", "trainer.save_strategy=no"]
    assert terminal.run(words, tmp_path, interrupt_at="2 running") != 0
    assert not [line for line in terminal.lines() if re.match(r"learning_rate-\S+ +running", line)], terminal.lines()
    terminal.close()
