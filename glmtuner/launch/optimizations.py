"""Which faster ways to the same loss a run takes."""

from typing import TYPE_CHECKING

from glmtuner.config.schema import Run
from glmtuner.console import say

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.data.splits import Datasets
    from glmtuner.training.trainer import GlmTrainer


def needs_compiler(run: Run) -> bool:
    """Whether the run needs torch's compiler: for its blocks, or for bitsandbytes' kernels on a CPU."""
    return run.quant.bits is not None or run.trainer.torch_compile


def allowed_optimizations(run: Run) -> dict[str, bool]:
    """What of `fast_paths` the run allows."""
    plain = run.stage.models_loss
    return {
        "without_padding": plain and run.data.padding_free and run.data.ignore_pad_token_for_loss,
        "on_weights": plain and run.parallel.whole_modules,
    }


def apply_optimizations(run: Run, trainer: "GlmTrainer", data: "Datasets", blocks: "list[nn.Module]") -> None:
    """Batches without padding, packs and a loss in chunks, where the model's loss stays what it is; kernels, compiled blocks."""
    from glmtuner.data.segments import Packs
    from glmtuner.kernels.choose import apply_liger, choose_optimizations, short_samples

    rows = data.train if data.train is not None else data.evaluation
    plain, autocast = trainer.data_collator, trainer.accelerator.autocast
    samples = short_samples(rows) if rows is not None and run.stage.models_loss else []
    kernels = (run.trainer.liger_kernel_config or {}) if run.trainer.use_liger_kernel else {}
    if run.trainer.use_liger_kernel:
        apply_liger(trainer.model, kernels, samples, plain, autocast)
    if run.trainer.torch_compile:
        options = {"backend": run.trainer.torch_compile_backend, "mode": run.trainer.torch_compile_mode}
        for block in blocks:
            block.compile(dynamic=True, **{name: value for name, value in options.items() if value})
    if not samples:
        return
    own_loss = not kernels.get("fused_linear_cross_entropy")  # Liger's, where it was chosen
    taken = choose_optimizations(
        trainer.model, samples, plain, autocast=autocast, own_loss=own_loss, **allowed_optimizations(run)
    )
    trainer.data_collator, trainer.chunks_loss = taken.collate, taken.chunks_loss
    for reason in taken.refused:
        say(f"computed the plain way, {reason}")
    if not run.data.packing or data.train is None:
        return
    if taken.collate is plain:
        say(
            "data.packing=true: this model's samples see each other in one row; batches of similar length "
            "(trainer.train_sampling_strategy=group_by_length) are used in its place"
        )
        trainer.args.train_sampling_strategy = "group_by_length"
        return
    trainer.train_dataset = Packs(data.train, run.data.max_source_length + run.data.max_target_length)
    if trainer.args.train_sampling_strategy == "group_by_length":
        trainer.args.train_sampling_strategy = "random"  # packs are all but equally long
