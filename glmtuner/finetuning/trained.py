"""Trained parameters in and out of files, for every method: by name, bit by bit, never by pickle."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

TRAINED = "trained.safetensors"
VALUE_HEAD = "value_head"  # a module that a stage adds to the model, and keeps itself


def freeze_all(model: "nn.Module") -> None:
    """No parameter of the model is trained afterwards."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def make_trainable(parameter: "nn.Parameter") -> None:
    """Train this parameter, in float32 so that small steps are not rounded away."""
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def trained_parameters(model: "nn.Module") -> "dict[str, torch.Tensor]":
    """Name -> parameter, for those that are trained; tied ones once."""
    return {name: parameter for name, parameter in own_parameters(model).items() if parameter.requires_grad}


def own_parameters(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """Name -> parameter, without the value head's."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(f"{VALUE_HEAD}.")}


def save_tensors(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def load_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, or of a .bin file, of which nothing but tensors is unpickled.

    Where there is no safetensors file, the .bin file of the same stem is read. Raises CheckpointError when there is
    neither, or when it is cut short.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    old = path.with_suffix(".bin")
    if not path.is_file() and old.is_file():
        path = old
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no {path.name} in {path.parent}; the checkpoint is not whole, use another one"
        ) from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged; it is not read, use another checkpoint"
        ) from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from None


def load_folder(folder: Path) -> "dict[str, torch.Tensor]":
    """All tensors of a model folder, in one file or in shards; raises CheckpointError."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            shards = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            saved: dict[str, Any] = {}
            for shard in shards:
                saved |= load_tensors(folder / shard)
            return saved
    old = folder / "pytorch_model.bin"
    return load_tensors(old if old.is_file() else folder / "model.safetensors")


def save_trained(model: "nn.Module", folder: Path) -> None:
    """Write the trained parameters to `trained.safetensors`."""
    save_tensors(trained_parameters(model), folder / TRAINED)


def restore_trained(model: "nn.Module", folder: Path) -> None:
    """Copy `trained.safetensors` into the model's trained parameters; raises CheckpointError where names differ."""
    assign(trained_parameters(model), load_tensors(folder / TRAINED), folder)


def assign(parameters: "dict[str, torch.Tensor]", saved: "dict[str, torch.Tensor]", folder: Path) -> None:
    """Copy saved values into parameters of the same names and shapes; anything else is a CheckpointError."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    check_fit(parameters, saved, folder)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = saved[name]
            if isinstance(parameter, DTensor):  # this process's share of it; every process has read the file
                mesh = parameter.device_mesh
                value = distribute_tensor(value.to(parameter), mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)


def check_fit(parameters: "dict[str, torch.Tensor]", saved: "dict[str, torch.Tensor]", folder: Path) -> None:
    """Raise CheckpointError where the saved values have not the parameters' names and shapes."""
    missing, foreign = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
    shapes = [name for name in parameters.keys() & saved.keys() if parameters[name].shape != saved[name].shape]
    if missing or foreign or shapes:
        told = [
            f"{len(names)} {what} (such as {names[0]})"
            for what, names in (
                ("are missing", missing),
                ("belong to another model", foreign),
                ("have another shape", shapes),
            )
            if names
        ]
        raise CheckpointError(
            f"{folder} does not fit this model: of its parameters {', '.join(told)}; use another checkpoint"
        )


def load_model_folder(model: "nn.Module", folder: Path) -> None:
    """Copy the weights of a transformers folder into the model; raises CheckpointError."""
    parameters = own_parameters(model)
    assign(parameters, weights_in(folder, parameters), folder)


def weights_in(folder: Path, parameters: "dict[str, nn.Parameter]") -> "dict[str, torch.Tensor]":
    """What a transformers folder has for these parameters."""
    return {name: value for name, value in load_folder(folder).items() if name in parameters}


@contextmanager
def gathered(model: "nn.Module", everything: bool) -> Iterator[None]:
    """While this lasts, rank 0 has parameters that are shared out over the ranks whole, on the CPU, and can save them.

    The trained ones, or all of them. Every rank must come here; a model that is not shared out is left as it is.
    """
    from torch import nn
    from torch.distributed.fsdp import FSDPModule

    from glmtuner.distributed import ranks

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    whole: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_share(parameter) or not (everything or parameter.requires_grad):
                continue
            if id(parameter) not in whole:
                value = whole_tensor(parameter)
                whole[id(parameter)] = nn.Parameter(value, parameter.requires_grad) if ranks.is_main() else parameter
            replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def is_share(parameter: "torch.Tensor") -> bool:
    """Whether this rank has only its share of the parameter, by FSDP2 or by ZeRO stage 3."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole_tensor(parameter: "torch.Tensor") -> "torch.Tensor":
    """The shares of all ranks together, on the CPU; every rank must ask."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.full_tensor().detach().cpu()


def digest_of(model: "nn.Module") -> str:
    """A hash of the trained parameters' names and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(trained_parameters(model).items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
