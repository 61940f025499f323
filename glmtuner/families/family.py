"""What a model family is: where its layers are, what its linear layers are called, how it is prompted, when it stops."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; `layers`, `mlp` and `attention_block` are module paths, the rest are names of linear layers."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    layers: str  # the list of blocks, from the causal LM down
    attention_block: str  # inside a block
    mlp: str  # inside a block; empty where it has no module of its own
    attention: tuple[str, ...]  # the query, key and value projections: LoRA's default targets
    other_linears: tuple[str, ...]  # the block's remaining linear layers
    template: str
    stop_tokens: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda config: (
        True
    )  # among families of one model type: what config.json has
    interpolates: bool = False  # does rope_ratio divide positions, where others multiply the rotary base by it?
    wide_prefix: bool = False  # does P-tuning's projection start from as many numbers as it ends in? (ChatGLM2 does)

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.attention, *self.other_linears)

    def blocks(self, model: "nn.Module") -> "list[nn.Module]":
        """The model's blocks, first to last."""
        return list(model.get_submodule(self.layers))


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known under its name."""
    FAMILIES[family.name] = family
    return family


def family_named(name: str) -> Family:
    """The family of that name; raises UnknownName."""
    if name not in FAMILIES:
        raise UnknownName("model family", name, [*FAMILIES, "auto"], add_one="glmtuner/families/<family>.py")
    return FAMILIES[name]


def families_that_fit(model_config: Mapping[str, Any]) -> list[Family]:
    """The families that config.json may mean."""
    model_type = model_config.get("model_type", "")
    return [family for family in FAMILIES.values() if model_type in family.model_types and family.fits(model_config)]


def family_of(model_config: Mapping[str, Any], declared: str) -> Family | None:
    """The family that config.json tells; the declared one where several would fit; None for an unknown type.

    Never told by a token id or a name: a folder called chatglm may hold anything. Raises ConfigError where families that
    fit would compute differently.
    """
    fitting = families_that_fit(model_config)
    if declared in {family.name for family in fitting}:
        return FAMILIES[declared]
    stretched = model_config.get("rope_ratio", 1) != 1 and "rope_interpolation" not in model_config
    if stretched and len({family.interpolates for family in fitting}) > 1:
        names = " or ".join(family.name for family in fitting)
        raise ConfigError(
            f"model.family={declared}: config.json has rope_ratio={model_config['rope_ratio']}, which {names} read "
            f"differently; type model.family={names}"
        )
    return fitting[0] if fitting else None


# What attention and MLP blocks, and their projections, are called across transformers.
_ATTENTION_BLOCKS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv", "query", "key", "value")


def family_from_structure(model: "nn.Module") -> Family:
    """The family of a model that no file here knows, read off its modules; raises ConfigError where it cannot be."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 3
    ]
    if not lists:
        raise ConfigError(
            f"model.family=auto: no list of {count} blocks in {type(model).__name__}; "
            "declare the family in glmtuner/families/<family>.py and name it with model.family="
        )
    block = model.get_submodule(lists[0])[0]
    linear = {
        path: path.rpartition(".")[2]
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    children = dict(block.named_children())
    attention_block = next((name for name in _ATTENTION_BLOCKS if name in children), "")
    mlp = next((name for name in _MLPS if name in children), "")
    attention = [name for name in dict.fromkeys(linear.values()) if name in _ATTENTION]
    if not (attention_block and attention):
        raise ConfigError(
            f"model.family=auto: cannot tell the attention of {type(model).__name__}'s blocks "
            f"({', '.join(children)}); declare the family in glmtuner/families/<family>.py and name it with model.family="
        )
    return Family(
        name="auto",
        model_types=(model.config.model_type,),
        layers=lists[0],
        attention_block=attention_block,
        mlp=mlp,
        attention=tuple(attention),
        other_linears=tuple(dict.fromkeys(name for name in linear.values() if name not in attention)),
        template="tokenizer",
    )
