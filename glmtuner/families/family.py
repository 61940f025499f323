"""What a model family is: the paths of its layers, the names of its linear layers, its template and stop tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; `layers`, `mlp` and `attention_block` are module paths, `attention` and `other_linears` names of linear layers."""

    name: str
    model_types: tuple[str, ...]  # model_type in config.json
    layers: str  # the list of blocks, from the causal LM down
    more_layers: tuple[str, ...] = ()  # further lists of blocks
    attention_block: str  # inside a block
    mlp: str  # inside a block; "" if it has no module of its own
    attention: tuple[str, ...]  # the query, key and value projections
    lora_targets: tuple[str, ...] = ()  # LoRA's default targets, where they are not these projections
    other_linears: tuple[str, ...]  # the block's remaining linear layers
    experts: tuple[str, ...] = ()  # the layers of routed experts, by the names that PEFT adapts them; not part of `all`
    left_out: Mapping[str, str] = field(default_factory=dict, hash=False)  # linear layers that `all` leaves out -> why
    towers: tuple[str, ...] = ()  # modules that text alone does not reach, which stay as they are
    template: str
    stop_tokens: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda config: (
        True
    )  # which config.json, among families of one model type
    interpolates: bool = False  # does rope_ratio divide the positions? (others multiply the rotary base by it)
    wide_prefix: bool = False  # is P-tuning's embedding as wide as the output of its projection? (in ChatGLM2 it is)

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of all linear layers in a block."""
        return (*self.attention, *self.other_linears)

    def blocks(self, model: "nn.Module") -> "list[nn.Module]":
        """The model's blocks, first to last."""
        return [block for path in (self.layers, *self.more_layers) for block in _block_list(model, path)]

    def is_in_blocks(self, path: str) -> bool:
        """Whether the module at a path of the model is inside of a block."""
        return path.startswith(tuple(f"{layers}." for layers in (self.layers, *self.more_layers)))

    def attention_in(self, block: "nn.Module") -> "nn.Module | None":
        """A block's attention; None in a block without."""
        return block.get_submodule(self.attention_block)

    def projections_in(self, block: "nn.Module") -> "list[nn.Module]":
        """A block's projections of queries, keys and values; empty in a block without attention."""
        attention = block.get_submodule(self.attention_block)
        return [module for path, module in attention.named_modules() if path.rpartition(".")[2] in self.attention]

    def frozen_linears(self, model: "nn.Module") -> dict[str, str]:
        """Path -> reason, for linear layers of the blocks that are adapted only by their own names, or never."""
        from torch import nn

        return {
            path: self.left_out[path.rpartition(".")[2]]
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in self.left_out and isinstance(module, nn.Linear) and self.is_in_blocks(path)
        }

    def mlps_in(self, block: "nn.Module") -> "list[nn.Module]":
        """A block's MLPs; empty in a block without."""
        return [block.get_submodule(self.mlp)] if self.mlp else []


def _block_list(model: "nn.Module", path: str) -> "nn.ModuleList":
    from torch import nn

    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # as in DeepSeek-V2
UNTRAINED = "training on text gives it no gradient"
READ = "auto"  # the name of a family that is read off the model's modules
ROUTES = "it routes tokens to experts, so it is adapted only by its name"  # why `all` leaves a layer out
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family under its name."""
    FAMILIES[family.name] = family
    return family


def family_named(name: str) -> Family:
    """The family with this name; raises UnknownName."""
    if name not in FAMILIES:
        raise UnknownName("model family", name, [*FAMILIES, "auto"], add_one="glmtuner/families/<family>.py")
    return FAMILIES[name]


def families_that_fit(model_config: Mapping[str, Any]) -> list[Family]:
    """The families that this config.json fits."""
    model_type = model_config.get("model_type", "")
    return [family for family in FAMILIES.values() if model_type in family.model_types and family.fits(model_config)]


def family_of(model_config: Mapping[str, Any], declared: str) -> Family | None:
    """The family of a config.json: the declared one if several fit, None for an unknown model type.

    It is never inferred from a token id or a name: a folder named chatglm may hold anything. Raises ConfigError if families
    that fit would compute differently.
    """
    fitting = families_that_fit(model_config)
    if declared in {family.name for family in fitting}:
        return FAMILIES[declared]
    is_scaled = model_config.get("rope_ratio", 1) != 1 and "rope_interpolation" not in model_config
    if is_scaled and len({family.interpolates for family in fitting}) > 1:
        names = " or ".join(family.name for family in fitting)
        raise ConfigError(
            f"model.family={declared}: config.json has rope_ratio={model_config['rope_ratio']}, which {names} use "
            f"differently; type model.family={names}"
        )
    return fitting[0] if fitting else None
