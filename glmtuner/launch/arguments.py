"""transformers' training arguments of a run."""

import dataclasses
from enum import Enum
from typing import TYPE_CHECKING, Any

from glmtuner.config.optimizers import OWN
from glmtuner.config.schedules import AFTER_EVALUATIONS, dictionary
from glmtuner.config.schema import Run
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.config.trainer_fields import default_of
from glmtuner.config.trainer_rules import is_greater_better
from glmtuner.distributed import accelerator, ranks
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Seq2SeqTrainingArguments


def training_arguments(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    device: "torch.device",
    *,
    checkpointing: bool | None = None,
    for_estimate: bool = False,
) -> "Seq2SeqTrainingArguments":
    """transformers' arguments: the run's values that differ from the defaults, and the precision for a half-precision base.

    `checkpointing` turns gradient checkpointing on or off, whatever the configuration says. With `for_estimate` they are those
    of a single process on `device`, which this machine need not have.
    """
    import torch
    from transformers import Seq2SeqTrainingArguments

    known = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(TrainerArguments):
        value = getattr(run.trainer, field.name)
        if value != default_of(field) and field.name in known:
            chosen[field.name] = value.value if isinstance(value, Enum) else value
    if "activation_checkpointing" in known and "gradient_checkpointing" in chosen:  # renamed in transformers 5.23
        chosen["activation_checkpointing"] = chosen.pop("gradient_checkpointing")
        if "gradient_checkpointing_kwargs" in chosen:
            chosen["activation_checkpointing_kwargs"] = chosen.pop("gradient_checkpointing_kwargs")
    if checkpointing is not None:
        chosen["activation_checkpointing"] = checkpointing
    # optimizations.py compiles block by block, since the whole model has a graph break at every attention, and applies Liger's
    # kernels to more models
    for name in (
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "use_liger_kernel",
        "liger_kernel_config",
    ):
        chosen.pop(name, None)
    chosen |= {"output_dir": str(folder.path), "report_to": "none", "run_name": run.name or folder.path.name}
    if ranks.world_size() > 1:
        chosen = run.parallel.arguments() | chosen
    half = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} & {
        torch.float16,
        torch.bfloat16,
    }
    if run.trainer.do_train and half and not (run.trainer.fp16 or run.trainer.bf16):
        if run.finetuning.saved_as == "model":
            chosen["bf16" if torch.bfloat16 in half else "fp16"] = True  # float32 weights between half-precision ones
        elif torch.bfloat16 in half and accelerator.has_bfloat16(device):
            chosen["bf16"] = True  # so that products with float32 adapters use bfloat16's tensor cores, too
    on_gpu = accelerator.available_type() in accelerator.WITH_MEMORY
    if not on_gpu:
        chosen["dataloader_pin_memory"] = False  # transformers warns about pinned memory without a GPU
        if ranks.world_size() > 1:
            chosen["use_cpu"] = True  # accelerate does not detect CPU ranks by itself
    if for_estimate:
        chosen["use_cpu"] = not on_gpu  # transformers refuses bf16 without a GPU that has it
    if run.trainer.optim.value in OWN:  # glmtuner/training/optimizers.py makes them
        chosen.pop("optim")
        chosen.pop("optim_args", None)
    if (greater := is_greater_better(run.trainer)) is not None:
        chosen["greater_is_better"] = greater
        if run.trainer.lr_scheduler_type in AFTER_EVALUATIONS:  # by default they wait for a smaller value
            mode = {"mode": "max" if greater else "min"}
            chosen["lr_scheduler_kwargs"] = mode | (dictionary(run.trainer.lr_scheduler_kwargs) or {})
    for name in ("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"):
        chosen.pop(name, None)  # transformers' Trainer would upload checkpoints, see launch/upload.py
    chosen["eval_on_start"] = run.trainer.eval_on_start and run.trainer.do_train
    return Seq2SeqTrainingArguments(**{name: value for name, value in chosen.items() if value is not None})
