"""Tensors in files that all ranks write, each its own shards, and that any number of ranks reads (torch.distributed.checkpoint).

The files are of safetensors, one or several a rank, with each shard's place in the header (`DCP_SHARDING_INFO`): torch's Hugging Face
writer and reader. What several ranks hold whole is written once.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from glmtuner.distributed import ranks
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.names import SHARDS

FILE_BYTES = 2**27  # a rank's shards in one file: the writer holds a file twice

_group: list[Any] = []  # the ranks once more, for the collectives of writing beside those of the training


def has_shards(folder: Path) -> bool:
    """Whether the folder of a checkpoint has files that `write` or `start_writing` wrote."""
    return (folder / SHARDS).is_dir()


def write(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the tensors, DTensors or those that every rank holds whole, into the folder of a checkpoint; a collective.

    Raises the OSError that a rank had, or CheckpointError.
    """
    with failure_of_a_rank(folder):
        dcp.save(dict(tensors), storage_writer=_writer(tensors, folder))


def start_writing(tensors: Mapping[str, torch.Tensor], folder: Path) -> "Future[Any]":
    """Copy the tensors to the host's memory and write them as `write` does, in a thread; its result is there when all ranks' are.

    A collective, but for the thread's part, which communicates in a process group of its own.
    """
    if ranks.world_size() > 1 and not _group:
        _group.append(torch.distributed.new_group(backend="gloo"))
    future: Future[Any] = dcp.async_save(  # type: ignore[assignment]  # one of two, by the stager
        dict(tensors), storage_writer=_writer(tensors, folder), process_group=_group[0] if _group else None
    )
    return future


def _writer(tensors: Mapping[str, torch.Tensor], folder: Path) -> dcp.HuggingFaceStorageWriter:
    files, size, number = {}, 0, 1
    for name, tensor in tensors.items():
        share = tensor.numel() * tensor.element_size() // (ranks.world_size() if isinstance(tensor, DTensor) else 1)
        if size and size + share > FILE_BYTES:
            number, size = number + 1, 0
        files[name], size = number, size + share
    return dcp.HuggingFaceStorageWriter(str(folder / SHARDS), fqn_to_index_mapping=files, save_distributed=True)


@contextmanager
def failure_of_a_rank(folder: Path) -> Iterator[None]:
    """Within it, an error of any rank in writing or reading is raised on every rank: an OSError as it is, others as CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        told = f"rank {rank} cannot write or read {folder / SHARDS} ({reason})"
        if not ranks.is_main():
            raise ranks.ReportedByRank0(told) from None
        if isinstance(cause, OSError):
            raise cause from None
        raise CheckpointError(f"{told}; use another checkpoint, or check the disk") from None


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Name -> shape of all tensors in the shards of a checkpoint; raises CheckpointError."""
    return {name: each.size for name, each in _metadata(folder).items()}


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        return dict(dcp.HuggingFaceStorageReader(str(folder / SHARDS)).read_metadata().state_dict_metadata)
    except Exception as error:  # of safetensors, json or torch, by what is damaged
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / SHARDS} is damaged ({reason}); use another checkpoint") from None


def read(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Fill the tensors with what is saved under their names; each rank reads its own rows. A collective of a run's ranks."""
    with failure_of_a_rank(folder), torch.no_grad():
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder / SHARDS)))


def read_whole(folder: Path, beginning: str) -> dict[str, torch.Tensor]:
    """The whole tensors whose names begin so, on the CPU, by the rest of their names; for this process alone."""
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in _metadata(folder).items()
        if name.startswith(beginning)
    }
    with failure_of_a_rank(folder):
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder / SHARDS)), no_dist=True)
    return {name.removeprefix(beginning): tensor for name, tensor in tensors.items()}
