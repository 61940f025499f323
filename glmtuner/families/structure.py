"""A family read off a model's modules: where its language model is, and what attention, MLP and router are in each block.

Blocks differ in hybrids, of which some have attention and others a recurrent state, so all of them are read. What only other
inputs than text reach is left out: towers for images and sound, cross-attention, and selectors of tokens, which get no gradient.
"""

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.families.experts import expert_names, router_names
from glmtuner.families.family import READ, ROUTES, UNTRAINED, Family

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What transformers calls modules: attention, MLPs, and parts of a block that text alone does not train.
ATTENTION_BLOCKS = ("self_attn", "self_attention", "attention", "attn")
MLPS = {"mlp", "mlps", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "shared_mlp", "mlp_block"}
UNREACHED = {"encoder_attn", "cross_attn", "crossattention", "cross_attention", "indexer"}
# The projections of queries, keys and values: one by one or fused, latent (DeepSeek), and of linear attention.
PROJECTION = re.compile(
    r"(q|k|v|qk|kv|qkv)_proj|[qk]v?_[ab]_proj(_with_mqa)?|q_gate_proj|v_proj_(current|delayed)|(query|key|value)(_proj)?"
    r"|query_key(_value)?|receptance|c_attn|[Ww]_?(q|k|v|qkv|pack)|project_[qkv]|[qkv]_lin|[qkv]|in_proj_qkvz?"
)
STATE_INPUT = re.compile(r"in_proj(_\w+)?|x_proj|linear_[xy]")  # of recurrent states
PAST_ADAPTER = "has code that multiplies by its weight itself, past an adapter"
WRAPPED = re.compile(r"\d+|linear")  # a linear layer of this name is called like the module that it is in


@dataclass(frozen=True, kw_only=True)
class ReadFamily(Family):
    """A family without names of its own for the parts of a block: each block is read."""

    routers: frozenset[str] = frozenset()  # names of the modules that route tokens to experts

    def frozen_linears(self, model: "nn.Module") -> dict[str, str]:
        found: dict[str, str] = {}
        for path in (self.layers, *self.more_layers):
            for index, block in enumerate(list_at(model, path)):
                found |= {f"{path}.{index}.{inner}": why for inner, why in frozen_in(block, self.routers).items()}
        return found

    def attention_in(self, block: "nn.Module") -> "nn.Module | None":
        owners = dict.fromkeys(path.rpartition(".")[0] for path in projections(block))
        known = [path for path in owners if path.split(".")[0] in ATTENTION_BLOCKS]
        return next((block.get_submodule(path) for path in (*known, *owners)), None)

    def projections_in(self, block: "nn.Module") -> "list[nn.Module]":
        return [block.get_submodule(path) for path in projections(block)]

    def mlps_in(self, block: "nn.Module") -> "list[nn.Module]":
        return [block.get_submodule(path) for path in mlps(block)]


