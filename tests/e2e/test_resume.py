"""Killed with SIGKILL and started again with the same command, a run ends as if nothing had happened."""

import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from warm_server import WarmServer

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "data.max_samples=60", "data.dev_ratio=0.1",
    "finetuning.lora_dropout=0.1", "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=3",
    "trainer.max_steps=16", "trainer.logging_steps=3", "trainer.save_steps=4", "trainer.learning_rate=2e-3",
    "trainer.eval_strategy=steps", "trainer.eval_steps=5", "trainer.disable_tqdm=true",
]  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    return [*WORDS, f"trainer.output_dir={folder}", *more]


def outcome(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "history.jsonl").read_bytes(), (folder / "adapter/adapter_model.safetensors").read_bytes()


def finish(server: WarmServer, folder: Path) -> str:
    ended = server.run(*command(folder), cwd=folder.parent)
    assert ended.code == 0, ended.output
    return ended.output


def kill(server: WarmServer, folder: Path, **when: Any) -> None:
    """Start the run and let it be killed; `when` are the arguments of the server."""
    ended = server.run(*command(folder), cwd=folder.parent, **when)
    assert ended.code == -signal.SIGKILL, ended.output


def at_step(number: int) -> dict[str, Any]:
    """Killed in the batches of this step, counted from the run's start or resumption."""
    return {"kill_at_call": ("transformers.trainer:Trainer.training_step", 2 * number)}


class Undisturbed(NamedTuple):
    history_and_weights: tuple[bytes, bytes]
    changes: int  # of its files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_server: WarmServer) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = warm_server.run(*command(folder), cwd=folder.parent, below=str(folder))
    assert ended.code == 0, ended.output
    return Undisturbed(outcome(folder), len(ended.operations))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_killed_at_random_moments(undisturbed: Undisturbed, warm_server: WarmServer, tmp_path: Path, seed: int) -> None:
    folder, rng = tmp_path / "run", random.Random(seed)
    for _ in range(2):  # each in the first half of what there is to write, so that it has not ended
        change = rng.randint(1, undisturbed.changes // 2)
        kill(warm_server, folder, below=str(folder), kill_at=change, opened=rng.random() < 0.5)
    kill(warm_server, folder, **at_step(rng.randint(1, 3)))
    finish(warm_server, folder)
    assert outcome(folder) == undisturbed.history_and_weights
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


def test_killed_during_a_save(undisturbed: Undisturbed, warm_server: WarmServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saving = folder / "checkpoints/.partial-checkpoint-8"
    for file in ("adapter_config", "trainer_state", ".complete"):
        kill(warm_server, folder, below=str(folder), matching=re.escape(f"/{saving.name}/{file}"), kill_at=1)
        assert saving.is_dir() and not saving.with_name("checkpoint-8").exists()
    finish(warm_server, folder)
    assert outcome(folder) == undisturbed.history_and_weights


def test_broken_checkpoints_are_named_and_passed_over(
    undisturbed: Undisturbed, warm_server: WarmServer, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    twelve = folder / "checkpoints/checkpoint-12"
    kill(warm_server, folder, **at_step(13))
    optimizer = twelve / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    (folder / "checkpoints/checkpoint-8/rng_state.pth").unlink()
    out = finish(warm_server, folder)
    assert "checkpoint-12 is skipped: optimizer.pt is truncated" in out
    assert "checkpoint-8 is skipped: it has no RNG state" in out
    assert "resumed from checkpoint-4" in out
    assert outcome(folder) == undisturbed.history_and_weights


def test_finished_and_foreign_folders_are_refused(
    undisturbed: Undisturbed, warm_server: WarmServer, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    kill(warm_server, folder, **at_step(4))
    other = warm_server.run(*command(folder, "trainer.seed=7"), cwd=tmp_path)
    assert other.code == 2
    assert "unfinished run of another configuration (different: trainer.seed)" in other.output
    finish(warm_server, folder)
    again = warm_server.run(*command(folder), cwd=tmp_path)
    assert again.code == 2
    assert "holds a finished run" in again.output
    assert outcome(folder) == undisturbed.history_and_weights


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
