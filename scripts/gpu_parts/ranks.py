"""Ranks: two processes learn, answer and save what one does; on a GPU of its own each, or both on the CPU in the rehearsal."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from glmtuner.distributed.ranks import free_port
from gpu_parts.record import Check
from gpu_parts.runs import command

RANKS = 2
ROUNDING = 1e-4  # of sums in another order, in float32
COMMON = (
    "model=tiny_glm", "tracker=none", "metric=none", "trainer.disable_tqdm=true", "trainer.logging_steps=1", "trainer.max_steps=4",
    "trainer.learning_rate=1e-3", "trainer.lr_scheduler_type=constant", "data.dataset=belle_sample", "data.max_samples=16",
    "data.max_source_length=48", "data.max_target_length=32", "trainer.eval_strategy=no", "trainer.save_strategy=no",
)  # fmt: skip
LORA = ("finetuning=lora", "finetuning.lora_dropout=0")
PREFERENCES = ("data.dataset=preference_sample",)
SHARES_OF_BATCH = (
    "trainer.per_device_train_batch_size=4",
    "trainer.per_device_train_batch_size=2",
)  # of one process, of each of two


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A run by one process and by several, which learn the same rows."""

    name: str
    words: tuple[str, ...]
    parallel: tuple[str, ...]
    batch: tuple[str, str] = SHARES_OF_BATCH
    answers: bool = False

    def one(self, check: Check) -> list[str]:
        return [*COMMON, *self.words, self.batch[0], *self.places(check, "one")]

    def several(self, check: Check) -> list[str]:
        return [*COMMON, *self.words, *self.parallel, self.batch[1], *self.places(check, "several")]

    def places(self, check: Check, which: str) -> list[str]:
        on_cpu = ["trainer.use_cpu=true"] if check.miniature else []
        return [*on_cpu, f"trainer.output_dir={self.folder(check, which)}"]

    def folder(self, check: Check, which: str) -> Path:
        return check.folder / self.name.replace(" ", "_").replace(",", "") / which


ANSWERS = (
    "trainer.do_predict=true",
    "trainer.predict_with_generate=true",
    "data.dev_ratio=0.25",
    "generation.do_sample=false",
)
PAIRS = (
    Pair(name="LoRA by ddp", words=LORA, parallel=("parallel=ddp",)),
    Pair(name="LoRA by fsdp2, loaded in shares, with answers", words=(*LORA, *ANSWERS), parallel=("parallel=fsdp2",), answers=True),
    Pair(name="all weights by fsdp2", words=("finetuning=full",), parallel=("parallel=fsdp2",)),
    Pair(name="LoRA on int4 by fsdp2", words=(*LORA, "quant=int4"), parallel=("parallel=fsdp2",)),
    Pair(name="DPO by fsdp2", words=(*LORA, *PREFERENCES, "stage=dpo"), parallel=("parallel=fsdp2",)),
    Pair(
        name="rows in two parts", words=LORA, parallel=("parallel=ddp", f"parallel.sequence={RANKS}"),
        batch=(SHARES_OF_BATCH[1], SHARES_OF_BATCH[1]),
    ),
)  # fmt: skip


def run(check: Check) -> None:
    chosen = [pair for pair in PAIRS if check.begins(pair.name)]
    if not check.miniature and torch.cuda.device_count() < RANKS:
        for pair in chosen:
            check.add(pair.name, None, note=f"left out: needs {RANKS} GPUs")
        return
    ranks = start_ranks(check, [pair.several(check) for pair in chosen])
    try:
        for pair in chosen:
            with check.item(f"{pair.name}, one process"):
                command(pair.one(check))
        codes = [process.wait(max(check.seconds_left, 1.0)) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for pair in chosen:
        with check.item(pair.name):
            compare(check, pair, codes)


def start_ranks(check: Check, commands: list[list[str]]) -> list["subprocess.Popen[bytes]"]:
    """Start two processes that run the commands one after the other, each as a run of two ranks."""
    listed = check.folder / "commands.json"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps(commands), encoding="utf-8")
    places = [
        str(Path(sys.modules[name].__file__ or "").parent.parent) for name in ("glmtuner", __name__.partition(".")[0])
    ]
    shared = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]), "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "gpu_parts.rank", str(listed)], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=sys.stderr
        )
        for rank in range(RANKS)
    ]  # fmt: skip


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(check: Check, pair: Pair, codes: list[int]) -> None:
    """Compare the losses of every step, and the answers where the run has some."""
    one, several = pair.folder(check, "one"), pair.folder(check, "several")
    if not (several / "history.jsonl").is_file():
        raise RuntimeError(f"the ranks ended with {codes} and left no history")
    expected, found = (
        [line["loss"] for line in lines(folder / "history.jsonl") if "loss" in line] for folder in (one, several)
    )
    furthest = max(abs(loss - wanted) / abs(wanted) for loss, wanted in zip(found, expected, strict=True))
    note = f"{len(found)} steps, loss {expected[0]:.3f} to {expected[-1]:.3f}"
    same = True
    if pair.answers:
        answers, wanted = ((folder / "predictions.jsonl").read_text(encoding="utf-8") for folder in (several, one))
        same = answers == wanted
        note += f"; {len(wanted.splitlines())} answers {'are the same' if same else 'DIFFER'}"
    check.add(
        pair.name, furthest, "largest difference / loss", goal=f"at most {ROUNDING:g}{', the same answers' if pair.answers else ''}",
        met=furthest <= ROUNDING and same, against="one process", note=note,
    )  # fmt: skip