def family_from_structure(model: "PreTrainedModel") -> Family:
    """A family for a model without one, read off its modules; raises ConfigError for a model without a list of blocks."""
    decoder = decoder_of(model)
    lists = block_lists(model, decoder)
    if not lists:
        raise ConfigError(
            f"model.family=auto: {type(model).__name__} has no list of blocks, so it is not known what its layers are; declare the "
            "family in glmtuner/families/<family>.py and name it with model.family="
        )
    blocks = [block for path in lists for block in list_at(model, path)]
    experts = expert_names(model)
    routers = frozenset(router_names(model) if experts else ())
    attention: dict[str, None] = {}
    states: dict[str, None] = {}
    linears: dict[str, None] = {}
    left_out: dict[str, str] = {}
    owners: dict[str, None] = {}
    first_mlp = ""
    for block in blocks:
        kept_out = frozen_in(block, routers)
        of_attention, of_mlps = projections(block), mlps(block)
        owners |= dict.fromkeys(path.rpartition(".")[0] for path in of_attention)
        first_mlp = first_mlp or next(iter(of_mlps), "")
        for path in linears_in(block):
            name = name_of(path)
            if path in kept_out:
                left_out[name] = kept_out[path]
            elif path in of_attention:
                attention[name] = None
            else:
                linears[name] = None
                if STATE_INPUT.fullmatch(name) and not is_below(path, of_mlps):
                    states[name] = None
    attention_block = next((path for path in owners if path.split(".")[0] in ATTENTION_BLOCKS), next(iter(owners), ""))
    names = {*attention, *linears}
    return ReadFamily(
        name=READ,
        model_types=(model.config.model_type,),
        layers=lists[0],
        more_layers=tuple(lists[1:]),
        attention_block=attention_block,
        mlp=first_mlp,
        attention=tuple(attention),
        other_linears=tuple(name for name in linears if name not in attention),
        left_out={name: why for name, why in left_out.items() if name not in names},
        experts=experts,
        routers=routers,
        lora_targets=published_targets(model.config, names) or tuple(attention or states),
        towers=towers_of(model, decoder, lists),
        template="tokenizer",
    )


def decoder_of(model: "nn.Module") -> "nn.Module":
    """The language model without its head, as the model itself names it; the model where it names none."""
    from torch import nn

    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    if isinstance(decoder, nn.Module) and any(isinstance(each, nn.ModuleList) for each in decoder.modules()):
        return decoder
    return model


def block_lists(model: "PreTrainedModel", decoder: "nn.Module") -> list[str]:
    """The paths of the language model's lists of blocks: the largest, and others of the same kinds of blocks."""
    from torch import nn

    try:
        count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    except ValueError:  # several texts
        count = None
    inside = {id(module) for module in decoder.modules()}
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        is_outer = id(module) in inside and not re.search(r"\.\d+\.", path)
        if isinstance(module, nn.ModuleList) and is_outer and any(list(block.children()) for block in module):
            sizes[path] = sum(each.numel() for each in module.parameters())
    counted = {path for path in sizes if len(list_at(model, path)) == count}
    if not sizes:
        return []
    largest = max(counted or sizes, key=lambda path: sizes[path])
    kinds = {type(block) for block in list_at(model, largest)}
    return [
        largest,
        *(path for path in sizes if path != largest and {type(block) for block in list_at(model, path)} <= kinds),
    ]


def list_at(model: "nn.Module", path: str) -> "nn.ModuleList":
    """The list of blocks at a path."""
    from torch import nn

    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def towers_of(model: "PreTrainedModel", decoder: "nn.Module", lists: list[str]) -> tuple[str, ...]:
    """The paths of the modules that text alone does not reach: whatever stands beside the language model and its head, and
    encoders inside of it."""
    from torch import nn

    head = model.get_output_embeddings()
    kept = {id(decoder), id(head)}
    kept |= {id(module) for path in lists for module in list_at(model, path).modules()}

    def is_tower(module: "nn.Module", inside: bool) -> bool:
        members = {id(each) for each in module.modules()}
        if members & kept or not any(True for _ in module.parameters()):
            return False
        if not inside:
            return True
        return not isinstance(module, nn.ModuleList) and any(
            isinstance(each, nn.ModuleList) and len(each) > 1 and all(list(block.children()) for block in each)
            for each in module.modules()
        )

    found: list[str] = []
    within = {id(module) for module in decoder.modules()}
    for path, module in model.named_modules():
        if path and not any(path.startswith(f"{tower}.") for tower in found) and id(module) not in kept:
            above = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
            on_the_way = any(each is decoder for each in above.modules())
            inside = id(module) in within
            if (on_the_way or inside) and is_tower(module, inside):
                found.append(path)
    return tuple(found)


