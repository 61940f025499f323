"""Trained parameters in files, for every method: by name, bit-exact, and never as pickles."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.distributed.shares import cast
from glmtuner.errors import CheckpointError
from glmtuner.families.weight_files import tensor_shapes, weight_files
from glmtuner.run_folder.folder import is_out_of_memory
from glmtuner.run_folder.names import SHARDS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

TRAINED = "trained.safetensors"
IN_SHARDS = "model."  # the beginning of the names of trained parameters in the shards of a checkpoint
VALUE_HEAD = "value_head"  # a module that an objective adds to the model, and saves itself


def freeze_all(model: "nn.Module") -> None:
    """Make no parameter of the model trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def make_trainable(parameter: "nn.Parameter") -> None:
    """Make this parameter trainable, in float32 so that small steps are not rounded away."""
    import torch

    cast(parameter, torch.float32)
    parameter.requires_grad_(True)


def trained_parameters(model: "nn.Module") -> "dict[str, torch.Tensor]":
    """Name -> parameter, for those that are trained; tied parameters once."""
    return {name: parameter for name, parameter in own_parameters(model).items() if parameter.requires_grad}


def own_parameters(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """Name -> parameter, without those of the value head."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(f"{VALUE_HEAD}.")}


def save_tensors(tensors: "Mapping[str, torch.Tensor]", path: Path, **metadata: str) -> None:
    """Write a safetensors file, with `metadata` in its header; missing folders are created."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", **metadata},
    )
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a file's header: safetensors writes them in an order that differs from one time to the next."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def load_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, on the CPU, or of the .bin file of the same stem if it does not exist.

    Of a .bin file only tensors are unpickled. Raises CheckpointError if neither file exists, or if it is truncated.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    old = path.with_suffix(".bin")
    if not path.is_file() and old.is_file():
        path = old
    try:
        if path.suffix != ".bin":
            return load_file(path)
        tensors = read_bin(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no {path.name} in {path.parent}; the checkpoint is incomplete, use another one"
        ) from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged; it is not read, use another checkpoint"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} is damaged ({reason}); use another checkpoint") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        held = ", ".join(map(str, [*tensors][:4])) if isinstance(tensors, dict) else type(tensors).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of named tensors (it holds {held}); save the tensors alone, as state_dict() gives them"
        )
    return tensors


def read_bin(path: Path) -> Any:
    """What torch.load returns with `weights_only`, mapped into memory unless it is a file of torch before 1.6."""
    import zipfile

    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def names_in(folder: Path) -> set[str]:
    """The names of all tensors of a model folder; torch is imported for .bin files only. Raises CheckpointError."""
    files = weight_files(folder) or [folder / "model.safetensors"]
    return {name for path in files for name in (tensor_shapes(path) if path.suffix != ".bin" else load_tensors(path))}


def load_folder(folder: Path) -> "dict[str, torch.Tensor]":
    """All tensors of a model folder, from one file or from its shards; raises CheckpointError."""
    saved: dict[str, Any] = {}
    for path in weight_files(folder) or [folder / "model.safetensors"]:
        saved |= load_tensors(path)
    return saved


def save_trained(model: "nn.Module", folder: Path) -> None:
    """Write the trained parameters to `trained.safetensors`."""
    save_tensors(trained_parameters(model), folder / TRAINED)


def holds_trained(folder: Path) -> bool:
    """Whether a checkpoint has the trained parameters by their names in the model: in one file, or in the shards of its ranks."""
    if (folder / TRAINED).is_file():
        return True
    if not (folder / SHARDS).is_dir():
        return False
    from glmtuner.distributed.shard_files import shapes_in

    return any(name.startswith(IN_SHARDS) for name in shapes_in(folder))


def load_trained(folder: Path) -> "dict[str, torch.Tensor]":
    """The trained parameters in a checkpoint that `holds_trained`, whole, on the CPU; raises CheckpointError."""
    if (folder / TRAINED).is_file():
        return load_tensors(folder / TRAINED)
    from glmtuner.distributed.shard_files import read_whole

    return read_whole(folder, IN_SHARDS)


def restore_trained(model: "nn.Module", folder: Path) -> None:
    """Copy what `holds_trained` found into the model's trained parameters; raises CheckpointError if names or shapes differ.

    A collective where the model is sharded: each rank reads its rows.
    """
    if (folder / TRAINED).is_file():
        assign(trained_parameters(model), load_tensors(folder / TRAINED), folder)
        return
    from glmtuner.distributed.shard_files import read, shapes_in

    parameters = trained_parameters(model)
    shapes = {
        name.removeprefix(IN_SHARDS): shape for name, shape in shapes_in(folder).items() if name.startswith(IN_SHARDS)
    }
    check_fit(parameters, shapes, folder)
    read({f"{IN_SHARDS}{name}": parameter.detach() for name, parameter in parameters.items()}, folder)
    require_finite(parameters, folder)


