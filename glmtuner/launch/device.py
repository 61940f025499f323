"""The device of a run, and the precision that it computes in."""

import ctypes
import os
import platform
from typing import TYPE_CHECKING

from glmtuner.config.groups import Dtype
from glmtuner.config.schema import Run
from glmtuner.distributed import accelerator, ranks
from glmtuner.distributed.shares import take_shares

if TYPE_CHECKING:
    import torch
    from torch import nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def device_of(run: Run) -> "torch.device":
    """The accelerator that transformers will train on, or the CPU."""
    import torch

    if run.trainer.use_cpu:
        return torch.device("cpu")
    return accelerator.own_device()


def reuse_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones, unless its environment variables say how.

    By default it returns each large block to the system at once, which fills the next one's pages with zeros: 150,000 page faults
    in 16 training steps of nine million parameters. That is for packed rows, of nearly equal lengths: tensors of ever-changing sizes
    leave gaps, in a mixture of experts a fifth of the peak. Without glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_memory() -> None:
    """Let the C library give blocks of a megabyte and more back to the system when they are freed.

    By default it keeps ever larger ones in its heap, between blocks that stay: those of weights that were gathered and of what they
    are converted from add up to a third of what a rank needs. Without glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    libc.mallopt(M_TRIM_THRESHOLD, 2**20)


def compute_dtype(run: Run, device: "torch.device") -> "torch.dtype":
    """The dtype of quantized layers' matrix products: the run's precision, else bf16 where the GPU has it, else float32."""
    import torch

    if run.trainer.bf16 or run.trainer.fp16:
        return torch.bfloat16 if run.trainer.bf16 else torch.float16
    if run.model.dtype is not Dtype.auto:
        return getattr(torch, run.model.dtype.value)
    return torch.bfloat16 if accelerator.has_bfloat16(device) else torch.float32


def shard_model(run: Run, model: "nn.Module", blocks: "list[nn.Module]") -> None:
    """Shard the model over the ranks as the run says, in place; weights that were loaded in shares are put into the shards."""
    if ranks.world_size() == 1:
        return
    if run.parallel.sharded and run.quant.bits is not None:
        from glmtuner.models.quantized_shards import as_parameters

        as_parameters(model)
    taken = take_shares(model)
    run.parallel.shard_model(model, blocks)
    taken.give_back(on_cpu=getattr(run.parallel, "cpu_offload", False))  # else torch refuses the first step


def place_model(run: Run, model: "nn.Module", device: "torch.device") -> None:
    """Move the model to its device for training; a quantized or sharded model is placed already."""
    if not (run.quant.bits or (run.parallel.sharded and ranks.world_size() > 1)):
        model.to(device)
