"""The optimizer of a training: transformers' own, Muon and Adam-mini, and the learning rate of each parameter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glmtuner.config.groups import Finetuning
from glmtuner.config.groups import Trainer as TrainerConfig
from glmtuner.config.optimizers import APOLLO, GALORE, SCHEDULE_FREE, optimizer_arguments
from glmtuner.errors import ConfigError
from glmtuner.finetuning.trained import VALUE_HEAD
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from transformers import TrainingArguments

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Optimizers:
    """Makes the optimizer of a run: trainer.optim, with the rates of the method and of the layers."""

    config: TrainerConfig
    finetuning: Finetuning
    blocks: Callable[[], Sequence[nn.Module]] = tuple  # the model's, asked for when it is sharded

    def create(
        self,
        model: nn.Module,
        arguments: "TrainingArguments",
        decaying: Iterable[str],
        transformers_own: Callable[[], torch.optim.Optimizer],
    ) -> torch.optim.Optimizer:
        """The optimizer of the model's trained parameters; those named in `decaying` have the weight decay.

        `transformers_own` makes the one that transformers makes for these arguments. Raises ConfigError.
        """
        name, groups = self.config.optim.value, grouped(model, {*decaying}, arguments.weight_decay)
        if name == "muon":
            optimizer = muon(self.config, model, groups)
        elif name == "adam_mini":
            optimizer = adam_mini(self.config, model, groups)
        elif name in (*GALORE, *APOLLO):
            optimizer = projected(self.config, arguments, model, groups)
        else:
            optimizer = transformers_own()
        rates = self.rates(model)
        if rates:
            split_by_rate(optimizer, rates, self.config.learning_rate)
        return optimizer

    def rates(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """The learning rates of the trained parameters; empty if all have trainer.learning_rate."""
        rate, decay = self.config.learning_rate, self.config.layerwise_lr_decay
        rates = self.finetuning.learning_rates(model, rate)
        if decay is None and not rates:
            return {}
        factors = layer_factors(model, self.blocks(), decay or 1.0)
        return {
            value: rates.get(value, rate) * factors.get(value, 1.0)
            for value in model.parameters()
            if value.requires_grad
        }


def grouped(model: nn.Module, decaying: set[str], weight_decay: float) -> Groups:
    """The trained parameters in transformers' two groups: those with weight decay, and those without."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    return [
        {"params": [value for name, value in named if name in decaying], "weight_decay": weight_decay},
        {"params": [value for name, value in named if name not in decaying], "weight_decay": 0.0},
    ]


def layer_factors(model: nn.Module, blocks: Sequence[nn.Module], decay: float) -> dict[nn.Parameter, float]:
    """The factor of each parameter's rate: decay^(L + 1 - l) in block l of L, counted from 1, and 0 for embeddings; 1 above.

    Discriminative rates (Howard and Ruder 2018, arXiv:1801.06146), as ELECTRA's (Clark et al. 2020, arXiv:2003.10555).
    """
    last = len(blocks) + 1
    depths = {value: layer for layer, block in enumerate(blocks, 1) for value in block.parameters()}
    for module in unwrapped(model).modules():
        if isinstance(module, nn.Embedding):
            depths |= {value: 0 for value in module.parameters() if value not in depths}
    return {value: decay ** (last - depths.get(value, last)) for value in model.parameters()}


def split_by_rate(optimizer: torch.optim.Optimizer, rates: Mapping[nn.Parameter, float], base: float) -> None:
    """Split the groups of an optimizer that has taken no step, so that each parameter has its rate.

    The groups with the `base` rate come first, then those with larger rates: transformers logs the rate of the first group.
    """
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for value in group["params"]:
            rate = rates.get(value, group["lr"])
            groups.setdefault((index, rate), {**group, "params": [], "lr": rate})["params"].append(value)
    ordered = sorted(groups, key=lambda key: (key[1] != base, -key[1], key[0]))
    optimizer.param_groups[:] = [groups[key] for key in ordered]


