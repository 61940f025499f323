"""Estimated: what `--check` says before each of the trainings above, beside what they then took; and where it checkpoints."""

from dataclasses import replace

import torch

from gpu_parts.record import Check, read
from gpu_parts.runs import FAST, HALF, LOGGED, LORA, MORE, TABLE, Training, estimated_gib, train

WITHIN = 0.10  # of what was measured
# rows of 512 tokens: each more is two to three percent of a GPU of 80 GB
RAISED = Training(
    name="raised batch", model="ChatGLM-6B", batch=1, source=256, target=256, steps=2 * LOGGED,
    words=(*LORA, *HALF, "trainer.learning_rate=1e-3"),
)  # fmt: skip
TOO_MUCH = 1.15  # times the largest batch that is said to fit without checkpointing: this one does not

told: dict[str, float] = {}  # by the training's name: GiB of tensors
largest: list[int] = []  # the most rows that are said to fit without gradient checkpointing


def prepare(check: Check) -> None:
    """The estimates: they take a processor and no GPU."""
    same: dict[tuple[object, ...], float] = {}
    for training in (*FAST, *TABLE, *MORE):
        with check.item(f"{training.name}, estimated"):
            # rows of other lengths, packed or not, are estimated as the longest that there could be
            key = (
                training.model,
                training.batch,
                training.source,
                *(it for it in training.words if "packing" not in it),
            )
            if key not in same:
                same[key] = estimated_gib(check, training)[0]
            told[training.name] = same[key]
    if check.device.type == "cuda":
        largest.append(most_rows(check))


def most_rows(check: Check) -> int:
    """The largest batch of RAISED for which gradients are not to be checkpointed; memory grows evenly with the rows."""
    from glmtuner.memory.estimate import CUDA_CONTEXT, HOLES
    from glmtuner.memory.policy import device_memory

    few, more = (estimated_gib(check, replace(RAISED, batch=batch))[0] for batch in (4, 12))
    a_row = (1 + HOLES) * (more - few) / 8
    room = (device_memory(check.device) - CUDA_CONTEXT) / 2**30
    low = max(int(4 + (room - few) / a_row), 1)
    while estimated_gib(check, replace(RAISED, batch=low))[1]:
        low -= 1
    while not estimated_gib(check, replace(RAISED, batch=low + 1))[1]:
        low += 1
    return low


def run(check: Check) -> None:
    peaks = measured(check)
    for name, gib in told.items():
        if name not in peaks:
            check.add(name, None, note=f"{gib:.1f} GiB; not measured")
            continue
        off = gib / peaks[name] - 1
        # of rows of mixed lengths no batch may have been as long as the longest that there could be
        goal, met = ("no less", off >= -WITHIN) if "mixed" in name else (f"within {WITHIN:.0%}", abs(off) <= WITHIN)
        met = None if check.miniature else met  # what a process takes on a CPU is held by tests/e2e/test_memory.py
        check.add(name, gib, "GiB", beside=peaks[name], against="measured", goal=goal, met=met, note=f"{off:+.1%}")
    with check.item("gradient checkpointing where it is needed"):
        if check.device.type == "cuda":
            raised(check)
        else:
            checkpointed = train(check, replace(RAISED, batch=2)).checkpointing
            check.add("gradient checkpointing, 2 rows", float(checkpointed), at_most=0.0)


def measured(check: Check) -> dict[str, float]:
    """GiB of tensors at the peak, by the training's name, from what the parts before this one found."""
    found = {
        it.what.removesuffix(": peak memory"): it.value
        for it in read(check.path.with_name("fast.jsonl"))
        if it.what.endswith(": peak memory") and it.value is not None
    }
    of_table = {
        it.what: it.value * 1e9 / 2**30 for it in read(check.path.with_name("small.jsonl")) if it.value is not None
    }
    return found | of_table


def raised(check: Check) -> None:
    """The largest batch that is said to fit runs, and so does one row more, with checkpointing; a larger one fits not without."""
    low = largest[0]
    for batch, wanted in ((low, False), (low + 1, True)):
        what = f"{batch} rows: gradient checkpointing {'on' if wanted else 'off'}"
        if check.begins(what, 15.0):
            with check.item(what):
                found = train(check, replace(RAISED, batch=batch))
                check.add(
                    what, found.peak_gib, "GiB", goal=f"runs, {'on' if wanted else 'off'}", met=found.checkpointing is wanted,
                    note=f"{found.reserved_gib:.1f} GiB reserved",
                )  # fmt: skip
    batch = int(low * TOO_MUCH) + 1
    what = f"{batch} rows without gradient checkpointing"
    if check.begins(what, 15.0):
        try:
            found = train(check, replace(RAISED, batch=batch), "trainer.gradient_checkpointing=false")
            check.add(what, found.peak_gib, "GiB", goal="does not fit", met=False)
        except torch.OutOfMemoryError:
            check.add(what, None, goal="does not fit", met=True, note="out of memory")
