"""What a model family is: the paths of its layers, the names of its linear layers, its template and stop tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; `layers`, `mlp` and `attention_block` are module paths, `attention` and `other_linears` names of linear layers."""

    name: str
    model_types: tuple[str, ...]  # model_type in config.json
    layers: str  # the list of blocks, from the causal LM down
    attention_block: str  # inside a block
    mlp: str  # inside a block; "" if it has no module of its own
    attention: tuple[str, ...]  # the query, key and value projections: LoRA's default targets
    other_linears: tuple[str, ...]  # the block's remaining linear layers
    experts: tuple[str, ...] = ()  # the layers of routed experts, by the names that PEFT adapts them; not part of `all`
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
        return list(_block_list(model, self.layers))


def _block_list(model: "nn.Module", path: str) -> "nn.ModuleList":
    from torch import nn

    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


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


# The names of attention and MLP modules, and of their projections, in transformers.
_ATTENTION_BLOCKS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # as in DeepSeek-V2
_ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv", "query", "key", "value"),
    *LATENT_ATTENTION,
)


def family_from_structure(model: "PreTrainedModel") -> Family:
    """A family for a model without one, inferred from its modules; raises ConfigError if that is not possible."""
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
    block = _block_list(model, lists[0])[0]
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
            f"model.family=auto: no attention module recognised in {type(model).__name__}'s blocks "
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
