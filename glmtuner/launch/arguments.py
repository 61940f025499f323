"""transformers' training arguments of a run."""

import dataclasses
from enum import Enum
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.distributed import ranks
from glmtuner.launch.device import has_bfloat16
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn


def training_arguments(run: Run, folder: RunFolder, model: "nn.Module", device: "torch.device") -> Any:
    """transformers' arguments: what differs from its defaults, and the precision that trained parts of a half base need.

    `device` is where the run trains, which need not be in this machine.
    """
    import torch
    from transformers import Seq2SeqTrainingArguments

    known = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(TrainerArguments):
        value = getattr(run.trainer, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        if value != default and field.name in known:
            chosen[field.name] = value.value if isinstance(value, Enum) else value
    if "activation_checkpointing" in known and "gradient_checkpointing" in chosen:  # its name from transformers 5.23 on
        chosen["activation_checkpointing"] = chosen.pop("gradient_checkpointing")
        if "gradient_checkpointing_kwargs" in chosen:
            chosen["activation_checkpointing_kwargs"] = chosen.pop("gradient_checkpointing_kwargs")
    # `speed_up` compiles blocks one by one, since the whole model breaks at every attention, and asks Liger for more models
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
        chosen |= run.parallel.arguments()
    half = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} & {
        torch.float16,
        torch.bfloat16,
    }
    if run.trainer.do_train and half and not (run.trainer.fp16 or run.trainer.bf16):
        if run.finetuning.saved_as == "model":
            chosen["bf16" if torch.bfloat16 in half else "fp16"] = True  # float32 weights between half-precision ones
        elif torch.bfloat16 in half and has_bfloat16(device):
            chosen["bf16"] = True  # products with float32 adapters take bfloat16's tensor cores, too
    if not torch.cuda.is_available():
        chosen["dataloader_pin_memory"] = False  # transformers warns where there is nothing to pin for
        if ranks.world_size() > 1:
            chosen["use_cpu"] = True  # accelerate meets no ranks on a CPU that it was not told of
    chosen["eval_on_start"] = run.trainer.eval_on_start and run.trainer.do_train
    return Seq2SeqTrainingArguments(**{name: value for name, value in chosen.items() if value is not None})
