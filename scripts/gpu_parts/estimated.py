"""Estimated: the memory that `--check` estimates for each training above, beside the measured one; and when it checkpoints."""

from dataclasses import replace

import torch

from gpu_parts.record import Check, read
from gpu_parts.runs import FAST, HALF, LOGGED, LORA, MORE, TABLE, Training, estimated_gib, train

WITHIN = 0.10  # largest relative error
# rows of 512 tokens: each takes two to three percent of a GPU of 80 GB
RAISED = Training(
    name="raised batch", model="ChatGLM-6B", batch=1, source=256, target=256, steps=2 * LOGGED,
    settings=(*LORA, *HALF, "trainer.learning_rate=1e-3"),
)  # fmt: skip
TOO_MUCH = 1.15  # times the largest batch estimated to fit without checkpointing: a batch that does not fit

estimates: dict[str, float] = {}  # training's name -> GiB of tensors
largest_batch: list[int] = []  # the most rows that are estimated to fit without gradient checkpointing


def prepare(check: Check) -> None:
    """Estimate all trainings, which needs a CPU and no GPU."""
    by_settings: dict[tuple[object, ...], float] = {}
    for training in (*FAST, *TABLE, *MORE):
        with check.item(f"{training.name}, estimated"):
            # the estimate depends on the longest possible rows only, not on their lengths or on packing
            key = (
                training.model,
                training.batch,
                training.source,
                *(override for override in training.settings if "packing" not in override),
            )
            if key not in by_settings:
                by_settings[key] = estimated_gib(check, training)[0]
            estimates[training.name] = by_settings[key]
    if check.device.type == "cuda":
        largest_batch.append(largest_fitting_batch(check))


def largest_fitting_batch(check: Check) -> int:
    """The largest batch of RAISED that is estimated to fit without gradient checkpointing; memory is linear in the rows."""
    from glmtuner.memory.estimate import CUDA_CONTEXT, FRAGMENTATION
    from glmtuner.memory.policy import device_memory

    few, more = (estimated_gib(check, replace(RAISED, batch=batch))[0] for batch in (4, 12))
    gib_per_row = (1 + FRAGMENTATION) * (more - few) / 8
    available = (device_memory(check.device) - CUDA_CONTEXT) / 2**30
    rows = max(int(4 + (available - few) / gib_per_row), 1)
    while estimated_gib(check, replace(RAISED, batch=rows))[1]:
        rows -= 1
    while not estimated_gib(check, replace(RAISED, batch=rows + 1))[1]:
        rows += 1
    return rows


def run(check: Check) -> None:
    peaks = measured_peaks(check)
    for name, gib in estimates.items():
        if name not in peaks:
            check.add(name, None, note=f"{gib:.1f} GiB; not measured")
            continue
        error = gib / peaks[name] - 1
        # rows of mixed lengths: perhaps no batch was as long as the longest possible one
        goal, met = ("no less", error >= -WITHIN) if "mixed" in name else (f"within {WITHIN:.0%}", abs(error) <= WITHIN)
        met = None if check.miniature else met  # tests/e2e/test_memory.py checks the memory of a process on a CPU
        check.add(name, gib, "GiB", beside=peaks[name], against="measured", goal=goal, met=met, note=f"{error:+.1%}")
    with check.item("gradient checkpointing where it is needed"):
        if check.device.type == "cuda":
            check_raised_batch(check)
        else:
            checkpointed = train(check, replace(RAISED, batch=2)).checkpointing
            check.add("gradient checkpointing, 2 rows", float(checkpointed), at_most=0.0)


def measured_peaks(check: Check) -> dict[str, float]:
    """Training's name -> peak GiB of tensors, from the findings of earlier parts."""
    fast_peaks = {
        finding.what.removesuffix(": peak memory"): finding.value
        for finding in read(check.path.with_name("fast.jsonl"))
        if finding.what.endswith(": peak memory") and finding.value is not None
    }
    table_peaks = {
        finding.what: finding.value * 1e9 / 2**30
        for finding in read(check.path.with_name("small.jsonl"))
        if finding.value is not None
    }
    return fast_peaks | table_peaks


def check_raised_batch(check: Check) -> None:
    """The largest batch that is estimated to fit runs, one row more runs with checkpointing, and a larger one fails without."""
    fitting = largest_batch[0]
    for batch, checkpoints in ((fitting, False), (fitting + 1, True)):
        what = f"{batch} rows: gradient checkpointing {'on' if checkpoints else 'off'}"
        if check.begins(what, 15.0):
            with check.item(what):
                trained = train(check, replace(RAISED, batch=batch))
                check.add(
                    what, trained.peak_gib, "GiB", goal=f"runs, {'on' if checkpoints else 'off'}", met=trained.checkpointing is checkpoints,
                    note=f"{trained.reserved_gib:.1f} GiB reserved",
                )  # fmt: skip
    batch = int(fitting * TOO_MUCH) + 1
    what = f"{batch} rows without gradient checkpointing"
    if check.begins(what, 15.0):
        try:
            trained = train(check, replace(RAISED, batch=batch), "trainer.gradient_checkpointing=false")
            check.add(what, trained.peak_gib, "GiB", goal="does not fit", met=False)
        except torch.OutOfMemoryError:
            check.add(what, None, goal="does not fit", met=True, note="out of memory")
