"""Two processes on the CPU learn what one learns with the doubled batch, in one folder; a rank that dies ends the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# 31 records to learn from: the last batches of an epoch are not full
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=38", "data.max_target_length=32",
    "data.dev_ratio=0.2", "finetuning.lora_dropout=0", "trainer.learning_rate=1e-3", "trainer.num_train_epochs=2",
    "trainer.logging_steps=1", "trainer.save_steps=3", "trainer.eval_strategy=steps", "trainer.eval_steps=4",
    "trainer.do_predict=true", "trainer.predict_with_generate=true", "trainer.disable_tqdm=true",
]  # fmt: skip
ONE, TWO = "trainer.per_device_train_batch_size=8", "trainer.per_device_train_batch_size=4"
BEST = [
    *(word for word in WORDS if not word.startswith(("trainer.eval", "trainer.save", "trainer.num_train", "trainer.learning"))),
    "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.max_steps=8", "trainer.learning_rate=1e-3",
    "trainer.load_best_model_at_end=true", "trainer.greater_is_better=true", "trainer.do_eval=true",  # the worst, early on
]  # fmt: skip
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(here: Path, *words: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(by or (sys.executable, "-m")), "glmtuner", *words],
        cwd=here,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=1500)
    assert process.returncode == code, out
    return out


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def same_losses(folder: Path, other: Path) -> None:
    mine, theirs = lines(folder), lines(other)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs] and len(mine) > 8
    for line, wanted in zip(mine, theirs, strict=True):
        for key, value in wanted.items():
            # torch sums a norm of millions in float32 to four digits, by halves to others
            assert line[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 0, abs=1e-5), (
                key,
                line,
                wanted,
            )
    for name in ("predictions.jsonl", "evaluations/step-4.jsonl"):
        assert (folder / name).read_text() == (other / name).read_text()
    for name in ("losses.jsonl",):
        found, wanted = (
            [json.loads(line) for line in (path / name).read_text().splitlines()] for path in (folder, other)
        )
        assert [row["tokens"] for row in found] == [row["tokens"] for row in wanted] and len(found) == 8
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=1e-4)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(here: Path) -> Path:
    finish(start(here, *WORDS, ONE, "trainer.output_dir=one"))
    return here / "one"


@pytest.fixture(scope="module")
def ddp(here: Path) -> tuple[Path, str]:
    out = finish(start(here, *WORDS, TWO, "parallel=ddp", "parallel.processes=2", "trainer.output_dir=ddp"))
    return here / "ddp", out


def test_ddp_learns_what_one_process_learns(one: Path, ddp: tuple[Path, str]) -> None:
    folder, out = ddp
    same_losses(folder, one)
    assert out.count("run folder") == 2 and out.count("step 1 of ") == 1  # one of the two speaks
    assert not list((folder / "evaluations").glob("*rank*"))
    mine, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, one))
    assert mine.keys() == theirs.keys()
    for name in ("trained_parameters", "total_parameters", "predict_rouge-l", "train_loss"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-5)
    marker = json.loads((folder / "checkpoints/checkpoint-3/complete.json").read_text())
    assert marker["ranks"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= marker["files"].keys()


@pytest.mark.heavy
def test_torchrun_makes_one_folder_and_the_same_losses(one: Path, here: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    finish(start(here, *WORDS, TWO, "name=by_torchrun", by=torchrun))
    (folder,) = here.glob("outputs/*/*by_torchrun*")
    same_losses(folder, one)


@pytest.mark.heavy
def test_fsdp2_on_the_cpu_learns_what_one_process_learns(here: Path) -> None:
    words = [*WORDS, "finetuning=full", "trainer.gradient_accumulation_steps=2"]
    words = [word for word in words if "lora" not in word]
    finish(start(here, *words, "trainer.per_device_train_batch_size=4", "trainer.output_dir=full"))
    two = [
        "trainer.per_device_train_batch_size=2",
        "parallel=fsdp2",
        "parallel.processes=2",
        "parallel.cpu_offload=true",
    ]
    finish(start(here, *words, *two, "trainer.output_dir=fsdp2"))
    same_losses(here / "fsdp2", here / "full")
    out = finish(
        start(here, "trainer=evaluate", "model.checkpoint_dir=fsdp2", "data.dataset=belle_sample", "tracker=none")
    )
    assert "eval_loss" in out


@pytest.fixture(scope="module")
def best_of_one(here: Path) -> Path:
    """A run of one process whose best checkpoint is not its last one."""
    finish(start(here, *BEST, ONE, "trainer.output_dir=best_one"))
    state = json.loads((here / "best_one/checkpoints/checkpoint-8/trainer_state.json").read_text())
    assert state["best_global_step"] < 8
    return here / "best_one"


@pytest.mark.heavy
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_every_rank_ends_with_the_best_checkpoint(here: Path, best_of_one: Path, parallel: str) -> None:
    two = [TWO, f"parallel={parallel}", "parallel.processes=2", f"trainer.output_dir=best_{parallel}"]
    finish(start(here, *BEST, *two))
    folder = here / f"best_{parallel}"
    assert (folder / "predictions.jsonl").read_text() == (best_of_one / "predictions.jsonl").read_text()
    mine, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, best_of_one))
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert mine["predict_rouge-l"] == theirs["predict_rouge-l"]


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


@pytest.mark.heavy
def test_ranks_that_are_stopped_or_killed_end_the_run_and_go_on_to_the_same_bytes(
    here: Path, ddp: tuple[Path, str]
) -> None:
    words = [*WORDS, TWO, "parallel=ddp", "parallel.processes=2", "trainer.output_dir=cut"]
    folder = here / "cut"
    process = start(here, *words)
    wait_for(lambda: lines(folder))
    process.send_signal(signal.SIGTERM)
    assert re.search(r"stopped by SIGTERM after step \d+; the same command", finish(process, 143))
    kept = len(lines(folder))
    process = start(here, *words)
    wait_for(lambda: len(lines(folder)) > kept)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert "rank 1 of 2 was killed by SIGKILL; the same command" in finish(process, 1)
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert "rank 1 of 2 was killed by SIGKILL" in json.loads((folder / "failed.json").read_text())["reason"]
    alone = finish(start(here, *WORDS, TWO, "trainer.output_dir=cut"), 2)
    assert "unfinished run of another configuration (different: parallel.name, parallel.processes)" in alone
    assert "resumed from checkpoint-" in finish(start(here, *words))
    assert not (folder / "failed.json").exists()
    for name in ("history.jsonl", "predictions.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (ddp[0] / name).read_bytes(), name


def test_a_mistake_that_all_ranks_find_is_told_once(here: Path) -> None:
    out = finish(start(here, *WORDS, "parallel=ddp", "parallel.processes=2", "trainer.resume_from_checkpoint=nope"), 2)
    assert out.count("glmtuner: trainer.resume_from_checkpoint=nope cannot be resumed from") == 1
    assert out.count("glmtuner: ") == 1 and "Traceback" not in out
