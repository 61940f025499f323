"""Weights that no rank ever holds whole: each is read, and each rank keeps its share of it until the model is sharded.

Between the loading and the sharding a fine-tuning method is attached to the model, for which shapes, dtypes and devices matter, and
values do not. So the parameters are stand-ins meanwhile: one NaN, expanded to the weight's shape, with this rank's share beside it.
Whatever computes with the values of a stand-in gets NaN, and `computed_with_stand_ins` names it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import ranks

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

SHARE = "glmtuner_share"  # the attribute of a stand-in


@dataclass
class Share:
    """A rank's rows of a weight, as `fully_shard` distributes them: torch.chunk's, along the first dimension."""

    rows: "torch.Tensor"


def rows_of_rank(length: int, rank: int, count: int) -> slice:
    """The rows that a rank keeps of a weight of so many rows."""
    size = -(-length // count)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def share_of(value: "torch.Tensor") -> "torch.Tensor":
    """This rank's rows of a stand-in; any other tensor itself."""
    share = getattr(value, SHARE, None)
    return share.rows if share is not None else value


def is_stand_in(value: "torch.Tensor") -> bool:
    """Whether the values are elsewhere."""
    return hasattr(value, SHARE)


def cast(parameter: "nn.Parameter", dtype: "torch.dtype") -> None:
    """Give a parameter another dtype, in place; a stand-in takes no memory after it either."""
    if not is_stand_in(parameter):
        parameter.data = parameter.data.to(dtype)
        return
    parameter.data = expanded(parameter.shape, dtype, parameter.device)
    share = getattr(parameter, SHARE)
    share.rows = share.rows.to(dtype)


def copy_of(value: "torch.Tensor") -> "torch.Tensor | Share":
    """A copy that later changes of the parameter leave alone; of a stand-in, of this rank's rows."""
    if is_stand_in(value):
        return Share(share_of(value).clone())
    return value.detach().clone()


def expanded(shape: "torch.Size", dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """A tensor of NaN, or of integers that mean nothing, that takes the memory of one number."""
    import torch

    value = torch.nan if dtype.is_floating_point else 0
    return torch.full((1,) * len(shape), value, dtype=dtype, device=device).expand(shape)


def stand_in(parameter: "nn.Parameter") -> "nn.Parameter":
    """A parameter of the same class, shape, dtype and attributes that keeps this rank's rows alone."""
    import torch

    rows = parameter.data[rows_of_rank(parameter.shape[0], ranks.rank(), ranks.world_size())].clone()
    values = expanded(parameter.shape, parameter.dtype, parameter.device)
    made: nn.Parameter = torch.Tensor._make_subclass(type(parameter), values, parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    setattr(made, SHARE, Share(rows))
    return made


@contextmanager
def loading_shares() -> Iterator[None]:
    """Within this, transformers' `from_pretrained` leaves stand-ins in place of the weights that it reads, one after the other.

    A collective: every rank loads the same model. Every weight goes through transformers' conversions whole, so that the largest
    of them is the most that is held beside the shares.
    """
    import torch
    from transformers import core_model_loading, modeling_utils

    set_param, are_equal = core_model_loading.set_param_for_module, modeling_utils._tied_params_are_equal
    threads = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

    def keep_share(model: "PreTrainedModel", target_name: str, *others: Any, **further: Any) -> None:
        set_param(model, target_name, *others, **further)
        path, _, name = target_name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.get(name)
        if parameter is not None and not parameter.is_meta and parameter.is_floating_point() and parameter.dim():
            module._parameters[name] = stand_in(parameter)

    def shares_are_equal(source: "torch.Tensor", target: "torch.Tensor") -> bool:
        return all(ranks.all_gather(torch.equal(share_of(source), share_of(target))))

    core_model_loading.set_param_for_module = keep_share
    modeling_utils._tied_params_are_equal = shares_are_equal
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads read ahead of what has been cut
    try:
        yield
    finally:
        core_model_loading.set_param_for_module, modeling_utils._tied_params_are_equal = set_param, are_equal
        if threads is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = threads


def computed_with_stand_ins(model: "nn.Module", is_finite: "Callable[[torch.Tensor], bool]") -> list[str]:
    """The parameters that came after the loading and hold NaN, since stand-ins' values were used for them; the same on all ranks."""
    found = [name for name, value in model.named_parameters() if not is_stand_in(value) and not is_finite(value)]
    return sorted({name for names in ranks.all_gather(found) for name in names})


@dataclass
class Taken:
    """Shares of a model's weights, and where the weights belong; tied ones once, with each of their places."""

    places: "dict[int, list[tuple[nn.Module, str]]]"
    shares: dict[int, Share]

    def give_back(self, *, on_cpu: bool) -> None:
        """Put each share into the sharded parameter that has taken its weight's place, on that one's device or, offloaded, `on_cpu`."""
        from torch import nn
        from torch.distributed.tensor import DTensor

        for key, places in self.places.items():
            module, name = places[0]
            sharded = module._parameters[name]
            assert isinstance(sharded, DTensor)
            rows = self.shares.pop(key).rows
            assert rows.shape == sharded.to_local().shape, (name, rows.shape, sharded.to_local().shape)
            local = rows.to(sharded.dtype).to("cpu" if on_cpu else sharded.device_mesh.device_type)
            value = DTensor.from_local(
                local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
            )  # fmt: skip
            parameter = nn.Parameter(value, requires_grad=sharded.requires_grad)
            for each, attribute in places:
                each._parameters[attribute] = parameter


def take_shares(model: "nn.Module") -> Taken:
    """Replace the stand-ins by parameters on the meta device, which `fully_shard` leaves there."""
    import torch
    from torch import nn

    places: dict[int, list[tuple[nn.Module, str]]] = {}
    shares: dict[int, Share] = {}
    empty: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # as long as their ids are keys
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_stand_in(parameter):
                continue
            key = id(parameter)
            if key not in empty:
                kept.append(parameter)
                shares[key] = getattr(parameter, SHARE)
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                empty[key] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            places.setdefault(key, []).append((module, name))
            module._parameters[name] = empty[key]
    return Taken(places, shares)
