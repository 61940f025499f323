"""Sweep: eight LoRA jobs on one base in lock step, against the same jobs one after another on a base that stays loaded."""

import json
import time

import torch

from gpu_parts.models import free, random_models
from gpu_parts.record import Check
from gpu_parts.runs import FAST_OVERRIDES, Training, command

SWEPT = ("finetuning.lora_rank=4,8", "trainer.learning_rate=1e-3,5e-4", "trainer.seed=1,2")
JOBS = 8
GOALS = {"": 2.0, "int4": 3.0}
CLOSE = 0.02  # of losses in bfloat16, whose rows are rounded otherwise


def run(check: Check) -> None:
    for quant, goal in GOALS.items():
        what = f"{JOBS} LoRA jobs on GLM-4-9B{f' in {quant}' if quant else ''}, batch 2"
        if check.begins(what, 40.0):
            with check.item(what):
                measure(check, what, quant, goal)


def measure(check: Check, what: str, quant: str, goal: float) -> None:
    settings = tuple(
        word for word in FAST_OVERRIDES if not word.startswith(("finetuning.lora_rank", "trainer.learning"))
    )
    training = Training(
        name=what, model="GLM-4-9B", settings=(*settings, *([f"quant={quant}"] if quant else [])), batch=2, source=96,
        target=96, rows="mixed", steps=10,
    )  # fmt: skip
    together, losses = sweep(check, training, "shared")
    apart, expected = sweep(check, training, "basic")
    furthest = max(abs(one - other) / other for one, other in zip(losses, expected, strict=True))
    check.add(
        what, together, "s", beside=apart, against="one after another", goal=f"the same losses{'' if check.miniature else f', {goal:g} times faster'}",
        met=furthest <= CLOSE and (check.miniature or together * goal <= apart),
        note=f"{apart / together:.2f} times; losses differ by {furthest:.2%} at most",
    )  # fmt: skip


def sweep(check: Check, training: Training, launcher: str) -> tuple[float, list[float]]:
    """The seconds of the sweep by a launcher, from its command to its report, and the last loss of each job."""
    training = training.miniature() if check.miniature else training
    folder = check.folder / "sweeps" / f"{time.time_ns()}"
    free()
    if check.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with random_models(check.device):
        command(["-m", *training.overrides(check), *SWEPT, f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}"])
    seconds = time.perf_counter() - started
    free()
    histories = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*/history.jsonl"))]
    if len(histories) != JOBS:
        raise RuntimeError(f"{len(histories)} of {JOBS} jobs have a history in {folder}")
    return seconds, [[line["loss"] for line in map(json.loads, lines) if "loss" in line][-1] for lines in histories]
