"""Killed with SIGKILL and started again with the same command, a run ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "data.max_samples=60", "data.dev_ratio=0.1",
    "finetuning.lora_dropout=0.1", "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=3",
    "trainer.max_steps=16", "trainer.logging_steps=3", "trainer.save_steps=4", "trainer.learning_rate=2e-3",
    "trainer.eval_strategy=steps", "trainer.eval_steps=5", "trainer.disable_tqdm=true",
]  # fmt: skip


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "glmtuner", *WORDS, f"trainer.output_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "history.jsonl").read_bytes(), (folder / "adapter/adapter_model.safetensors").read_bytes()


def finish(folder: Path) -> str:
    process = start(folder)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill_when(folder: Path, condition: Callable[[], bool]) -> bool:
    """Start the run and kill it once the condition holds; False when it ended first."""
    process = start(folder)
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.0005)
    process.communicate()
    return False


def lines(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder)
    return outcome(folder)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_killed_at_random_moments(undisturbed: tuple[bytes, bytes], tmp_path: Path, seed: int) -> None:
    folder, rng = tmp_path / "run", random.Random(seed)
    for _ in range(2):
        wanted, pause = lines(folder) + rng.randint(1, 3), rng.uniform(0, 0.3)

        def reached(wanted: int = wanted, pause: float = pause) -> bool:
            if lines(folder) < wanted:
                return False
            time.sleep(pause)
            return True

        kill_when(folder, reached)
    finish(folder)
    assert outcome(folder) == undisturbed
    history, timings = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("history.jsonl", "timings.jsonl")
    )
    assert [line["step"] for line in timings] == [line["step"] for line in history]
    for name in ("time", "seconds", "tokens"):  # they go on where the checkpoint was
        values = [line[name] for line in timings]
        assert values == sorted(values) and values[0] > 0
    assert all("tokens_per_second" in timing for timing, line in zip(timings, history, strict=True) if "loss" in line)
    plan = dict(json.loads((folder / "plan.json").read_text())["plan"])
    assert plan["run folder"] == str(folder)


def test_killed_during_a_save(undisturbed: tuple[bytes, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saving = folder / "checkpoints/.partial-checkpoint-8"
    assert kill_when(folder, saving.exists)
    finish(folder)
    assert outcome(folder) == undisturbed


def test_broken_checkpoints_are_named_and_passed_over(undisturbed: tuple[bytes, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    twelve = folder / "checkpoints/checkpoint-12"
    assert kill_when(folder, twelve.exists)
    optimizer = twelve / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    (folder / "checkpoints/checkpoint-8/rng_state.pth").unlink()
    out = finish(folder)
    assert "checkpoint-12 is skipped: optimizer.pt is truncated" in out
    assert "checkpoint-8 is skipped: it has no RNG state" in out
    assert "resumed from checkpoint-4" in out
    assert outcome(folder) == undisturbed


def test_finished_and_foreign_folders_are_refused(undisturbed: tuple[bytes, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert kill_when(folder, lambda: lines(folder) > 0)
    other = subprocess.run(
        [sys.executable, "-m", "glmtuner", *WORDS, "trainer.seed=7", f"trainer.output_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "unfinished run of another configuration (different: trainer.seed)" in other.stderr
    finish(folder)
    again = start(folder)
    out, _ = again.communicate()
    assert again.returncode == 2
    assert "holds a finished run" in out
    assert outcome(folder) == undisturbed


def test_a_training_is_continued_in_a_new_folder(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint, a run folder or `true`, with the same values it ends as if it had not been cut."""
    words = [*WORDS, "trainer.max_steps=8", "trainer.resume_from_checkpoint={}", "trainer.output_dir={}"]

    def run(source: str, folder: str, *others: str) -> subprocess.CompletedProcess[str]:
        typed = [word.format(source if "resume" in word else folder) for word in words]
        done: subprocess.CompletedProcess[str] = glmtuner(*typed, *others)
        return done

    first = run("null", "first")
    assert first.returncode == 0, first.stderr
    for source, folder in (("first/checkpoints/checkpoint-4", "second"), ("first", "third")):
        done = run(source, folder)
        assert done.returncode == 0, done.stderr
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / folder / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
        lines = (tmp_path / folder / "history.jsonl").read_text().splitlines()
        assert lines == [line for line in (tmp_path / "first/history.jsonl").read_text().splitlines() if line in lines]
    assert (
        len((tmp_path / "second/history.jsonl").read_text().splitlines()) == 3
    )  # the log of 6, the evaluations of 5 and 8
    other = run("first", "fourth", "trainer.learning_rate=1e-3", "trainer.optim=sgd")
    assert other.returncode == 2
    assert (
        "trainer.learning_rate is 0.002 there and 0.001 here; trainer.optim is adamw_torch_fused there" in other.stderr
    )
    assert not (tmp_path / "fourth").exists()
    longer = run("first", "fifth", "trainer.max_steps=10", "trainer.logging_steps=1")
    assert longer.returncode == 0, longer.stderr
    rates = [line.get("learning_rate") for line in map(json.loads, (tmp_path / "fifth/history.jsonl").open())]
    assert rates[0] == pytest.approx(2e-3 * 2 / 10)  # the linear schedule of 10 steps; that of 8 is at its end
    assert "there is no folder nowhere" in run("true", "nowhere").stderr
    # an unfinished run in its own folder goes on with a later end
    shutil.copytree(tmp_path / "first", tmp_path / "cut")
    for name in ("metrics.json", "adapter/adapter_model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-8")
    own = run("true", "cut", "trainer.max_steps=10")
    assert own.returncode == 0, own.stderr
    assert "resumed from checkpoint-4" in own.stdout
