"""Routed experts as targets of LoRA, by PEFT's `target_parameters`.

PEFT adapts a parameter by adding the update to its value for the time of a forward pass, which leaves no place for a dropout of
the update's input. In models that had one module an expert in transformers 4, PEFT reads gate_proj, up_proj and down_proj (in
Mixtral w1, w2 and w3) as the routed experts, whatever other layers have these names.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.families.experts import ALL_EXPERTS, expert_parameters, short_name

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True)
class Targets:
    """What `finetuning.lora_target` names: modules and parameters for PEFT, and linear layers that PEFT cannot adapt beside them."""

    modules: list[str]
    parameters: list[str]
    left_out: list[str]


def targets_of(model: "nn.Module", names: Sequence[str]) -> Targets:
    """The targets of these names, or paths; a name that only experts have, or that says so, is theirs."""
    from torch import nn

    modules, experts = dict(model.named_modules()), expert_parameters(model)
    claimed = names_of_experts(model) if experts else set()
    wanted: list[str] = []
    parameters: list[str] = []
    left_out: list[str] = []
    for name in names:
        if name == ALL_EXPERTS and experts:
            parameters += [short_name(path) for path in experts]
            continue
        matched = [path for path in modules if path == name or path.endswith(f".{name}")]
        own = [path for path in experts if path == name or path.endswith(f".{name}")]
        if own and not matched:
            parameters += [path if path == name else short_name(path) for path in own]
        elif matched and all(is_weight_alone(modules[path]) for path in matched):  # a router
            parameters.append(f"{name}.weight")
        else:
            wanted.append(name)
    if parameters and claimed:  # PEFT would take these for experts a second time
        taken = [name for name in wanted if name.rpartition(".")[2] in claimed]
        wanted = [name for name in wanted if name not in taken]
        for name in taken:
            paths = [path for path in modules if path == name or path.endswith(f".{name}")]
            plain = [path for path in paths if type(modules[path]) is nn.Linear]
            parameters += [f"{short_name(path)}.weight" for path in plain]
            left_out += [path for path in paths if path not in plain and isinstance(modules[path], nn.Linear)]
    return Targets(wanted, sorted({*parameters}), left_out)


def targets_matching(model: "nn.Module", pattern: str) -> Targets | None:
    """What a regular expression for whole paths matches; None where PEFT can be given the expression itself.

    Of an expression, PEFT keeps the last names alone in models of which it reads some as experts.
    """
    from torch import nn

    modules, experts = dict(model.named_modules()), expert_parameters(model)
    matches = re.compile(pattern).fullmatch
    parameters = [path for path in experts if matches(path)]
    parameters += [f"{path}.weight" for path, module in modules.items() if matches(path) and is_weight_alone(module)]
    claimed = names_of_experts(model) if experts else set()
    if not (claimed or parameters):
        return None
    layers = [path for path, module in modules.items() if matches(path) and isinstance(module, layer_kinds())]
    taken = [path for path in layers if path.rpartition(".")[2] in claimed]
    parameters += [f"{path}.weight" for path in taken if type(modules[path]) is nn.Linear]
    containers = {path.rpartition(".")[0] for path in experts}
    of_experts = [
        name for name in sorted(claimed - {"gate"}) if any(matches(f"{container}.{name}") for container in containers)
    ]
    return Targets(
        [path for path in layers if path not in taken] + of_experts,
        sorted({*parameters}),
        [path for path in taken if type(modules[path]) is not nn.Linear],
    )


def is_weight_alone(module: "nn.Module") -> bool:
    """Whether a module is no layer that PEFT knows, and computes with a matrix `weight` of its own, as most routers do."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, layer_kinds())


def layer_kinds() -> tuple[type, ...]:
    """The classes of layers that PEFT adapts as modules."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, Conv1D)


def names_of_experts(model: Any) -> set[str]:
    """The names of linear layers that PEFT reads as routed experts of this model, and as its router."""
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    return {*conversion._MOE_TARGET_MODULE_MAPPING.get(kind, {})}


def settle(config: "LoraConfig", model: Any) -> None:
    """Change PEFT's configuration to what PEFT will make of it for this model.

    Where parameters are adapted, the dropout is 0, which PEFT requires.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(config, model, None)
    if config.target_parameters:
        config.lora_dropout = 0.0


def is_parametrized(model: "nn.Module", path: str) -> bool:
    """Whether the parameter at this path is computed, from its quantized values for example."""
    owner, _, name = path.rpartition(".")
    return name in getattr(model.get_submodule(owner), "parametrizations", {})


def adapted_by_peft(model: Any, config: "LoraConfig") -> Any:
    """The model with PEFT's adapter of this configuration, also where experts are quantized.

    Of those PEFT would compute each several times in a forward pass, would not find its update again to remove it afterwards, and
    could use values that were computed before.
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    quantized = any(is_parametrized(model, path) for path in expert_parameters(model))
    if not (config.target_parameters and quantized):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lora with eva initialization")  # about the memory of larger batches
            return get_peft_model(model, config)
    from types import MethodType

    from glmtuner.models.quantized_experts import activated, as_plain_parameters, stored_in

    with as_plain_parameters(model):
        adapted = get_peft_model(model, config)
    for layer in adapted.modules():
        if isinstance(layer, ParamWrapper) and stored_in(layer.get_base_layer(), layer.parameter_name):
            layer._activate_lora = MethodType(activated, layer)  # type: ignore[method-assign]
    return adapted


def set_dropout(adapted: "nn.Module", dropout: float) -> None:
    """Give the adapted layers that have a place for it this dropout, and say that parameters have none."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from torch import nn

    layers = [each for each in adapted.modules() if isinstance(each, LoraLayer)]
    with_place = [each for each in layers if not isinstance(each, ParamWrapper)]
    for layer in with_place:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = nn.Dropout(dropout)
    if next(adapted.parameters()).is_meta:
        return  # it is said once, of the model with values
    others = f"holds for the {len(with_place)} other layers" if with_place else "has no effect"
    say(
        f"finetuning.lora_dropout={dropout:g} {others}: routed experts are adapted without dropout, and the adapter's own "
        "configuration says 0, as PEFT requires"
    )
