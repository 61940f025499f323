"""Fully sharded data parallel, by torch's `fully_shard`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtuner.config.groups import preset
from glmtuner.config.schema import SharedRows
from glmtuner.distributed import accelerator

if TYPE_CHECKING:
    from torch import nn


@preset("parallel", "fsdp2")
@dataclass(kw_only=True)
class Fsdp2(SharedRows):
    """Every process holds a shard of every weight and gathers one layer at a time (Zhao et al. 2023, arXiv:2304.11277)."""

    reshard_after_forward: bool = True
    cpu_offload: bool = False

    sharded = True
    shares = ("frozen weights", "trained weights", "gradients", "optimizer states")

    def shard_model(self, model: "nn.Module", blocks: "list[nn.Module]") -> None:
        """Shard the weights, in one group for each layer and one for the rest.

        accelerate does this on GPUs only, and writes checkpoints in a format of its own.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(accelerator.mesh_type(), (torch.distributed.get_world_size(),))
        pins = accelerator.mesh_type() != "cpu"  # torch pins memory for an accelerator, and fails without one
        policy = CPUOffloadPolicy(pin_memory=pins) if self.cpu_offload else OffloadPolicy()
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        register_fsdp_forward_method(model, "generate")
