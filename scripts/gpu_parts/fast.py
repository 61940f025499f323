"""Fast: LoRA on all linear layers at real sizes, beside plain transformers and PEFT on the same rows in the same call."""

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gpu_parts.models import drawn_model, free, transformers_config
from gpu_parts.record import Check
from gpu_parts.runs import FAST, LOGGED, Trained, Training, train

MFU = 0.45  # the goal; NVIDIA's own figure for an 8B LoRA on one H100 is 40.6 % in the same convention
LIGER, COMPILED = "trainer.use_liger_kernel=true", "trainer.torch_compile=true"
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitK"),
    "attention": ("flash", "fmha"),
}  # CUDA's names


def run(check: Check) -> None:
    plain: dict[str, float | None] = {}
    for training in (*FAST, *(best(check) if check.device.type == "cuda" else ())):
        # packed rows have no counterpart in plain transformers but rows that are full from the start
        rows = f"{training.model}, {'mixed' if 'mixed' in training.name else 'full'} rows"
        if check.begins(training.name, 15.0):
            with check.item(training.name):
                if rows not in plain:
                    plain[rows] = beside(check, next(it for it in FAST if it.name == rows))
                told(check, training, train(check, training), plain[rows])
    for what, measure in (("profile", profiled), ("compiled", compiled)):
        name = f"{FAST[0].name}, {what}"
        if check.device.type == "cuda" and check.begins(name, 15.0):
            with check.item(name):
                measure(check, FAST[0])


def best(check: Check) -> list[Training]:
    """Packed rows with Liger's kernels, and as many of them as fit into 80 GB or into more."""
    more = torch.cuda.get_device_properties(check.device).total_memory > 100 * 2**30
    batches = {"ChatGLM3-6B": 5 if more else 3, "GLM-4-9B": 3 if more else 2}
    return [
        replace(
            it,
            name=f"{it.model}, packed, Liger, {batches[it.model]} rows",
            words=(*it.words, LIGER),
            batch=batches[it.model],
        )
        for it in FAST
        if "packed" in it.name
    ]


def compiled(check: Check, training: Training) -> None:
    told(check, training, train(check, training, COMPILED), None, ", compiled")


def profiled(check: Check, training: Training) -> None:
    """What the GPU does in one step; the log has the kernels."""
    from torch.profiler import ProfilerActivity, profile

    from glmtuner.training.trainer import GlmTrainer

    plain, count, seen = GlmTrainer.training_step, itertools.count(), []

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        if next(count) != LOGGED + 1:
            return plain(self, *args, **options)
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            found = plain(self, *args, **options)
            torch.cuda.synchronize()
        seen.append(kernels.key_averages())
        return found

    GlmTrainer.training_step = training_step
    try:
        train(check, training)
    finally:
        GlmTrainer.training_step = plain
    print(seen[0].table(sort_by="device_time_total", row_limit=60, max_name_column_width=110))
    times: dict[str, float] = {}
    for event in seen[0]:
        kind = next(
            (kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "everything else"
        )
        times[kind] = times.get(kind, 0.0) + event.self_device_time_total / 1e3
    total = sum(times.values())
    for kind, spent in sorted(times.items(), key=lambda it: -it[1]):
        check.add(f"{training.name}: a step's GPU time in {kind}", spent, "ms", note=f"{spent / total:.0%}")


def told(check: Check, training: Training, found: Trained, plain: float | None, suffix: str = "") -> None:
    name = f"{training.name}{suffix}"
    times = f"{found.tokens_per_second / plain:.2f} times it" if plain else ""
    check.add(
        f"{name}: speed", found.tokens_per_second, "tokens/s", beside=plain, against="plain transformers + PEFT",
        goal="faster", met=None if not plain or check.miniature else found.tokens_per_second > plain, note=times,
    )  # fmt: skip
    if found.mfu is not None:
        check.add(f"{name}: MFU", 100 * found.mfu, "%", at_least=100 * MFU)
    check.add(
        f"{name}: peak memory", found.peak_gib, "GiB",
        note=f"{found.reserved_gib:.1f} GiB reserved; gradient checkpointing {'on' if found.checkpointing else 'off'}; "
        f"{found.seconds:.0f} s in all",
    )  # fmt: skip


def beside(check: Check, training: Training) -> float | None:
    """Tokens a second of the plain loop, with gradient checkpointing where it does not fit without."""
    for checkpointing in (False, True):
        try:
            rate, peak = plain_loop(check, training, checkpointing)
        except torch.OutOfMemoryError:
            gc.collect()
            free()
            continue
        check.add(
            f"{training.name}: plain transformers + PEFT", rate, "tokens/s",
            note=f"{peak:.1f} GiB; gradient checkpointing {'on' if checkpointing else 'off'}",
        )  # fmt: skip
        return rate
    check.add(f"{training.name}: plain transformers + PEFT", None, note="out of memory")
    return None


def plain_loop(check: Check, training: Training, checkpointing: bool) -> tuple[float, float]:
    """Non-padding tokens a second and peak GiB of a loop over padded batches: transformers' model, PEFT, sdpa, AdamW."""
    from peft import LoraConfig, get_peft_model

    training = training.small() if check.miniature else training
    base = drawn_model(transformers_config(training.model, check.miniature), check.device, attn_implementation="sdpa")
    # the head would be among "all-linear" where nothing says that it is one
    model: Any = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.config.use_cache = False
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = check.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = itertools.cycle(training.lengths())
    laps, tokens = [], []
    for _ in range(training.steps):
        batch = padded(list(itertools.islice(rows, training.batch)), check.device)
        started = time.perf_counter()
        with torch.autocast(check.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        laps.append(time.perf_counter() - started)
        tokens.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel())
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    del model, base, optimizer, trained, loss
    free()
    timed = slice(LOGGED, None)
    return statistics.median(count / lap for count, lap in zip(tokens[timed], laps[timed], strict=True)), peak


def padded(lengths: Sequence[tuple[int, int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Random rows of these lengths, their answers learned, padded on the right; without padding there is no mask."""
    longest = max(asked + answered for asked, answered in lengths)
    ids = torch.randint(10, 2000, (len(lengths), longest), device=device)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, (asked, answered) in enumerate(lengths):
        labels[row, :asked] = -100
        labels[row, asked + answered :] = -100
        mask[row, asked + answered :] = 0
    found = {"input_ids": ids, "labels": labels}
    return found if bool(mask.all()) else {**found, "attention_mask": mask}