def linears_in(block: "nn.Module") -> "dict[str, nn.Module]":
    """Path -> linear layer, for those of a block that text alone trains."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and UNREACHED.isdisjoint(path.split("."))
    }


def name_of(path: str) -> str:
    """The name by which PEFT finds a linear layer: the last part of its path, with the one before where that says nothing."""
    parts = path.split(".")
    first = next((index for index in range(len(parts) - 1, -1, -1) if not WRAPPED.fullmatch(parts[index])), 0)
    return ".".join(parts[first:])


def is_below(path: str, owners: "list[str] | tuple[str, ...]") -> bool:
    """Whether a path is one of these modules, or inside of one."""
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def frozen_in(block: "nn.Module", routers: frozenset[str]) -> dict[str, str]:
    """Path -> reason, for the linear layers of a block that are adapted only where their names are typed, or never."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found, bypassed = {}, read_directly(block)
    for path, module in block.named_modules():
        parts = path.split(".")
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if path in bypassed:
            found[path] = f"{bypassed[path]} {PAST_ADAPTER}"
        elif not UNREACHED.isdisjoint(parts):
            found[path] = UNTRAINED
        elif routers and (not routers.isdisjoint(parts) or "router" in parts):
            found[path] = ROUTES
    return found


def projections(block: "nn.Module") -> list[str]:
    """The paths of a block's projections of queries, keys and values; those of cross-attention are left out."""
    below = named_mlps(block)
    return [
        path
        for path in linears_in(block)
        if PROJECTION.fullmatch(name_of(path).split(".")[0]) and not is_below(path, below)
    ]


def named_mlps(block: "nn.Module") -> list[str]:
    """The paths of the outermost modules of a block that are called like an MLP."""
    found: list[str] = []
    for path, module in block.named_modules():
        parts = path.split(".")
        if (
            parts[-1] in MLPS
            and not is_below(path, found)
            and "norm" not in path
            and any(True for _ in module.parameters())
        ):
            found.append(path)
    return found


def mlps(block: "nn.Module") -> list[str]:
    """The paths of a block's MLPs: by their names or, without one, what is neither attention, nor a recurrent state, nor a norm."""
    if named := named_mlps(block):
        return named
    mixers = [path.rpartition(".")[0] for path in projections(block)] + state_mixers(block)
    found = linears_in(block)
    return [
        path
        for path, _ in block.named_children()
        if any(is_below(linear, [path]) for linear in found)
        and not any(is_below(mixer, [path]) or is_below(path, [mixer]) for mixer in mixers)
        and not any(path == mixer.split(".")[0] for mixer in mixers if mixer)
    ]


def state_mixers(block: "nn.Module") -> list[str]:
    """The paths of a block's modules with a recurrent state or a convolution over the text."""
    from torch import nn

    def is_mixer(module: "nn.Module") -> bool:
        return hasattr(module, "A_log") or any(isinstance(child, nn.Conv1d) for child in module.children())

    return [path for path, module in block.named_modules() if is_mixer(module)]


def read_directly(block: "nn.Module") -> dict[str, str]:
    """Path -> the class around it, for linear layers whose weight the code of a recurrent state reads in one of its ways.

    There, an adapter on the layer computes nothing.
    """
    found = linears_in(block)
    read: dict[str, str] = {}
    for owner in state_mixers(block):
        kind = type(block.get_submodule(owner))
        try:
            code = inspect.getsource(kind)
        except (OSError, TypeError):
            continue
        for name in re.findall(r"self\.(\w+)\.weight", code):
            path = f"{owner}.{name}" if owner else name
            if path in found:
                read[path] = kind.__name__
    return read


def published_targets(config: "PreTrainedConfig", names: set[str]) -> tuple[str, ...]:
    """The layers that PEFT adapts in this architecture if none are named, where this model has them; empty without an entry."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PUBLISHED

    for model_type in dict.fromkeys((config.get_text_config(decoder=True).model_type, config.model_type)):
        targets = PUBLISHED.get(model_type)
        if isinstance(targets, list) and {*targets} <= names:
            return tuple(targets)
    return ()
