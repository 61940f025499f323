"""Small: the rows of ChatGLM-Efficient-Tuning's memory table at ChatGLM-6B's full size; the loss of each must fall."""

from gpu_parts.record import Check
from gpu_parts.runs import MORE, PUBLISHED, TABLE, train

INT4_GB = 8.0  # the goal for LoRA on int4 weights with batches of 4


def run(check: Check) -> None:
    for training in (*TABLE, *MORE):
        with check.item(training.name):
            if not check.begins(training.name, 8.0):
                continue
            trained = train(check, training)
            batch = training.miniature().batch if check.miniature else training.batch
            peak_gb = trained.peak_gib * 2**30 / 1e9
            first, last = trained.losses[0], trained.losses[-1]
            bound = INT4_GB if training.name == "LoRA int4, batch 4" and not check.miniature else None
            check.add(
                training.name, peak_gb, "GB", beside=PUBLISHED.get(training.name),
                against="published, on a V100" if training.name in PUBLISHED else "",
                goal="the loss falls" + (f", at most {bound:g} GB" if bound else ""),
                met=last < first and (bound is None or peak_gb <= bound),
                note=f"loss {first:.3f} to {last:.3f} in {training.steps} steps; {batch / trained.step_seconds:.1f} samples/s; "
                f"{trained.reserved_gib * 2**30 / 1e9:.1f} GB reserved; {trained.seconds:.0f} s in all",
            )  # fmt: skip
