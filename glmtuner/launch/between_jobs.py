"""Whether this process runs several jobs, one after another, and then what decides which of them share a base model."""

from typing import TYPE_CHECKING

from glmtuner.config.schema import Run
from glmtuner.distributed import ranks
from glmtuner.families.family import Family

if TYPE_CHECKING:
    import torch

_keeps = False


def keep_base_models() -> None:
    """From now on, this process keeps the base model of a job for the next one."""
    global _keeps
    _keeps = True


def keep_no_more() -> None:
    """Give up the kept base model, and keep none from now on."""
    global _keeps
    if _keeps:
        from glmtuner.models.warm import release

        release()
    _keeps = False


def base_key_of(run: Run, family: Family | None, device: "torch.device") -> tuple[object, ...] | None:
    """What decides the run's base model; None where it is not kept, as with checkpoints, which may be merged into it."""
    from glmtuner.launch.device import compute_dtype
    from glmtuner.models.warm import base_key

    if not _keeps or run.model.checkpoint_dir or ranks.world_size() > 1:
        return None
    return base_key(run.model, run.quant, family.name if family else None, device, compute_dtype(run, device))
