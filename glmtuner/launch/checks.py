"""What of a run is refused once config.json is read, before anything heavy is loaded."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import run_folder_of
from glmtuner.config.groups import Model
from glmtuner.config.schema import Run
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.launch.libraries import quieten_libraries
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch


LIGER = "liger-kernel>=0.8.5"  # from here on it has a SwiGLU of one tensor, which is how GLM computes it
# what a checkpoint's base must share, in all the words that config.json files have for it
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_layers", "vocab_size", "padded_vocab_size")


def check_base(model: Model, found: Mapping[str, Any]) -> None:
    """Raise when a checkpoint's run was trained on a base of another shape."""
    for path in model.checkpoint_dir:
        source = run_folder_of(path)
        wanted = RunFolder(source).provenance().get("base", {}) if source else {}
        different = [
            f"{key} {wanted[key]} there, {found.get(key)} here" for key in wanted if wanted[key] != found.get(key)
        ]
        if different:
            raise CheckpointError(
                f"model.model_name_or_path={model.model_name_or_path} does not fit model.checkpoint_dir={path} "
                f"({', '.join(different)}); leave the model out, and the checkpoint's own is used"
            )


def check_liger(run: Run, found: Mapping[str, Any]) -> None:
    """Raise where Liger's kernels are asked for and are not there: without a word, transformers would go on without them."""
    if (left := sys.modules.get("glmtuner.kernels.liger")) is not None:
        left.restore_modules()  # by an earlier job of this process
    if not run.trainer.use_liger_kernel:
        return
    asked = "trainer.use_liger_kernel=true"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(f"{asked}: liger-kernel is not installed here; type pip install '{LIGER}', or leave it out")
    from packaging.requirements import Requirement

    version = importlib.metadata.version("liger-kernel")
    if not Requirement(LIGER).specifier.contains(version, prereleases=True):
        raise ConfigError(f"{asked}: liger-kernel {version} is too old; type pip install '{LIGER}', or leave it out")
    quieten_libraries()
    from glmtuner.kernels.liger import KNOWN, kernels_for

    kind = found.get("model_type")
    if kind not in KNOWN:
        raise ConfigError(
            f"{asked} with model_type={kind}: liger-kernel {version} has no kernels for it; leave it out (there are kernels "
            f"for {', '.join(sorted(KNOWN))})"
        )
    for name, value in (run.trainer.liger_kernel_config or {}).items():
        if name not in (known := kernels_for(kind)) or not isinstance(value, bool):
            raise ConfigError(
                f"trainer.liger_kernel_config={{{name}: {str(value).lower()}}}: the kernels for model_type={kind} are "
                f"{', '.join(known)}, each true or false; type 'trainer.liger_kernel_config={{{known[0]}: true}}'"
            )


def check_liger_runs(run: Run, device: "torch.device") -> None:
    """Raise where Liger's kernels are asked for on a device that Triton does not compile for."""
    if run.trainer.use_liger_kernel and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"trainer.use_liger_kernel=true: Liger's kernels run on GPUs that Triton compiles for, and this run is on the "
            f"{device.type}; leave it out"
        )
