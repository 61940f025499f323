"""Optimizations that keep the loss: which a run allows, and their application to its model and batches."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError
from glmtuner.inference.context import RunContext
from glmtuner.kernels.fast_paths import NO_COMMON_BEGINNINGS, FastPath
from glmtuner.launch.checks import check_whole_batch

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """The batches of training: rows, collator, sampling strategy, and whether the model can compute its loss in chunks."""

    rows: Any
    collator: Callable[[Any], dict[str, Any]]
    sampling: str
    chunks_loss: bool = False
    left_out: Mapping[FastPath, str] = field(default_factory=dict)  # optimizations that training goes without, and why


def needs_compiler(run: Run) -> bool:
    """Whether the run needs torch's compiler: for its blocks, or for bitsandbytes' kernels on a CPU."""
    return run.quant.bits is not None or run.trainer.torch_compile


def excluded_optimizations(run: Run) -> dict[FastPath, str]:
    """The optimizations that the configuration excludes, with the reasons."""
    if not (run.stage.models_loss or run.stage.reads_rows):
        return dict.fromkeys(FastPath, f"stage={run.stage.name} calls the model in its own way")
    excluded = {} if run.stage.policy else {FastPath.chunked_loss: f"stage={run.stage.name} has no use for logits"}
    if not run.stage.reads_rows:
        excluded[FastPath.common_beginnings] = NO_COMMON_BEGINNINGS
    elif run.trainer.neftune_noise_alpha:
        excluded[FastPath.common_beginnings] = "trainer.neftune_noise_alpha draws noise for each row"
    for key in ("padding_free", "ignore_pad_token_for_loss"):
        if not getattr(run.data, key):
            excluded[FastPath.without_padding] = f"data.{key}=false"
    if (run.trainer.liger_kernel_config or {}).get("fused_linear_cross_entropy") and run.trainer.use_liger_kernel:
        excluded[FastPath.chunked_loss] = "trainer.liger_kernel_config has a loss of its own"
    return excluded


def autocast_of(arguments: "TrainingArguments", device: "torch.device") -> Callable[[], AbstractContextManager[Any]]:
    """The autocast context that the Trainer runs the model in."""
    import torch

    if not (arguments.bf16 or arguments.fp16):
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
    step 1, optimizations are checked on a few samples; one that changes the loss is left out, and the plan says why.
    """
    from glmtuner.data.collate import Collator
    from glmtuner.data.parts import PartCollator
    from glmtuner.data.segments import Packs
    from glmtuner.kernels.choose import apply_liger, choose_optimizations, require_shared_rows, short_samples
    from glmtuner.kernels.common_beginnings import has_dropout

    run, model, data = context.run, context.model, context.data
    rows = data.train if data.train is not None else data.evaluation
    autocast = autocast_of(arguments, device)
    excluded = excluded_optimizations(run)
    plain = TrainingBatches(
        rows=data.train,
        collator=collator,
        sampling=arguments.train_sampling_strategy,
        left_out=dict.fromkeys(FastPath, "no sample with a labelled token") | excluded,
    )
    by_rows = run.stage.reads_rows  # batches stay padded, and lose the padding where the model is called
    if by_rows and data.train is not None and has_dropout(model):
        excluded.setdefault(
            FastPath.common_beginnings, "dropout, such as finetuning.lora_dropout, is drawn for each row"
        )
    padded = Collator(pad_id=context.tokenizer.pad_token_id) if by_rows else collator
    samples = short_samples(rows) if rows is not None and (by_rows or run.stage.models_loss) else []
    kernels = (run.trainer.liger_kernel_config or {}) if run.trainer.use_liger_kernel else {}
    if run.trainer.use_liger_kernel:
        apply_liger(model, kernels, samples, padded, autocast)
    if run.trainer.torch_compile:
        options = {"backend": run.trainer.torch_compile_backend, "mode": run.trainer.torch_compile_mode}
        for block in blocks:
            block.compile(dynamic=True, **{name: value for name, value in options.items() if value})
    sequence = run.parallel.ranks_per_row
    if not samples:
        if sequence > 1:
            raise ConfigError(
                f"parallel.sequence={sequence}: no record has a token to learn, so nothing can be computed in parts; type "
                "parallel.sequence=1"
            )
        return plain
    chosen = choose_optimizations(model, samples, padded, autocast=autocast, excluded=excluded, by_token=by_rows)
    if by_rows:
        return replace(plain, left_out=chosen.left_out)
    batches = replace(plain, collator=chosen.collate, chunks_loss=chosen.chunks_loss, left_out=chosen.left_out)
    if sequence > 1:
        if reason := chosen.left_out.get(FastPath.without_padding):
            raise ConfigError(
                f"parallel.sequence={sequence}: only rows without padding are shared, and this model's are padded ({reason}); type "
                "parallel.sequence=1"
            )
        part = PartCollator(collate=chosen.collate, parts=sequence, own=ranks.rank() % sequence)
        require_shared_rows(model, samples, chosen.collate, part, autocast, sequence)
        say(shared_rows_line(model, sequence))
        batches = replace(batches, collator=part)
    if not run.data.packing or data.train is None:
        return batches
    if chosen.collate is collator:
        say(
            "data.packing=true: this model's attention cannot keep the samples of one row apart; batches of similar length "
            "(trainer.train_sampling_strategy=group_by_length) are used instead"
        )
        return replace(batches, sampling="group_by_length")
    packs = Packs(data.train, run.data.max_source_length + run.data.max_target_length)
    check_whole_batch(run, len(packs), "packed rows")
    # packed rows have nearly equal lengths
    sampling = "random" if batches.sampling == "group_by_length" else batches.sampling
    return replace(batches, rows=packs, sampling=sampling)


def shared_rows_line(model: "nn.Module", sequence: int) -> str:
    """How the ranks share rows, in a sentence: all of a layer that keeps a state is computed by the last of them."""
    from glmtuner.models.mixing_layers import is_recurrent, mixing_layers
    from glmtuner.models.unwrap import unwrapped

    base = unwrapped(model)
    line = f"parallel.sequence={sequence}: {sequence} processes share each row, and the heads of its attention"
    kinds = {type(layer).__name__ for layer, is_attention in mixing_layers(base) if not is_attention}
    if not is_recurrent(base) or not kinds:
        return line
    return (
        f"{line}; the layers that keep a state ({', '.join(sorted(kinds))}) are computed from the beginning of a sample on, by each "
        "process that has a part of it"
    )
