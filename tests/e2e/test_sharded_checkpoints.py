"""Checkpoints that every rank writes its part of: gone on from by more and fewer ranks to the same losses, also after a kill."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_parallel import finish, lines, ranks_of, start
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.heavy
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=38", "data.max_target_length=32",
    "data.dev_ratio=0.2", "finetuning=full", "trainer.learning_rate=1e-3", "trainer.max_steps=8", "trainer.logging_steps=2",
    "trainer.save_steps=1", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
]  # fmt: skip
BATCH = "trainer.per_device_train_batch_size"
TWO = [*WORDS, "parallel=fsdp2", "parallel.processes=2", f"{BATCH}=6", "trainer.async_save=true"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """A run of two ranks that nothing has interrupted: 12 of 31 records in a step, so that an epoch ends in step 3."""
    finish(start(here, *TWO, "trainer.output_dir=whole"))
    return here / "whole"


def same(folder: Path, whole: Path, after: int) -> None:
    """The losses after a step, and the weights in the end, are those of the run that was not interrupted."""
    wanted = [line for line in lines(whole) if line["step"] > after]
    found = lines(folder)[-len(wanted) :]
    assert [line["step"] for line in found] == [line["step"] for line in wanted] and wanted
    for mine, theirs in zip(found, wanted, strict=True):
        for key in theirs.keys() - {"epoch"}:  # within an epoch, that of transformers counts batches, of one rank
            value = theirs[key]
            assert mine[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 0, abs=1e-5), (
                key,
                mine,
                theirs,
            )
    mine, theirs = (load_file(path / "model/model.safetensors") for path in (folder, whole))
    assert mine.keys() == theirs.keys()
    # AdamW divides by the size of a gradient: where that is nearly zero, its rounding moves a weight, which no loss shows
    assert (
        sum((mine[name] - theirs[name]).abs().sum() for name in theirs) / sum(map(torch.numel, theirs.values())) < 1e-7
    )


def test_two_three_one_and_four_ranks_go_on_from_each_other_to_the_same_losses(here: Path, whole: Path) -> None:
    """At steps between logged ones, so that the sums since the last one are shared out, too."""
    chain = [("whole", "checkpoint-3", ["parallel=fsdp2", "parallel.processes=3", f"{BATCH}=4"], 3, 2),
             ("by3", "checkpoint-5", [f"{BATCH}=6", "trainer.gradient_accumulation_steps=2"], 1, 3),
             ("by1", "checkpoint-6", ["parallel=fsdp2", "parallel.processes=4", f"{BATCH}=3"], 4, 1)]  # fmt: skip
    for source, checkpoint, words, count, before in chain:
        words = [
            *words,
            f"trainer.resume_from_checkpoint={source}/checkpoints/{checkpoint}",
            f"trainer.output_dir=by{count}",
        ]
        out = finish(start(here, *WORDS, *words))
        assert f"number of processes: {count}, {before} until here: the rows of every step are the same" in " ".join(
            out.split()
        )
        same(here / f"by{count}", whole, int(checkpoint.removeprefix("checkpoint-")))
    marker = json.loads((here / "by4/checkpoints/checkpoint-8/complete.json").read_text())
    assert marker["ranks"] == 4 and marker["rows_per_step"] == 12
    assert sum("/shard-" in name for name in marker["files"]) == 4 and "trained.safetensors" not in marker["files"]


def test_the_folder_is_one_that_transformers_writes(here: Path, whole: Path) -> None:
    AutoModelForCausalLM.from_pretrained(whole / "model", dtype="auto").save_pretrained(here / "again")
    for path in (here / "again").iterdir():
        assert path.read_bytes() == (whole / "model" / path.name).read_bytes(), path.name


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(here: Path, whole: Path) -> None:
    words = [*TWO, "trainer.output_dir=cut"]
    process = start(here, *words)
    until = time.monotonic() + 600
    while not [*(here / "cut/checkpoints").glob(".partial-checkpoint-[4-8]")]:
        assert time.monotonic() < until and process.poll() is None, "waited in vain"
        time.sleep(0.001)
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGKILL)
    finish(process, 1)
    out = finish(start(here, *words))
    assert "resumed from checkpoint-" in out
    assert (here / "cut/model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert (here / "cut/history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    # a checkpoint of shards is also what another training starts from
    start_from = ["trainer=evaluate", "model.checkpoint_dir=cut/checkpoints/checkpoint-8", "data.dataset=belle_sample", "tracker=none", "data.max_samples=8"]  # fmt: skip
    assert "eval_loss" in finish(start(here, *start_from, "trainer.use_cpu=true", "trainer.output_dir=evaluated"))


def test_more_processes_with_other_rows_are_refused(here: Path, whole: Path) -> None:
    words = [*WORDS, "parallel=fsdp2", "parallel.processes=4", f"{BATCH}=6", "trainer.output_dir=other"]
    out = finish(start(here, *words, "trainer.resume_from_checkpoint=whole/checkpoints/checkpoint-3"), 2)
    told = " ".join(out.split())
    assert "12 rows in an optimizer step, and this run has 24 (processes are 2 there and 4 here)" in told
    assert "must be 3, or start from its weights" in told and "Traceback" not in out and not (here / "other").exists()


def test_one_file_of_the_shards_is_missing(here: Path, whole: Path) -> None:
    shard = next((whole / "checkpoints/checkpoint-2/shards").glob("shard-00002-*"))
    shard.rename(shard.with_suffix(".gone"))
    words = [*WORDS, "trainer.output_dir=other", "trainer.resume_from_checkpoint=whole/checkpoints/checkpoint-2"]
    out = " ".join(finish(start(here, *words, "trainer.per_device_train_batch_size=12"), 2).split())
    assert f"shards/{shard.name} is missing" in out
    assert torch.load(whole / "checkpoints/checkpoint-2/optimizer.pt", weights_only=True)["in_shards"]
