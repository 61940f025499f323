"""Ranks that share a row learn what one process learns: losses and gradients, whole runs, and a run that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shared_row_ranks import LENGTHS
from zoo import KINDS

from glmtuner.distributed.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests/architectures")))
ENV = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
WITHIN = 1e-5
# GLM, ChatGLM-6B, plain attention, windows shorter than the samples (one with a loss that is not computed in chunks), and hybrids of
# attention with a gated delta net, short convolutions and Mamba
ARCHITECTURES = ("glm", "chatglm", "qwen3", "mistral", "cohere2", "qwen3_next", "lfm2", "bamba")
REFUSED = {  # attention of their own code, or with weights of their own for each head
    "glm_moe_dsa": "does not compute attention through transformers' AttentionInterface",
    "bloom": "does not compute attention through transformers' AttentionInterface",
    "falcon": "does not compute attention through transformers' AttentionInterface",
    "gpt_oss": "GptOssForCausalLM cannot be computed in parts",
}


def compared_by_ranks(count: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """What rank 0 of `count` ranks says of each case."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "tests/shared_row_ranks.py"), *cases]
    processes = [
        subprocess.Popen(
            command,
            env={**ENV, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        out, problems = processes[0].communicate(timeout=1500)
        assert [process.wait(60) for process in processes] == [0] * count, problems
    finally:
        for process in processes:
            process.kill()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [each["case"] for each in found] == cases
    return {each["case"]: each for each in found}


def assert_equal(found: dict[str, dict[str, Any]], count: int) -> None:
    for case, each in found.items():
        tokens = sum(LENGTHS[case.split(":")[1]])
        assert each.get("own_tokens") == -(-tokens // count), each  # a part, not the row
        assert each["loss"] < WITHIN and each["gradient"] < WITHIN and each["parameters"] > 4, each
        assert each["evaluation"] < 1e-3 and each["tokens"] == 0, each  # sums over up to 56 tokens


def test_losses_and_gradients_of_two_ranks_are_those_of_plain_transformers() -> None:
    cases = [f"{name}:{row}:full" for name in ARCHITECTURES for row in LENGTHS]
    cases += ["glm:pack:p_tuning", "chatglm:one:p_tuning"]
    assert_equal(compared_by_ranks(2, cases), 2)


@pytest.mark.heavy
@pytest.mark.matrix
@pytest.mark.parametrize("count", [2, 4])
def test_every_kind_of_architecture_is_equal_or_refused(count: int) -> None:
    """Four ranks repeat keys and values of models that have two heads of them."""
    names = [*dict.fromkeys((*ARCHITECTURES, *KINDS, "jamba", "chatglm2"))]
    found = compared_by_ranks(count, [f"{name}:{row}:full" for name in names for row in LENGTHS])
    refused = {case: each for case, each in found.items() if "refused" in each}
    assert {case.split(":")[0] for case in refused} == REFUSED.keys()
    for case, each in refused.items():
        assert REFUSED[case.split(":")[0]] in each["refused"]
    assert_equal({case: each for case, each in found.items() if case not in refused}, count)


@pytest.mark.heavy
def test_four_ranks_repeat_keys_values_and_the_prefix_of_the_heads_that_they_share() -> None:
    cases = [f"{name}:pack:full" for name in ARCHITECTURES]
    assert_equal(compared_by_ranks(4, [*cases, "glm:pack:p_tuning", "glm:one:p_tuning", "chatglm:pack:p_tuning"]), 4)


# -- whole runs ------------------------------------------------------------------------------------------------------------

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=38", "data.max_target_length=32",
    "data.dev_ratio=0.2", "trainer.learning_rate=1e-3", "trainer.num_train_epochs=2", "trainer.logging_steps=1", "trainer.save_steps=3",
    "trainer.eval_strategy=steps", "trainer.eval_steps=4", "trainer.disable_tqdm=true", "trainer.use_cpu=true",
]  # fmt: skip
LORA = "finetuning.lora_dropout=0"
TWO = ["parallel=ddp", "parallel.processes=2", "parallel.sequence=2"]


def start(here: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "glmtuner", *words],
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


def same_run(folder: Path, other: Path) -> None:
    mine, theirs = lines(folder), lines(other)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs] and mine
    for line, wanted in zip(mine, theirs, strict=True):
        for key, value in wanted.items():
            # torch sums a norm of millions in float32 to four digits, by halves to others
            assert line[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 0, abs=WITHIN), (key, line)
    found, wanted_rows = (
        [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()] for path in (folder, other)
    )
    assert [row["tokens"] for row in found] == [row["tokens"] for row in wanted_rows] and len(found) >= 8
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted_rows], rel=1e-4)


