"""The state of an optimizer in a checkpoint: in shards that any number of ranks reads, or in one file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from glmtuner.distributed.shard_files import has_shards, read, shapes_in
from glmtuner.errors import CheckpointError

BEGINNING = "optimizer."
FILE = "optimizer.pt"
LAYOUT = "in_shards"  # in that file: of each parameter, which of its values are in the shards


def state_in_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of the state, by names for the shards, and the rest of it, for a file: settings, and values that are no tensors.

    Raises CheckpointError where each rank of a sharded model has values of its own that are no shards, as bitsandbytes' optimizers do.
    """
    state = _state_of(model, optimizer)
    sharded = {name for name, value in model.named_parameters() if isinstance(value, DTensor)}
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}, LAYOUT: {}}
    for name, values in state["state"].items():
        for key, value in values.items():
            if name in sharded and (isinstance(value, dict) or (is_plain(value) and value.numel() > 1)):
                raise CheckpointError(
                    f"the optimizer keeps values of its own on each process ({name}: {key}), which a checkpoint of shards cannot hold; type "
                    "trainer.optim=adamw_torch, or trainer.save_only_model=true"
                )
            if isinstance(value, torch.Tensor):
                tensors[f"{BEGINNING}{name}.{key}"] = value
                rest[LAYOUT].setdefault(name, []).append(key)
            else:
                rest["state"].setdefault(name, {})[key] = value
    return tensors, rest


def is_plain(value: object) -> bool:
    """Whether it is a tensor that a rank holds whole."""
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


def _set_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, whole: bool) -> None:
    """Load a state by the names of the parameters; groups without any stay as they are, of which torch takes one at most."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups[:] = [group for group in groups if group["params"]]
    filled = [group for group in state["param_groups"] if group["params"]]
    options = StateDictOptions(full_state_dict=whole, ignore_frozen_params=True)
    set_optimizer_state_dict(model, optimizer, optim_state_dict={**state, "param_groups": filled}, options=options)
    loaded = iter(list(optimizer.param_groups))
    optimizer.param_groups[:] = [next(loaded) if group["params"] else group for group in groups]


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state by the names of the parameters; each rank's shards where the model is sharded."""
    return dict(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True)))


def read_file(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's optimizer.pt."""
    return dict(torch.load(checkpoint / FILE, map_location="cpu", weights_only=True, mmap=True))


def is_by_names(checkpoint: Path) -> bool:
    """Whether the state was saved by the names of the parameters, as that of a sharded model is; else they are numbered."""
    saved = read_file(checkpoint)
    return LAYOUT in saved or any(isinstance(key, str) for key in saved["state"])


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Give the optimizer the state of a checkpoint, whichever number of processes wrote it; a collective.

    Raises CheckpointError where it is of other parameters.
    """
    saved = read_file(checkpoint)
    if LAYOUT in saved:
        _load_shards(model, optimizer, saved, checkpoint)
        return
    named = (
        saved if all(isinstance(key, str) for key in saved["state"]) else by_names(saved, model, optimizer, checkpoint)
    )
    _set_state(model, optimizer, named, whole=True)


def _load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], checkpoint: Path) -> None:
    state = _state_of(model, optimizer)
    tensors = {
        f"{BEGINNING}{name}.{key}": value
        for name, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    found = {name for name in shapes_in(checkpoint) if name.startswith(BEGINNING)} if has_shards(checkpoint) else set()
    if different := sorted(tensors.keys() ^ found):
        raise CheckpointError(
            f"{checkpoint} holds the state of another optimizer, or of other parameters ({len(different)} differ, such as "
            f"{different[0].removeprefix(BEGINNING)}); use another checkpoint"
        )
    read(tensors, checkpoint)
    for name, values in saved["state"].items():
        state["state"].setdefault(name, {}).update(values)
    state["param_groups"] = saved["param_groups"]
    _set_state(model, optimizer, state, whole=False)


def by_names(
    saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> dict[str, Any]:
    """An optimizer's own state dictionary, which numbers the parameters in their order, by the names of the parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    count = sum(len(group["params"]) for group in saved["param_groups"])
    if count != len(order):
        raise CheckpointError(
            f"{checkpoint} holds the optimizer state of {count} parameters, and {len(order)} are trained here; use another checkpoint"
        )
    return {
        "state": {order[number]: values for number, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [order[number] for number in group["params"]]} for group in saved["param_groups"]
        ],
    }
