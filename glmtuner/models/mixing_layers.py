"""Which layers of a model let tokens see each other, and how: by transformers' AttentionInterface, or through a state.

Recurrent are state-space layers, linear attention and short convolutions.
"""

import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any

from torch import nn

# Parameters of forward methods for what is kept between decoding steps: a layer that mixes tokens has one of them.
KEPT = {"past_key_values", "past_key_value", "cache_params", "layer_past", "state", "use_cache"}
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # in `layer_types`


def recurrent_layer_types(config: Any) -> set[str]:
    """The values of `layer_types` in config.json that are no attention."""
    names = set(getattr(config, "layer_types", None) or [])
    return {name for name in names if name == "linear_attention" or "attention" not in name}


def is_recurrent(model: nn.Module) -> bool:
    """Whether some of the model's layers keep a state."""
    config: Any = model.config
    return bool(getattr(model, "_is_stateful", False) or recurrent_layer_types(config.get_text_config()))


def mixing_layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The innermost modules that mix tokens, and whether each does it by transformers' AttentionInterface."""
    kinds: set[Any] = set(map(type, model.modules()))
    takes_state = {kind for kind in kinds if KEPT & inspect.signature(kind.forward).parameters.keys()}
    for module in model.modules():
        kind: Any = type(module)
        inner = (each for each in module.modules() if each is not module)
        if kind in takes_state and not any(type(each) in takes_state for each in inner):
            yield module, _uses_interface(kind)


@cache
def _uses_interface(kind: Hashable) -> bool:
    classes = (each for each in getattr(kind, "__mro__", ()) if issubclass(each, nn.Module) and each is not nn.Module)
    return any("ALL_ATTENTION_FUNCTIONS" in _source_of(each) for each in classes)


def masks_padding(model: nn.Module) -> bool:
    """Whether padding before a text leaves it as it is: no layer keeps a state, or all that do are told of the padding.

    RWKV's and RecurrentGemma's are not: padding tokens change the state with which a text begins.
    """
    kinds: set[Any] = {type(layer) for layer, is_attention in mixing_layers(model) if not is_attention}
    return not is_recurrent(model) or all(map(_reads_mask, kinds))


@cache
def _reads_mask(kind: Hashable) -> bool:
    name, forward = "attention_mask", getattr(kind, "forward", None)
    assert callable(forward)
    return name in inspect.signature(forward).parameters and _source_of(forward).count(name) > 1


def _source_of(code: Any) -> str:
    """The source text of a class or a function; "" where it cannot be read."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""
