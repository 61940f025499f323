"""Fast: LoRA on all linear layers at real sizes, beside plain transformers and PEFT on the same rows in the same call."""

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gpu_parts.models import free, random_model, transformers_config
from gpu_parts.record import Check
from gpu_parts.runs import FAST, LOGGED, Trained, Training, train

MFU = 0.45  # the goal; NVIDIA's figure for an 8B LoRA on one H100 is 40.6 % in the same convention
LIGER, COMPILED = "trainer.use_liger_kernel=true", "trainer.torch_compile=true"
KERNEL_KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitK"),
    "attention": ("flash", "fmha"),
}  # CUDA's names


def run(check: Check) -> None:
    plain_rates: dict[str, float | None] = {}
    for training in (*FAST, *(largest_packed_trainings(check) if check.device.type == "cuda" else ())):
        # plain transformers does not pack; packed rows are compared with full ones
        rows = f"{training.model}, {'mixed' if 'mixed' in training.name else 'full'} rows"
        if check.begins(training.name, 15.0):
            with check.item(training.name):
                if rows not in plain_rates:
                    plain_rates[rows] = measure_plain(check, next(other for other in FAST if other.name == rows))
                report(check, training, train(check, training), plain_rates[rows])
    for what, measure in (("profile", profile_step), ("compiled", measure_compiled)):
        name = f"{FAST[0].name}, {what}"
        if check.device.type == "cuda" and check.begins(name, 15.0):
            with check.item(name):
                measure(check, FAST[0])


def largest_packed_trainings(check: Check) -> list[Training]:
    """Packed rows with Liger's kernels, in the largest batches that fit into 80 GB, or into more."""
    has_more = torch.cuda.get_device_properties(check.device).total_memory > 100 * 2**30
    batches = {"ChatGLM3-6B": 5 if has_more else 3, "GLM-4-9B": 3 if has_more else 2}
    return [
        replace(
            training,
            name=f"{training.model}, packed, Liger, {batches[training.model]} rows",
            settings=(*training.settings, LIGER),
            batch=batches[training.model],
        )
        for training in FAST
        if "packed" in training.name
    ]


def measure_compiled(check: Check, training: Training) -> None:
    report(check, training, train(check, training, COMPILED), None, ", compiled")


def profile_step(check: Check, training: Training) -> None:
    """The GPU time of one step by kind of kernel; the log lists the kernels."""
    from torch.profiler import ProfilerActivity, profile

    from glmtuner.training.trainer import GlmTrainer

    original, count, profiles = GlmTrainer.training_step, itertools.count(), []

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        if next(count) != LOGGED + 1:
            return original(self, *args, **options)
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            loss = original(self, *args, **options)
            torch.cuda.synchronize()
        profiles.append(kernels.key_averages())
        return loss

    GlmTrainer.training_step = training_step
    try:
        train(check, training)
    finally:
        GlmTrainer.training_step = original
    print(profiles[0].table(sort_by="device_time_total", row_limit=60, max_name_column_width=110))
    times: dict[str, float] = {}
    for event in profiles[0]:
        kind = next(
            (kind for kind, names in KERNEL_KINDS.items() if any(name in event.key for name in names)),
            "everything else",
        )
        times[kind] = times.get(kind, 0.0) + event.self_device_time_total / 1e3
    total = sum(times.values())
    for kind, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
        check.add(
            f"{training.name}: a step's GPU time in {kind}", milliseconds, "ms", note=f"{milliseconds / total:.0%}"
        )


def report(check: Check, training: Training, trained: Trained, plain: float | None, suffix: str = "") -> None:
    name = f"{training.name}{suffix}"
    times = f"{trained.tokens_per_second / plain:.2f} times it" if plain else ""
    check.add(
        f"{name}: speed", trained.tokens_per_second, "tokens/s", beside=plain, against="plain transformers + PEFT",
        goal="faster", met=None if not plain or check.miniature else trained.tokens_per_second > plain, note=times,
    )  # fmt: skip
    if trained.mfu is not None:
        check.add(f"{name}: MFU", 100 * trained.mfu, "%", at_least=100 * MFU)
    check.add(
        f"{name}: peak memory", trained.peak_gib, "GiB",
        note=f"{trained.reserved_gib:.1f} GiB reserved; gradient checkpointing {'on' if trained.checkpointing else 'off'}; "
        f"{trained.seconds:.0f} s in all",
    )  # fmt: skip


def measure_plain(check: Check, training: Training) -> float | None:
    """Tokens a second of the plain loop, with gradient checkpointing only if it does not fit without."""
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

    training = training.miniature() if check.miniature else training
    base = random_model(transformers_config(training.model, check.miniature), check.device, attn_implementation="sdpa")
    # without a task type, "all-linear" would include the output head
    model: Any = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.config.use_cache = False
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = check.device.type == "cuda"
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = itertools.cycle(training.lengths())
    seconds, tokens = [], []
    for _ in range(training.steps):
        batch = padded(list(itertools.islice(rows, training.batch)), check.device)
        started = time.perf_counter()
        with torch.autocast(check.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
        tokens.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel())
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    del model, base, optimizer, trainable, loss
    free()
    timed = slice(LOGGED, None)
    return statistics.median(count / lap for count, lap in zip(tokens[timed], seconds[timed], strict=True)), peak


def padded(lengths: Sequence[tuple[int, int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Random rows of these lengths with labelled answers, padded on the right; no mask if nothing is padded."""
    longest = max(prompt_tokens + answer_tokens for prompt_tokens, answer_tokens in lengths)
    ids = torch.randint(10, 2000, (len(lengths), longest), device=device)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, (prompt_tokens, answer_tokens) in enumerate(lengths):
        labels[row, :prompt_tokens] = -100
        labels[row, prompt_tokens + answer_tokens :] = -100
        mask[row, prompt_tokens + answer_tokens :] = 0
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else {**batch, "attention_mask": mask}
