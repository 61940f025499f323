"""Which of a model's modules `finetuning.lora_target` means: names, ends of paths, or one regular expression for whole paths.

A name means the layers in the blocks of the language model, if it has any of that name; an end of a path (with a dot in it) and a
regular expression mean what they match anywhere. What text alone does not train is never adapted.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from glmtuner.config.groups import Finetuning, Model, ModelFamily
from glmtuner.console import say
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.families.family import ROUTES, UNTRAINED
from glmtuner.finetuning.experts import names_of_experts

if TYPE_CHECKING:
    from torch import nn


def check_attachment(method: Finetuning, model: Model, family: ModelFamily | None) -> None:
    """Raise ConfigError where the method does not fit the layers of the model, before its weights are read."""
    import torch

    from glmtuner.families.structure import family_from_structure
    from glmtuner.models.load import meta_model

    built = meta_model(model, family)  # type: ignore[arg-type]  # a Family is what the groups call ModelFamily
    if built is None:
        return
    family = family or family_from_structure(built)
    with torch.device("meta"):
        method.resolved(family, len(family.blocks(built))).attach(built, family)


def excluded_modules(
    model: "nn.Module",
    family: ModelFamily,
    names: Sequence[str],
    *,
    is_pattern: bool,
    knob: str = "finetuning.lora_target",
) -> str | None:
    """The regular expression of the modules that PEFT must leave out, among those that have the names; None if there are none.

    Raises ConfigError for a name of no module, and where a name or the pattern means only layers that would not be trained.
    """
    paths = [path for path, _ in model.named_modules() if path]
    towers = tuple(f"{tower}." for tower in family.towers)
    frozen = family.frozen_linears(model) | {path: UNTRAINED for path in paths if path.startswith(towers)}
    dead = {path: why for path, why in frozen.items() if why != ROUTES}
    asked = f"{knob}=[{','.join(names)}]"
    every: set[str] = set()
    wanted: set[str] = set()
    claimed = names_of_experts(model)
    for name in names:
        matched = [path for path in paths if (re.fullmatch(name, path) if is_pattern else is_named(path, name))]
        if not matched and not is_pattern and name.rpartition(".")[2] not in claimed:
            raise no_module_named(name, layers_of(model), family, names, knob)
        inside = [path for path in matched if family.is_in_blocks(path)]
        meant = inside if inside and "." not in name else matched
        alive = [path for path in meant if path not in dead]
        if meant and not alive:
            others = ", ".join(each for each in family.linears if each != name)
            raise ConfigError(
                f"{asked}: an adapter on {meant[0]} would learn nothing: {dead[meant[0]]}; name others: {others}"
            )
        every |= {*matched}
        wanted |= {*([path for path in alive if is_pattern or path not in frozen] or alive)}
    left_out = every - wanted
    idle = sorted(path for path in left_out if path in dead and (is_pattern or family.is_in_blocks(path)))
    if idle and not next(model.parameters()).is_meta:  # said once, of the model with values
        say(f"{asked} does not adapt {idle[0]}{f' and {len(idle) - 1} more' if len(idle) > 1 else ''}: {dead[idle[0]]}")
    return expression(left_out, wanted)


def is_named(path: str, name: str) -> bool:
    """Whether PEFT finds the module at this path by this name."""
    return path == name or path.endswith(f".{name}")


def expression(unwanted: Iterable[str], wanted: Iterable[str]) -> str | None:
    """A regular expression of all unwanted paths and no wanted one, short where blocks are alike; None without unwanted ones."""
    paths = sorted(unwanted)
    if not paths:
        return None
    short = "|".join(dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(path)) for path in paths))
    exact = not any(re.fullmatch(short, path) for path in wanted)
    return short if exact else "|".join(map(re.escape, paths))


def layers_of(model: "nn.Module") -> list[str]:
    """The names of the layers that LoRA can adapt, anywhere in the model."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return [*dict.fromkeys(path.rpartition(".")[2] for path, each in model.named_modules() if isinstance(each, kinds))]


def no_module_named(
    name: str, names: Sequence[str], family: ModelFamily, asked: Sequence[str], knob: str = "finetuning.lora_target"
) -> ConfigError:
    """The error of a target that no module has, with the nearest of `names`."""
    known = f"this model's blocks have {', '.join(family.linears)}; `all` selects all of them"
    known += f"; {', '.join(family.experts)} select the routed experts" if family.experts else ""
    return ConfigError(
        f"{knob}=[{','.join(asked)}]: no layer of this model is named {name!r}"
        f"{did_you_mean(name, (*names, *family.experts), known)}"
    )


def adapted_layers(model: "nn.Module") -> dict[str, int]:
    """Name -> how often it is adapted by PEFT, of layers and of parameters such as experts.down_proj."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            owner = re.sub(r"(\.base_layer)+$", "", path).rpartition(".")[2]
            found[f"{owner}.{module.parameter_name}"] += 1
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            parts = path.split(".")
            first = next((index for index in range(len(parts) - 1, -1, -1) if not parts[index].isdigit()), 0)
            found[".".join(parts[first:])] += 1
    return dict(found)


def adapted_ranks(model: "nn.Module") -> dict[int, int]:
    """Rank -> how many layers have a LoRA of it."""
    from peft.tuners.lora.layer import LoraLayer

    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return dict(sorted(Counter(rank for layer in layers for rank in layer.r.values()).items()))


def ranks_summary(ranks: Mapping[int, int]) -> str:
    """The ranks of `adapted_ranks` as one phrase."""
    counted = [f"{rank} in {count} layer{'s' * (count > 1)}" for rank, count in ranks.items()]
    return ", ".join([*counted, f"{sum(rank * count for rank, count in ranks.items())} in all"])