def assign(parameters: "Mapping[str, torch.Tensor]", saved: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    """Copy saved values into parameters; raises CheckpointError unless names and shapes are the same."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    check_fit(parameters, saved, folder)
    require_finite(saved, folder)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = saved[name]
            if isinstance(parameter, DTensor):  # this rank keeps its shard; every rank has read the file
                mesh = parameter.device_mesh
                value = distribute_tensor(value.to(parameter), mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)


def check_fit(
    parameters: "Mapping[str, torch.Tensor]", saved: "Mapping[str, torch.Tensor | torch.Size]", folder: Path
) -> None:
    """Raise CheckpointError unless the saved values, or shapes, have the parameters' names and shapes; all differences are reported."""
    missing, unexpected = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
    shapes = {name: getattr(value, "shape", value) for name, value in saved.items()}
    reshaped = [name for name in parameters.keys() & saved.keys() if parameters[name].shape != shapes[name]]
    if missing or unexpected or reshaped:
        differences = [
            f"{len(names)} {difference} (such as {names[0]})"
            for difference, names in (
                ("are missing", missing),
                ("belong to another model", unexpected),
                ("have another shape", reshaped),
            )
            if names
        ]
        raise CheckpointError(
            f"{folder} does not fit this model: of its parameters {', '.join(differences)}; use another checkpoint"
        )


def require_finite(tensors: "Mapping[str, torch.Tensor]", source: object) -> None:
    """Raise CheckpointError if any of these values is NaN or infinite; a collective where they are shards."""
    from torch.distributed.tensor import DTensor

    from glmtuner.distributed import ranks
    from glmtuner.models.load import is_finite

    own = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    spoiled = [name for name, value in own.items() if not is_finite(value)]
    if any(isinstance(value, DTensor) for value in tensors.values()):
        spoiled = sorted({name for names in ranks.all_gather(spoiled) for name in names})
    if spoiled:
        raise CheckpointError(
            f"{source} holds values that are NaN or infinite, in {len(spoiled)} of {len(tensors)} tensors (such as "
            f"{spoiled[0]}); nothing can be computed with them, use another checkpoint"
        )


def load_model_folder(model: "PreTrainedModel", folder: Path) -> None:
    """Copy the weights of a transformers folder into the model; raises CheckpointError."""
    assign(own_parameters(model), weights_in(folder, model), folder)


def differing(model: "PreTrainedModel", folder: Path) -> list[str]:
    """The model's parameters that a transformers folder holds with other values, bit by bit; raises CheckpointError.

    The model stays as it is.
    """
    parameters, saved = own_parameters(model), weights_in(folder, model)
    check_fit(parameters, saved, folder)
    require_finite(saved, folder)
    return [name for name, value in parameters.items() if not same_bits(value, saved[name])]


def misread(model: "nn.Module", restore: Callable[[], None]) -> list[str]:
    """The trained parameters that `restore` gives other values, bit by bit; the model stays as it is."""
    import torch

    before = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    try:
        restore()
        return [name for name, value in trained_parameters(model).items() if not same_bits(before[name], value)]
    finally:
        with torch.no_grad():
            for name, value in trained_parameters(model).items():
                value.copy_(before[name])


def same_bits(value: "torch.Tensor", saved: "torch.Tensor") -> bool:
    """Whether a saved value, cast to the dtype of the other one, has the same bits."""
    import torch

    one, other = (
        each.detach().cpu().to(value.dtype).contiguous().flatten().view(torch.uint8) for each in (value, saved)
    )
    return torch.equal(one, other)


def weights_in(folder: Path, model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    """The values of a transformers folder by the names of the model's parameters, on the CPU; raises CheckpointError.

    Where transformers renames, stacks or transposes this model's weights on disk, they are loaded by its `from_pretrained`, in
    float32; elsewhere they are read as they are.
    """
    if not is_converted(model):
        saved, names = load_folder(folder), own_parameters(model).keys()
        return {name: value for name, value in saved.items() if name in names}
    import torch

    loaded, info = loaded_as(model, folder, torch.float32)
    left_out = {*info["missing_keys"]}
    return {name: value.detach() for name, value in own_parameters(loaded).items() if name not in left_out}


def is_converted(model: "PreTrainedModel") -> bool:
    """Whether transformers stores weights of this model under other names, or in other shapes, than the model holds them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # those of the class, and those by which this very model was loaded
    known = get_model_conversion_mapping(model, add_legacy=False)
    return bool(known or getattr(model, "_weight_conversions", None))


def loaded_as(model: "PreTrainedModel", folder: Path, dtype: "torch.dtype") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """A model of the same class with a folder's weights, and what transformers says about them; raises CheckpointError."""
    from torch.distributed.fsdp import FSDPModule

    plain: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = plain.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({reason}); use another checkpoint") from None
    return loaded


@contextmanager
def gathered(model: "nn.Module", everything: bool, beginning: str = "") -> Iterator[None]:
    """While this lasts, rank 0 has full parameters on the CPU in place of its shards, and can save them.

    The trained ones, or all if `everything`, whose names begin with `beginning`. A collective: every rank must enter it. A model that
    is not sharded stays as it is.
    """
    from torch import nn

    full = {
        shard: nn.Parameter(value, shard.requires_grad)
        for shard, value in full_parameters(model, everything, beginning).items()
    }
    replaced = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)  # tied ones stay tied
        if parameter in full
    ]
    for module, name, shard in replaced:
        module.register_parameter(name, full[shard])
    try:
        yield
    finally:
        for module, name, shard in replaced:
            module.register_parameter(name, shard)


def full_parameters(model: "nn.Module", everything: bool, beginning: str = "") -> "dict[nn.Parameter, torch.Tensor]":
    """Shard -> the full parameter on the CPU, for the trained parameters of a sharded model, or all; on rank 0 only.

    They are gathered one after the other. A collective: every rank must call it.
    """
    from glmtuner.distributed import ranks
    from glmtuner.distributed.shards import is_sharded, whole

    full: dict[nn.Parameter, torch.Tensor] = {}
    if not is_sharded(model):
        return full
    for name, parameter in model.named_parameters():
        if name.startswith(beginning) and (everything or parameter.requires_grad):
            value = whole(parameter)
            if ranks.is_main():
                full[parameter] = value.cpu()
    return full
