"""Routed experts, as transformers holds them: all of a block in one parameter for each projection."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ALL_EXPERTS = "experts"  # in finetuning.lora_target


def is_experts(module: "nn.Module", name: str, dimensions: int) -> bool:
    """Whether a module's parameter of that name and number of dimensions holds the weights of several experts.

    A module is known by its class: `Glm4MoeExperts`, `JetMoeParallelExperts`, `DbrxExpertGLU`, whose weights have two dimensions.
    """
    kind = type(module).__name__
    if "bias" in name or "Expert" not in kind:
        return False
    return dimensions == 3 or (dimensions == 2 and kind.endswith("ExpertGLU"))


def expert_parameters(model: "nn.Module") -> dict[str, "nn.Parameter"]:
    """Path -> the parameter as it is stored, also where it is quantized."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        stored = {
            name: each for name, each in module.named_parameters(recurse=False) if is_experts(module, name, each.ndim)
        }
        for name, each in getattr(module, "parametrizations", {}).items():
            if is_experts(module, name, 3):
                stored[name] = each.original
        found |= {f"{path}.{name}": each for name, each in stored.items()}
    return found


def expert_names(model: "nn.Module") -> tuple[str, ...]:
    """The experts' names in finetuning.lora_target: `experts` for all, and those of the parameters; empty without experts."""
    names = sorted({short_name(path) for path in expert_parameters(model)})
    return (ALL_EXPERTS, *names) if names else ()


def short_name(path: str) -> str:
    """The last two parts of a parameter's path, such as experts.gate_up_proj."""
    return ".".join(path.split(".")[-2:])


def router_names(model: "nn.Module") -> set[str]:
    """The names of the modules that route tokens to experts, such as `gate`, and of the linear layers inside of them."""
    from torch import nn

    modules = dict(model.named_modules())
    blocks = {path.rsplit(".", 2)[0] for path in expert_parameters(model)}  # the owners of experts, and their routers
    routers = {
        path
        for path, module in modules.items()
        if "Router" in type(module).__name__
        or "Gating" in type(module).__name__
        or any(path == f"{block}.{name}" for block in blocks for name in ("gate", "router"))
    }
    inside = {
        path for path, module in modules.items() if isinstance(module, nn.Linear) and path.rpartition(".")[0] in routers
    }
    return {path.rpartition(".")[2] for path in routers | inside}
