"""The base model that the jobs of one process share: loaded once, and proven unchanged before each further job.

What is kept is a second tree of modules on the same tensors, to which no method is attached. Each job gets a copy of the tree, not of
the tensors. Weights that a job is going to train are copied to host memory before, and put back after it; a checksum of every tensor,
taken when it was loaded, says whether a job has changed one otherwise, as merging an adapter does. Then the base is loaded again.
"""

import copy
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Model
from glmtuner.config.paths import model_source
from glmtuner.console import say

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

MOST_ORIGINALS = (
    1 / 8
)  # of the free host memory that originals may take: gradients and AdamW's states may need three times as much
BLOCK = 4096  # bytes under one hash on an accelerator

_kept: "KeptBase | None" = None


def release() -> None:
    """Give up the kept base model."""
    global _kept
    _kept = None


def shared_bytes() -> int:
    """The bytes of the kept base model, which a job that shares it does not take again; 0 without one."""
    return _kept.bytes if _kept is not None else 0


def make_room(key: object) -> None:
    """Give up the kept base model, unless it is that of `key`."""
    if _kept is not None and _kept.key != key:
        release()


def base_model(key: object, load: "Callable[[], PreTrainedModel]") -> "PreTrainedModel":
    """The model that `load` loads, kept for the next job under the key, or a copy of the kept one; with None nothing is kept."""
    global _kept
    make_room(key)
    if key is None:
        return load()
    if _kept is not None:
        _kept.put_back()
        changed = _kept.changed()
        if not changed:
            say("base model: kept from the job before")
            return _kept.hand_out()
        say(
            f"base model: loaded again, since the job before changed {len(changed)} of its tensors (such as {changed[0]})"
        )
        release()
    model = load()
    try:
        _kept = KeptBase(key, model)
        return _kept.hand_out()
    except Exception as error:  # of a model whose modules cannot be copied, whatever they raise
        release()
        say(f"base model: not kept for the next job ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return model


def keep_originals(model: "nn.Module") -> None:
    """Copy what the job is going to train of the kept base model, or give that up where the copy would take too much memory."""
    if _kept is not None and not _kept.keep_originals(model):
        say("base model: not kept for the next job, since a copy of what is trained would not fit into host memory")
        release()


class KeptBase:
    """A base model that was loaded, with the checksum of each tensor."""

    def __init__(self, key: object, model: "PreTrainedModel") -> None:
        self.key = key
        self.model = model
        self.originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        tensors = dict(unique_tensors(model))
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.checksums = {name: checksum(tensor) for name, tensor in tensors.items()}

    def hand_out(self) -> "PreTrainedModel":
        """A model of its own on the same tensors."""
        return copied(self.model)

    def keep_originals(self, model: "nn.Module") -> bool:
        """Copy the tensors of the base that `model` trains to host memory; false, and nothing is copied, if they do not fit."""
        import psutil

        trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
        tensors = [tensor for _, tensor in unique_tensors(self.model) if tensor.data_ptr() in trained]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > psutil.virtual_memory().available * MOST_ORIGINALS:
            return False
        self.originals = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
        return True

    def put_back(self) -> None:
        """Write the originals of what the job trained over it."""
        for tensor, original in self.originals:
            tensor.detach().copy_(original)
        self.originals = []

    def changed(self) -> list[str]:
        """The names of the tensors that are not what was loaded."""
        return [name for name, tensor in unique_tensors(self.model) if checksum(tensor) != self.checksums[name]]


def unique_tensors(model: "nn.Module") -> "Iterator[tuple[str, torch.Tensor]]":
    """The parameters and buffers by name, each once, those of a quantized weight's state included."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        for part in ("absmax", "code", "offset"):
            value: Any = getattr(state, part, None)
            if hasattr(value, "data_ptr"):
                yield f"{name}.{part}", value
    yield from model.named_buffers()


def copied(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the modules on the same tensors: parameters of its own on the same memory, quantized ones and buffers the same objects."""
    from torch import nn

    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter and id(parameter) not in memo:  # tied ones stay tied
                memo[id(parameter)] = alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                alias.__dict__.update(parameter.__dict__)
            elif parameter is not None:
                memo.setdefault(id(parameter), parameter)
        states = [
            getattr(module, name, None) for name in ("quant_state", "state")
        ]  # which hold values of bitsandbytes' layers
        for shared in (
            *module._buffers.values(),
            *(states if type(module).__module__.startswith("bitsandbytes") else ()),
        ):
            if shared is not None:
                memo[id(shared)] = shared
    return copy.deepcopy(model, memo)


def checksum(tensor: "torch.Tensor") -> int:
    """A checksum of the bytes, their order included: CRC-32 on a CPU, elsewhere of hashes that the device computes."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    values: Any = (flat if flat.device.type == "cpu" else block_hashes(flat)).numpy()
    return zlib.crc32(values)


def block_hashes(flat: "torch.Tensor") -> "torch.Tensor":
    """One 64-bit hash for each BLOCK bytes, as bytes on the CPU; a changed bit changes its block's hash."""
    import torch

    whole = len(flat) // BLOCK * BLOCK
    hashes = torch.hash_tensor(flat[:whole].view(torch.int64).view(-1, BLOCK // 8), dim=1).view(torch.uint8)
    return torch.cat([hashes.reshape(-1), flat[whole:]]).cpu()


def base_key(model: Model, *settings: object) -> tuple[object, ...] | None:
    """What decides the base model: the model's configuration, `settings`, and its files by name, size and times; None if no folder
    of this machine holds them.
    """
    folder = model_folder(model)
    if folder is None:
        return None
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    files = tuple((str(path), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for path, at in stats)
    return (repr(model), *map(repr, settings), files)


def model_folder(model: Model) -> Path | None:
    """The folder with the model's files: a local one, or the hub's snapshot in the cache."""
    from transformers.utils.hub import cached_file

    source = model_source(model.model_name_or_path)
    if Path(source).is_dir():
        return Path(source)
    try:
        found = cached_file(
            source, "config.json", cache_dir=model.cache_dir, revision=model.model_revision, local_files_only=True
        )
    except Exception:  # not in the cache, or no name of a model: loading it will tell
        return None
    return Path(found).parent if found else None
