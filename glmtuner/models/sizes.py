"""How many numbers a model's parameters stand for, and how many of them compute a token: in a mixture of experts not all."""

import math
from typing import TYPE_CHECKING, Any

from glmtuner.families.experts import expert_parameters
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

SCALES = "scales"  # the parameter of a quantized layer's scales, where they are sharded as the weights are
# Of config.json: the experts that compute a token, the experts of a block, and those that compute nothing.
EXPERTS_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EMPTY_EXPERTS = ("zero_expert_num",)


def size_of(parameter: "torch.Tensor") -> int:
    """The parameter's number of elements, packed (int4) or not.

    Of packed experts it knows nothing: see `sizes_of`.
    """
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def sizes_of(model: "nn.Module") -> "dict[torch.Tensor, int]":
    """The number of elements of each parameter, packed or not."""
    sizes: dict[torch.Tensor, int] = {parameter: size_of(parameter) for parameter in model.parameters()}
    for module in model.modules():
        for steps in getattr(module, "parametrizations", {}).values():
            states = [state for step in steps if (state := getattr(step, "state", None)) is not None]
            if states:  # of a 4-bit value
                sizes[steps.original] = math.prod(states[0].shape)
        scales = module._parameters.get(SCALES)
        if scales is not None and not scales.requires_grad:  # of a quantized value that is sharded
            sizes[scales] = 0
            weight = module._parameters.get("weight")
            if weight is not None and (state := getattr(module, "quant_state", None)) is not None:
                sizes[weight] = math.prod(state.shape)
    return sizes


def parameter_count(model: "nn.Module", *, trained: bool = False) -> int:
    """The number of all elements of the parameters, or of the trained ones; those of other ranks' shards included."""
    return sum(size for value, size in sizes_of(model).items() if value.requires_grad or not trained)


def routed_shares(model: "nn.Module") -> dict[str, float] | None:
    """Path of a module that holds routed experts -> the share of its experts that computes a token.

    Empty without experts, None where the config does not tell. Paths are those without adapters.
    """
    base: Any = unwrapped(model)
    owners = {plain_path(path).rpartition(".")[0] for path in expert_parameters(base)}
    config = base.config.get_text_config()
    if not owners:
        return None if max((_number(config, name) for name in EXPERTS), default=0) > 1 else {}
    if any(_number(config, name) for name in EMPTY_EXPERTS):
        return None  # how many of a token's experts are real ones depends on the token
    shares: dict[str, float] = {}
    for path, module in base.named_modules():
        plain = plain_path(path)
        if plain in owners and plain not in shares:
            count = getattr(module, "num_experts", None) or max(_number(config, name) for name in EXPERTS)
            chosen = max(_number(config, name) for name in EXPERTS_A_TOKEN)
            if not count or not chosen:
                return None
            shares[plain] = min(chosen / count, 1.0)
    return shares


def _number(config: Any, name: str) -> int:
    """A number of config.json, also where it stands in a part of it; the largest of a list, 0 if there is none."""
    values = [getattr(part, name, None) for part in (config, getattr(config, "ffn_config", None))]
    numbers = [max(value) if isinstance(value, list) and value else value for value in values]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def plain_path(path: str) -> str:
    """The path of a module or parameter without the layers that PEFT puts around."""
    return path.replace(".base_layer", "").removeprefix("base_model.model.")


def share_of(name: str, shares: dict[str, float]) -> float:
    """The share of a parameter that computes a token, by its path."""
    plain = plain_path(name)
    while plain and plain not in shares:
        plain = plain.rpartition(".")[0]
    return shares.get(plain, 1.0)


def active_parameters(model: "nn.Module") -> int | None:
    """The number of parameters that compute a token, as the makers of GLM count them: without embeddings and output head.

    None where it is not known how many experts compute a token.
    """
    base: Any = unwrapped(model)
    shares, sizes = routed_shares(base), sizes_of(base)
    if shares is None:
        return None
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    left_out = {parameter for part in [*ends, *towers(base)] for parameter in part.parameters()}
    blocks = [(name, parameter) for name, parameter in base.named_parameters() if parameter not in left_out]
    return round(sum(sizes[parameter] * share_of(name, shares) for name, parameter in blocks))


def active_summary(model: "nn.Module") -> str | None:
    """The number of active parameters as one phrase; None without experts, where all parameters compute every token."""
    if routed_shares(model) == {}:
        return None
    active = active_parameters(model)
    if active is None:
        return "unknown, since config.json does not say how many experts compute a token"
    return f"{active:,} a token, without embeddings and output head"


def towers(base: Any) -> "list[nn.Module]":
    """The parts of a model for images and sound, which text does not pass through."""
    if base.config.get_text_config() is base.config:
        return []
    parts = [part for part in (base.get_decoder(), base.get_output_embeddings()) if part is not None]
    used = {module for part in parts for module in part.modules()}
    around = {module for module in base.modules() if not used.isdisjoint(module.modules())}
    return [module for module in base.modules() if module not in used | around]
