"""The measured trainings, and how one is run by glmtuner's command line in this process."""

import json
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch

from gpu_parts.models import free, model_overrides, random_models, write_records
from gpu_parts.record import Check

LOGGED = 2  # steps between logged lines; those before the first line are not timed
LORA = ("finetuning=lora", "finetuning.lora_rank=8", "finetuning.lora_dropout=0")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: `batch` rows of at most `source` + `target` tokens a step.

    `rows` selects their lengths: full, mixed (an eighth of that to all of it), or short (a tenth on average, packed).
    """

    name: str
    model: str
    settings: tuple[str, ...]  # overrides
    batch: int
    source: int
    target: int
    rows: str = "full"
    steps: int = 3 * LOGGED
    ranked: bool = False

    def miniature(self) -> "Training":
        """The training in miniature."""
        return replace(self, batch=min(self.batch, 2), source=24, target=24, steps=2 * LOGGED)

    def lengths(self) -> list[tuple[int, int]]:
        """The records' tokens of question and answer, without those that the template adds."""
        draw, count = Random(0), self.steps * self.batch
        if self.rows == "full":
            return [(self.source, self.target)] * self.batch  # the same batch every step, so that its loss falls
        if self.rows == "mixed":
            shares = [draw.uniform(0.125, 1.0) for _ in range(count)]
        else:
            shares = [draw.uniform(0.02, 0.18) for _ in range(count * 10)]
        return [(max(int(share * self.source), 1), max(int(share * self.target), 1)) for share in shares]

    def overrides(self, check: Check) -> list[str]:
        """The overrides on the command line; writes the records and the model's folder."""
        data = check.folder / "data" / re.sub(r"\W+", "_", self.name) / "records.json"
        write_records(data, self.lengths(), ranked=self.ranked)
        info = {"records": {"file_name": data.name, "ranking": self.ranked}}
        (data.parent / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        on_cpu = ["trainer.fp16=false", "trainer.use_cpu=true"] if check.miniature else []  # a CPU has no scaler
        return [
            *model_overrides(self.model, check.folder / "models", check.miniature), *self.settings, *on_cpu, "data.dataset=[records]",
            f"data.dataset_dir={data.parent}", f"data.max_source_length={self.source}",
            f"data.max_target_length={self.target}", f"trainer.per_device_train_batch_size={self.batch}",
            f"trainer.max_steps={self.steps}", f"trainer.logging_steps={LOGGED}", "trainer.save_strategy=no", "metric=none",
            "tracker=none", "trainer.disable_tqdm=true", "trainer.lr_scheduler_type=constant",
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The results of a training; times are medians over the lines after the first, losses are means of LOGGED steps."""

    losses: list[float]
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_gib: float  # of tensors
    reserved_gib: float  # by torch's allocator
    checkpointing: bool
    seconds: float


class Failed(Exception):
    """The command line ended with a nonzero exit code."""


def command(overrides: list[str]) -> None:
    """`python -m glmtuner` in this process; raises Failed."""
    from glmtuner.cli.main import main

    if status := main(overrides):
        raise Failed(f"exit code {status}: {' '.join(overrides)}")


@contextmanager
def captured_logs() -> Iterator[list[dict[str, float]]]:
    """Capture the lines that a tracker would get, each with the time of the clock."""
    from glmtuner.trackers.none import NoTracker

    lines: list[dict[str, float]] = []

    def log(self: Any, line: dict[str, float]) -> None:
        lines.append({**line, "clock": time.perf_counter()})

    NoTracker.log = log
    try:
        yield lines
    finally:
        del NoTracker.log


@contextmanager
def captured_checkpointing() -> Iterator[list[bool]]:
    """Capture for each new trainer whether it checkpoints gradients."""
    from glmtuner.training.trainer import GlmTrainer

    original, checkpointing = GlmTrainer.__init__, []

    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        checkpointing.append(bool(self.args.activation_checkpointing))

    GlmTrainer.__init__ = init
    try:
        yield checkpointing
    finally:
        GlmTrainer.__init__ = original


def train(check: Check, training: Training, *more: str) -> Trained:
    """Run the training and free the model."""
    training = training.miniature() if check.miniature else training
    folder = check.folder / "runs" / f"{time.time_ns()}"
    overrides = [*training.overrides(check), f"trainer.output_dir={folder}", *more]
    started = time.perf_counter()
    on_gpu = check.device.type == "cuda"
    free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with random_models(check.device), captured_logs() as lines, captured_checkpointing() as checkpointing:
            command(overrides)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0
    finally:
        free()
    steps = [line for line in lines if "loss" in line]
    timed = steps[1:]
    laps = [(later["clock"] - earlier["clock"]) / LOGGED for earlier, later in pairwise(steps)]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shares = [line["mfu"] for line in timed if "mfu" in line]
    return Trained(
        losses=[line["loss"] for line in steps],
        step_seconds=statistics.median(laps),
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in timed if "tokens_per_second" in line),
        mfu=statistics.median(shares) if shares else None,
        peak_gib=metrics["peak_memory_gib"],
        reserved_gib=reserved,
        checkpointing=checkpointing[-1],
        seconds=time.perf_counter() - started,
    )


def estimated_gib(check: Check, training: Training, *more: str) -> tuple[float, bool]:
    """The estimated GiB of tensors, and whether gradients would be checkpointed."""
    from glmtuner.config.compose import compose
    from glmtuner.launch.device import device_of
    from glmtuner.launch.memory_check import estimate_run
    from glmtuner.launch.register import register_presets
    from glmtuner.memory.policy import device_memory

    training = training.miniature() if check.miniature else training
    register_presets()
    composed = compose([*training.overrides(check), *more])
    device = device_of(composed.run)
    needed, _ = estimate_run(composed, device, device_memory(device))
    overhead = sum(needed.parts.get(name, 0) for name in ("CUDA context", "allocator"))
    return (needed.peak - overhead) / 2**30, needed.checkpointing


# -- what is trained -----------------------------------------------------------------------------------------------------

FAST_OVERRIDES = (*LORA, "finetuning.lora_target=[all]", "trainer.learning_rate=1e-4")


def fast(model: str, batch: int) -> list[Training]:
    """A model's trainings of the part `fast`: rows of 4,096 tokens, rows of mixed lengths, and packed ones."""
    size = {"model": model, "source": 2048, "target": 2048}
    return [
        Training(name=f"{model}, full rows", settings=FAST_OVERRIDES, batch=batch, **size),
        Training(name=f"{model}, mixed rows", settings=FAST_OVERRIDES, batch=batch, rows="mixed", **size),
        Training(
            name=f"{model}, packed", settings=(*FAST_OVERRIDES, "data.packing=true"), batch=batch, rows="short", **size
        ),
    ]


FAST = [*fast("ChatGLM3-6B", 2), *fast("GLM-4-9B", 1)]

HALF = ("trainer.fp16=true",)
QUANTIZED = ("trainer.learning_rate=1e-3",)
P_TUNING = ("finetuning=p_tuning", "finetuning.pre_seq_len=16", "trainer.learning_rate=1e-2")
FREEZE = ("finetuning=freeze", "finetuning.num_layer_trainable=3", "trainer.learning_rate=1e-4")
RM = ("stage=rm", *LORA, "trainer.learning_rate=1e-3")
CHECKPOINTS = "trainer.gradient_checkpointing=true"  # as ChatGLM-Efficient-Tuning always does
# GB of a V100, from ChatGLM-Efficient-Tuning's table
PUBLISHED: dict[str, float] = {}


def table_training(name: str, published: float, batch: int, *settings: str, ranked: bool = False) -> Training:
    PUBLISHED[name] = published
    return Training(
        name=name,
        model="ChatGLM-6B",
        settings=(*settings, CHECKPOINTS),
        batch=batch,
        source=256,
        target=256,
        ranked=ranked,
    )


TABLE = [
    table_training("LoRA fp16, batch 16", 28, 16, *LORA, *HALF, "trainer.learning_rate=1e-3"),
    table_training("LoRA fp16, batch 8", 24, 8, *LORA, *HALF, "trainer.learning_rate=1e-3"),
    table_training("LoRA fp16, batch 4", 20, 4, *LORA, *HALF, "trainer.learning_rate=1e-3"),
    table_training("LoRA int8, batch 4", 10, 4, *LORA, *HALF, *QUANTIZED, "quant=int8"),
    table_training("LoRA int4, batch 4", 8, 4, *LORA, *HALF, *QUANTIZED, "quant=int4"),
    table_training("P-Tuning fp16, batch 4", 20, 4, *P_TUNING),
    table_training("P-Tuning int8, batch 4", 16, 4, *P_TUNING, "quant=int8"),
    table_training("P-Tuning int4, batch 4", 12, 4, *P_TUNING, "quant=int4"),
    table_training("Freeze fp16, batch 4", 24, 4, *FREEZE),
    table_training("reward model LoRA fp16, batch 4", 22, 4, *RM, *HALF, ranked=True),
    table_training("reward model LoRA int8, batch 1", 11, 1, *RM, *HALF, "quant=int8", ranked=True),
]
# besides the table: int4 without double quantization, and int4 without gradient checkpointing
MORE = [
    Training(
        name=f"LoRA int4, batch 4, {what}", model="ChatGLM-6B", batch=4, source=256, target=256,
        settings=(*LORA, *HALF, *QUANTIZED, "quant=int4", word),
    )
    for what, word in (
        ("no gradient checkpointing", "trainer.gradient_checkpointing=false"),
        ("constants not quantized, no gradient checkpointing", "quant.double_quantization=false"),
    )
]  # fmt: skip
