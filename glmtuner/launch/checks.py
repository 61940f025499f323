"""Checks of a run against config.json and its data, before the model is loaded."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import run_folder_of
from glmtuner.config.groups import Model
from glmtuner.config.schema import Run
from glmtuner.distributed import accelerator, ranks
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.finetuning.start import check_checkpoints
from glmtuner.launch.libraries import quieten_libraries
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch


LIGER = "liger-kernel>=0.8.5"  # the first version with a SwiGLU of one fused tensor, as GLM computes it
# keys of config.json in which a checkpoint's base and the run's must agree, by all the names that models have for them
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_layers", "vocab_size", "padded_vocab_size")


def check_base(model: Model, model_config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a checkpoint cannot be read, or its run was trained on a base of another shape."""
    check_checkpoints(model)
    for path in model.checkpoint_dir:
        source = run_folder_of(path)
        trained_on = RunFolder(source).provenance().get("base", {}) if source else {}
        different = [
            f"{key} is {value} in the checkpoint's base, {model_config.get(key)} in this one"
            for key, value in trained_on.items()
            if value != model_config.get(key)
        ]
        if different:
            raise CheckpointError(
                f"model.model_name_or_path={model.model_name_or_path} does not fit model.checkpoint_dir={path} "
                f"({', '.join(different)}); leave the model out to use the checkpoint's own"
            )


def check_liger(run: Run, model_config: Mapping[str, Any]) -> None:
    """Raise ConfigError where Liger's kernels are turned on and cannot be used; transformers would silently train without them."""
    if (liger := sys.modules.get("glmtuner.kernels.liger")) is not None:
        liger.restore_modules()  # which an earlier job of this process may have patched
    if not run.trainer.use_liger_kernel:
        return
    setting = "trainer.use_liger_kernel=true"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(f"{setting}: liger-kernel is not installed; type pip install '{LIGER}', or leave it out")
    from packaging.requirements import Requirement

    version = importlib.metadata.version("liger-kernel")
    if not Requirement(LIGER).specifier.contains(version, prereleases=True):
        raise ConfigError(f"{setting}: liger-kernel {version} is too old; type pip install '{LIGER}', or leave it out")
    quieten_libraries()
    from glmtuner.kernels.liger import KNOWN, kernels_for

    model_type = str(model_config.get("model_type"))
    if model_type not in KNOWN:
        raise ConfigError(
            f"{setting} with model_type={model_type}: liger-kernel {version} has no kernels for it; leave it out (models with "
            f"kernels: {', '.join(sorted(KNOWN))})"
        )
    for name, value in (run.trainer.liger_kernel_config or {}).items():
        if name not in (known := kernels_for(model_type)) or not isinstance(value, bool):
            raise ConfigError(
                f"trainer.liger_kernel_config={{{name}: {str(value).lower()}}}: the kernels for model_type={model_type} are "
                f"{', '.join(known)}, each true or false; type 'trainer.liger_kernel_config={{{known[0]}: true}}'"
            )


def check_liger_runs(run: Run, device: "torch.device") -> None:
    """Raise ConfigError where Liger's kernels are turned on for a device on which they were not compared."""
    if (
        run.trainer.use_liger_kernel
        and not accelerator.supports("triton", device)
        and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        raise ConfigError(
            f"trainer.use_liger_kernel=true: Liger's kernels, by Triton, need a GPU of CUDA or ROCm, and this run is on "
            f"{device.type}; leave it out"
        )


def check_shared_heads(run: Run, model_config: Mapping[str, Any]) -> None:
    """Raise ConfigError where the processes that share a row cannot have equal shares of the heads that config.json names."""
    size, text = run.parallel.ranks_per_row, model_config.get("text_config") or model_config
    heads = text.get("num_attention_heads")
    if isinstance(heads, int) and heads % size:
        raise ConfigError(
            f"parallel.sequence={size}: the model has {heads} heads (num_attention_heads), which {size} processes cannot share equally; "
            f"type parallel.sequence={gcd(heads, size)}"
        )


def check_whole_batch(run: Run, rows: int, kind: str = "records") -> None:
    """Raise ConfigError where all rows to train on are the incomplete last batch that is dropped: no step would be taken."""
    trainer = run.trainer
    config = trainer.accelerator_config
    # one batch for all processes, which the file that a text names may ask for, too
    splits = config.get("split_batches") if isinstance(config, dict) else config is not None
    processes = 1 if splits else ranks.world_size() // run.parallel.ranks_per_row
    if trainer.dataloader_drop_last and rows < trainer.per_device_train_batch_size * processes:
        shared = f" on {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"trainer.dataloader_drop_last=true: {rows:,} {kind} are less than a batch of trainer.per_device_train_batch_size="
            f"{trainer.per_device_train_batch_size}{shared}, so that no step would be taken; type trainer.dataloader_drop_last="
            "false, or a smaller trainer.per_device_train_batch_size"
        )
