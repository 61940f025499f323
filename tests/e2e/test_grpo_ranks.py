"""stage=grpo and ppo on two ranks: the answers, losses and weights are those of one process with the doubled batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from json_lines import lines
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(5) for b in range(5)]
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=sums.json", "data.max_source_length=32", "data.max_target_length=6",
    "data.dev_ratio=0.2", "trainer.do_eval=true", "trainer.disable_tqdm=true", "trainer.logging_steps=1", "trainer.max_steps=4",
    "trainer.save_steps=2", "trainer.learning_rate=2e-3", "finetuning.lora_dropout=0",
    "stage=grpo", "reward=[number,length]", "reward.length.buffer_tokens=4", "stage.num_generations=4",
]  # fmt: skip
TWO = ["parallel=ddp", "parallel.processes=2", "trainer.per_device_train_batch_size=2"]
LOSSES = {
    "dapo": ["stage.loss=dapo", "stage.scale_rewards=batch", "stage.num_iterations=2", "stage.microbatch_size=3"],
    "rloo": ["stage.loss=rloo", "stage.scale_rewards=batch"],
    "grpo": ["stage.loss=grpo"],
}


def start(here: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "glmtuner", *WORDS, *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=1500)
    assert process.returncode == code, out
    return out


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "sums.json").write_text(json.dumps(SUMS), encoding="utf-8")
    return tmp_path


@pytest.mark.heavy
@pytest.mark.parametrize("loss", ["dapo", "rloo", "grpo"])
def test_two_ranks_learn_what_one_process_learns(here: Path, loss: str) -> None:
    """A rank draws the answers that one process draws to the same prompts, and averages what all ranks' answers say."""
    both = [
        start(here, *LOSSES[loss], "trainer.per_device_train_batch_size=4", "trainer.output_dir=one"),
        start(here, *LOSSES[loss], *TWO, "trainer.output_dir=two"),
    ]
    for process in both:
        finish(process)
    one, two = (lines(here / name / "history.jsonl") for name in ("one", "two"))
    assert [line.keys() for line in two] == [line.keys() for line in one] and len(one) == 5
    for line, wanted in zip(two, one, strict=True):
        for name, value in wanted.items():
            # the sum over an answer of differences of rounded log-probabilities
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-4 if name == "kl" else 2e-5), (
                name,
                line,
                wanted,
            )
    assert len({line.get("response_length") for line in one}) > 2 and any(line.get("kl", 0) > 1e-3 for line in one)
    mine, theirs = (lines(here / name / "sampled.jsonl") for name in ("two", "one"))
    assert [(line["step"], line["answer"]) for line in mine] == [(line["step"], line["answer"]) for line in theirs]
    weights, wanted = (load_file(here / name / "adapter/adapter_model.safetensors") for name in ("two", "one"))
    for name, value in wanted.items():
        assert (weights[name] - value).abs().max() < 2e-4, name  # of which Adam makes steps of 2e-3


@pytest.mark.heavy
def test_killed_ranks_end_in_the_same_bytes(here: Path) -> None:
    words = [*LOSSES["dapo"], *TWO]
    finish(start(here, *words, "trainer.output_dir=whole"))
    process = start(here, *words, "trainer.output_dir=cut")
    until = time.monotonic() + 600
    while not (here / "cut/checkpoints/checkpoint-2/complete.json").is_file():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    finish(process, 1)
    assert not (here / "cut/metrics.json").is_file()
    shutil.rmtree(here / "cut/checkpoints/checkpoint-4", ignore_errors=True)  # of a kill that came late
    assert "resumed from checkpoint-2" in finish(start(here, *words, "trainer.output_dir=cut"))
    for name in ("history.jsonl", "sampled.jsonl", "adapter/adapter_model.safetensors"):
        assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
