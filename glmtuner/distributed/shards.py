"""Other values for parameters of which every rank holds a shard (parallel=fsdp2)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glmtuner.distributed.shares import Share


def exchange(parameter: DTensor, value: torch.Tensor | Share) -> torch.Tensor:
    """Give this rank's shard of the parameter another value; returns its former one, a DTensor as well.

    `value` is whole, the same on all ranks, or this rank's share, or what an earlier call returned. It is copied to where the shard
    lies: FSDP gathers the weight from there, whatever the parameter's `data` is.
    """
    if isinstance(value, Share):
        value = DTensor.from_local(
            value.rows.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    elif not isinstance(value, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    former: torch.Tensor = parameter.detach().clone()
    with torch.no_grad():
        parameter.to_local().copy_(value.to_local())
    return former


def forget_gathered(model: nn.Module) -> None:
    """Make the next forward pass gather all weights again; nothing where the model is not sharded."""
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether every rank has its shards of the model's parameters alone, by `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor with the shards of all ranks, on the device of their collectives; any other as it is. A collective."""
    if not isinstance(value, DTensor):
        return value.detach()
    gathered: torch.Tensor = value.detach().to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return gathered