def test_a_run_of_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    words = [*WORDS, LORA, "trainer.per_device_train_batch_size=8", "trainer.do_predict=true"]
    words += ["trainer.predict_with_generate=true"]
    finish(start(tmp_path, *words, "trainer.output_dir=one"))
    out = finish(start(tmp_path, *words, *TWO, "trainer.output_dir=two"))
    one, two = tmp_path / "one", tmp_path / "two"
    same_run(two, one)
    assert (two / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    assert "parallel.sequence=2: 2 processes share each row, and the heads of its attention" in out
    assert "8 of 8 records, 2 epochs" in out and out.count("step 1 of 8") == 1  # not of 16 records
    timings = [[json.loads(line) for line in (path / "timings.jsonl").read_text().splitlines()] for path in (one, two)]
    assert [line["tokens"] for line in timings[0]] == [line["tokens"] for line in timings[1]]
    marker = json.loads((two / "checkpoints/checkpoint-3/complete.json").read_text())
    assert marker["ranks"] == 2


RUNS = {  # words of the run, the rows of a batch with one process and with several, and how these share it
    "freeze, two groups": (["finetuning=freeze"], 8, 4, ["parallel=ddp", "parallel.processes=4", "parallel.sequence=2"]),
    "packs, two groups, accumulated": (
        [LORA, "data.packing=true", "trainer.gradient_accumulation_steps=2"], 4, 2,
        ["parallel=ddp", "parallel.processes=4", "parallel.sequence=2"],
    ),
    "fsdp2, accumulated": (
        ["finetuning=full", "trainer.gradient_accumulation_steps=2"], 8, 8,
        ["parallel=fsdp2", "parallel.processes=2", "parallel.sequence=2"],
    ),
    "fsdp2, two groups": ([LORA], 8, 4, ["parallel=fsdp2", "parallel.processes=4", "parallel.sequence=2"]),
    "four ranks a row, checkpointing": (
        ["finetuning=full", "trainer.gradient_checkpointing=true"], 8, 8,
        ["parallel=ddp", "parallel.processes=4", "parallel.sequence=4"],
    ),
    "int4": ([LORA, "quant=int4"], 8, 8, TWO),
    "weights, two groups": (
        [LORA, "data.dataset=[belle_sample,alpaca_zh_sample]", "data.weights=[1,3]"], 8, 4,
        ["parallel=ddp", "parallel.processes=4", "parallel.sequence=2"],
    ),
    "label smoothing": ([LORA, "trainer.label_smoothing_factor=0.1"], 8, 8, TWO),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_several_ranks_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    words, rows_of_one, rows, shared = RUNS[name]
    size = "trainer.per_device_train_batch_size"
    finish(start(tmp_path, *WORDS, *words, f"{size}={rows_of_one}", "trainer.output_dir=one"))
    finish(start(tmp_path, *WORDS, *words, f"{size}={rows}", *shared, "trainer.output_dir=several"))
    same_run(tmp_path / "several", tmp_path / "one")


@pytest.mark.heavy
def test_text_in_blocks_is_shared(tmp_path: Path) -> None:
    words = [
        "model=tiny_glm", "tracker=none", "stage=pt", "data.dataset=text_sample", "stage.block_length=128", "data.dev_ratio=0.2", LORA,
        "trainer.per_device_train_batch_size=2", "trainer.learning_rate=1e-3", "trainer.max_steps=3", "trainer.logging_steps=1",
        "trainer.do_eval=true", "trainer.disable_tqdm=true", "trainer.use_cpu=true",
    ]  # fmt: skip
    finish(start(tmp_path, *words, "trainer.output_dir=one"))
    finish(start(tmp_path, *words, *TWO, "trainer.output_dir=two"))
    mine, theirs = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert len(mine) == 4
    for line, wanted in zip(mine, theirs, strict=True):
        assert line == pytest.approx(wanted, rel=1e-5, abs=WITHIN)


@pytest.mark.heavy
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    words = [*WORDS, "trainer.per_device_train_batch_size=8", *TWO]  # with dropout
    finish(start(tmp_path, *words, "trainer.output_dir=whole"))
    process = start(tmp_path, *words, "trainer.output_dir=cut")
    until = time.monotonic() + 600
    while not (tmp_path / "cut/checkpoints/checkpoint-3/complete.json").is_file():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    assert "rank 1 of 2 was killed by SIGKILL; the same command" in finish(process, 1)
    other = [word for word in words if word != "parallel.sequence=2"]
    assert "parallel.sequence" in finish(start(tmp_path, *other, "trainer.output_dir=cut"), 2)
    assert "resumed from checkpoint-" in finish(start(tmp_path, *words, "trainer.output_dir=cut"))
    for name in ("history.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.heavy
def test_what_depends_on_the_rows_around_it_is_refused_before_step_1(tmp_path: Path) -> None:
    """LLM.int8() finds its outliers among the tokens of a batch, so that its loss is another one for every part."""
    out = finish(start(tmp_path, *WORDS, LORA, *TWO, "quant=int8", "trainer.output_dir=two"), 2)
    assert "parallel.sequence=2: only rows without padding are shared" in out and "Traceback" not in out
    assert out.count("glmtuner: parallel.sequence=2") == 1