def muon(config: TrainerConfig, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    """Muon for the weights of linear layers but the output head, AdamW for embeddings, the head, norms and biases."""
    from glmtuner.training.muon import MuonWithAdamW

    matrices = {value for path, value in matrices_of(model) if path.split(".")[0] != VALUE_HEAD}
    given = optimizer_arguments(config.optim_args)
    arguments: dict[str, Any] = {"adjust_lr_fn": given.get("adjust_lr_fn", "match_rms_adamw")}
    if "momentum" in given:
        arguments["momentum"] = float(given["momentum"])
    if "ns_steps" in given:
        arguments["ns_steps"] = int(given["ns_steps"])
    if "nesterov" in given:
        arguments["nesterov"] = given["nesterov"].lower() in ("true", "1", "yes")
    parts = [
        [{**group, "params": [value for value in group["params"] if (value in matrices) is wanted]} for group in groups]
        for wanted in (True, False)
    ]
    return MuonWithAdamW(
        *parts,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        **arguments,
    )


def matrices_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, weight) of each trained linear layer but the output head; a LoRA layer has two."""
    head = unwrapped(model).get_output_embeddings() if hasattr(unwrapped(model), "get_output_embeddings") else None
    tied = {value for module in model.modules() if isinstance(module, nn.Embedding) for value in module.parameters()}
    of_head = {*head.parameters()} if isinstance(head, nn.Module) else set()
    found = [
        (f"{path}.weight", module._parameters["weight"])
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return [
        (path, value)
        for path, value in found
        if value is not None and value.requires_grad and value not in tied | of_head
    ]


QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight")


def adam_mini(config: TrainerConfig, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    """Adam-mini (Zhang et al. 2024, arXiv:2406.16793): a second moment for each head of queries and keys, and each row else.

    Its package reads the blocks off the parameters' names, which it knows for Llama alone; here the modules tell: full
    `q_proj` and `k_proj` weights go by head, vectors as in Adam, and every other matrix by row, LoRA's too.
    """
    from importlib import import_module

    sizes: Any = unwrapped(model).config.get_text_config() if hasattr(unwrapped(model), "config") else None
    width, heads = getattr(sizes, "hidden_size", 1), getattr(sizes, "num_attention_heads", 1)
    by_head = {
        value
        for path, value in matrices_of(model)
        if path.endswith(QUERIES_AND_KEYS) and value.shape[1] == width and value.numel() % (width * width // heads) == 0
    }
    named: list[tuple[str, nn.Parameter]] = []
    decays: list[float] = []
    for group in groups:
        for value in group["params"]:
            kind = "query" if value in by_head else "mlp" if value.ndim == 2 else "bias"
            named.append((f"{kind}.{len(named)}", value))
            decays.append(group["weight_decay"])
    optimizer: torch.optim.Optimizer = import_module("adam_mini").Adam_mini(
        named, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        dim=width, n_heads=heads, verbose=False,
    )  # fmt: skip
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    vars(optimizer).pop("named_parameters")  # a second list of all parameters
    return optimizer


def projected(
    config: TrainerConfig, arguments: "TrainingArguments", model: nn.Module, groups: Groups
) -> torch.optim.Optimizer:
    """GaLore (arXiv:2403.03507) or APOLLO (arXiv:2412.05270) with transformers' arguments, of the trained parameters alone.

    transformers lists frozen parameters, too, and leaves out the weight decay.
    """
    from transformers import Trainer

    try:
        made, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]  # any module will do
    except ValueError as error:
        raise ConfigError(
            f"trainer.optim={config.optim.value} with trainer.optim_target_modules={config.optim_target_modules}: "
            f"{' '.join(str(error).split())}; type trainer.optim_target_modules=all-linear"
        ) from None
    parts: Groups = keywords.pop("params")
    members = [{*part.pop("params")} for part in parts]
    split = [
        {**part, **group, "params": [value for value in group["params"] if value in own]}
        for part, own in zip(parts, members, strict=True)
        for group in groups
    ]
    if not any(group["params"] for group in split if "rank" in group):
        raise ConfigError(
            f"trainer.optim={config.optim.value} with trainer.optim_target_modules={config.optim_target_modules}: none of these "
            "layers is trained; type trainer.optim_target_modules=all-linear"
        )
    optimizer: torch.optim.Optimizer = made([group for group in split if group["params"]], **keywords)
    optimizer.register_state_dict_post_hook(without_projectors)
    optimizer.register_load_state_dict_pre_hook(with_projectors)
    return optimizer


PROJECTOR, KIND = "projector", "class"


def without_projectors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state whose projectors, objects of the optimizer's package, are dictionaries, which load without unpickling code."""
    state = {
        index: {**own, PROJECTOR: {**vars(own[PROJECTOR]), KIND: type(own[PROJECTOR]).__name__}}
        if PROJECTOR in own
        else own
        for index, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def with_projectors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with the objects that `without_projectors` took out."""
    package = type(optimizer).__module__.partition(".")[0]
    state = {
        index: {**own, PROJECTOR: projector(package, own[PROJECTOR])} if isinstance(own.get(PROJECTOR), dict) else own
        for index, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def projector(package: str, values: Mapping[str, Any]) -> Any:
    """The package's projector with these values; raises KeyError for a class that it does not have."""
    from importlib import import_module

    places = {"GaLoreProjector": ("galore_projector", "svd_projector"), "GradientProjector": ("random_projector",)}
    for module in places[values[KIND]]:
        try:
            made = getattr(import_module(f"{package}.{module}"), values[KIND])(values["rank"])
        except ModuleNotFoundError:
            continue
        vars(made).update({name: value for name, value in values.items() if name != KIND})
        return made
    raise KeyError(values[KIND])


def warm_up(optimizer: torch.optim.Optimizer, name: str, steps: int) -> None:
    """Give a schedule-free optimizer its warm-up in steps; transformers passes a share of all steps on as a number of steps."""
    if name in SCHEDULE_FREE:
        for group in optimizer.param_groups:
            if "warmup_steps" in group:
                group["warmup_steps"] = steps


def tried(config: TrainerConfig, layer: nn.Linear, arguments: "TrainingArguments") -> torch.optim.Optimizer:
    """The optimizer on one layer, whatever layers of the real model it projects."""
    from transformers import Trainer

    model = nn.Sequential(layer)
    if config.optim.value in (*GALORE, *APOLLO):
        target = arguments.optim_target_modules
        arguments.optim_target_modules = "all-linear"
        try:
            return projected(config, arguments, model, grouped(model, {"0.weight"}, arguments.weight_decay))
        finally:
            arguments.optim_target_modules = target

    def transformers_own() -> torch.optim.Optimizer:
        made, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
        optimizer: torch.optim.Optimizer = made(model.parameters(), **keywords)
        return optimizer

    return Optimizers(config, Finetuning(finetuning_type="none")).create(
        model, arguments, ["0.weight"], transformers_own
    )
