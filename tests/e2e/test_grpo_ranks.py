"""stage=grpo on two ranks that are killed; tests/e2e/test_rank_matrix.py compares with one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(5) for b in range(5)]
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=sums.json", "data.max_source_length=32", "data.max_target_length=6",
    "data.dev_ratio=0.2", "trainer.do_eval=true", "trainer.disable_tqdm=true", "trainer.logging_steps=1", "trainer.max_steps=4",
    "trainer.save_steps=2", "trainer.learning_rate=2e-3", "finetuning.lora_dropout=0",
    "stage=grpo", "reward=[number,length]", "reward.length.buffer_tokens=4", "stage.num_generations=4",
]  # fmt: skip
TWO = ["parallel=ddp", "parallel.processes=2", "trainer.per_device_train_batch_size=2"]
DAPO = ["stage.loss=dapo", "stage.scale_rewards=batch", "stage.num_iterations=2", "stage.microbatch_size=3"]


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
def test_killed_ranks_end_in_the_same_bytes(here: Path) -> None:
    words = [*DAPO, *TWO]
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
