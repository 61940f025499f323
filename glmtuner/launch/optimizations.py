"""Optimizations that keep the loss: which a run allows, and their application to its model and batches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.inference.context import RunContext

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """The batches of training: rows, collator, sampling strategy, and whether the loss is computed in chunks."""

    rows: Any
    collator: Callable[[Any], dict[str, Any]]
    sampling: str
    chunks_loss: bool = False


def needs_compiler(run: Run) -> bool:
    """Whether the run needs torch's compiler: for its blocks, or for bitsandbytes' kernels on a CPU."""
    return run.quant.bits is not None or run.trainer.torch_compile


def allowed_optimizations(run: Run) -> dict[str, bool]:
    """The optimizations that the configuration allows, as keyword arguments of `choose_optimizations` and `estimate`."""
    plain = run.stage.models_loss
    return {
        "without_padding": plain and run.data.padding_free and run.data.ignore_pad_token_for_loss,
        "on_weights": plain and run.parallel.whole_modules,
    }


def autocast_of(arguments: "TrainingArguments", device: "torch.device") -> Callable[[], AbstractContextManager[Any]]:
    """The autocast context that the Trainer runs the model in; none with DeepSpeed, which casts by itself."""
    import torch

    if arguments.deepspeed or not (arguments.bf16 or arguments.fp16):
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16 if arguments.bf16 else torch.float16)


def apply_optimizations(
    context: RunContext,
    arguments: "TrainingArguments",
    collator: Callable[[Any], dict[str, Any]],
    blocks: "list[nn.Module]",
    device: "torch.device",
) -> TrainingBatches:
    """Prepare the model for the optimizations that keep its loss, and return the batches to train on.

    These are batches without padding, packing, a loss in chunks, fused LoRA, Liger's kernels and compiled blocks. Before
    step 1, optimizations are checked on a few samples; one that changes the loss is disabled, with a line that says why.
    """
    from glmtuner.data.segments import Packs
    from glmtuner.kernels.choose import apply_liger, choose_optimizations, short_samples

    run, model, data = context.run, context.model, context.data
    rows = data.train if data.train is not None else data.evaluation
    autocast = autocast_of(arguments, device)
    plain = TrainingBatches(rows=data.train, collator=collator, sampling=arguments.train_sampling_strategy)
    samples = short_samples(rows) if rows is not None and run.stage.models_loss else []
    kernels = (run.trainer.liger_kernel_config or {}) if run.trainer.use_liger_kernel else {}
    if run.trainer.use_liger_kernel:
        apply_liger(model, kernels, samples, collator, autocast)
    if run.trainer.torch_compile:
        options = {"backend": run.trainer.torch_compile_backend, "mode": run.trainer.torch_compile_mode}
        for block in blocks:
            block.compile(dynamic=True, **{name: value for name, value in options.items() if value})
    if not samples:
        return plain
    own_loss = not kernels.get("fused_linear_cross_entropy")  # otherwise Liger's kernel computes the loss
    chosen = choose_optimizations(
        model, samples, collator, autocast=autocast, own_loss=own_loss, **allowed_optimizations(run)
    )
    for reason in chosen.refused:
        say(f"computed the plain way, {reason}")
    batches = replace(plain, collator=chosen.collate, chunks_loss=chosen.chunks_loss)
    if not run.data.packing or data.train is None:
        return batches
    if chosen.collate is collator:
        say(
            "data.packing=true: this model's attention cannot keep the samples of one row apart; batches of similar length "
            "(trainer.train_sampling_strategy=group_by_length) are used instead"
        )
        return replace(batches, sampling="group_by_length")
    packs = Packs(data.train, run.data.max_source_length + run.data.max_target_length)
    # packed rows have nearly equal lengths
    sampling = "random" if batches.sampling == "group_by_length" else batches.sampling
    return replace(batches, rows=packs, sampling=sampling)
