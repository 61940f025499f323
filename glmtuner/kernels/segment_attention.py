"""Attention within each segment of a batch without padding.

A token attends to the tokens, and has the position, that it would have in a row of its own. Losses and gradients are thus
those of padded batches, without computing the padding (Krell et al. 2021, arXiv:2107.02027, section 3.2).

Shape letters: T tokens of all segments together, L tokens of one segment, H query heads, G key-value heads, D head dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.data.segments import Segments, causal_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEGMENTED = "segments|"  # segments|sdpa is sdpa within each segment
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}  # values of `layer_types` in config.json


def segment_attention_problem(model: "PreTrainedModel") -> str | None:
    """Why segments cannot be kept apart; None where every layer has full or sliding-window attention by AttentionInterface."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not compute attention through transformers' AttentionInterface"
    base = (model.config._attn_implementation or "eager").removeprefix(SEGMENTED)
    if base not in ALL_MASK_ATTENTION_FUNCTIONS or base not in ALL_ATTENTION_FUNCTIONS:
        return f"not for attention by {base}"
    others = set(getattr(config, "layer_types", None) or []) - SUPPORTED_LAYERS
    return f"not for layers of type {', '.join(sorted(others))}" if others else None


def enable_segment_attention(model: "PreTrainedModel") -> None:
    """Let the model's forward pass take `segments`, the Segments of a batch; without them it computes as before."""
    base = model.config._attn_implementation
    assert base is not None
    if base.startswith(SEGMENTED):
        return
    name = f"{SEGMENTED}{base}"
    AttentionInterface.register(name, _segmented(ALL_ATTENTION_FUNCTIONS[base]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    # not set_attn_implementation, which looks up a name with "flash" in it as a kernel on the hub
    model.config._attn_implementation = name


def disable_segment_attention(model: "PreTrainedModel") -> None:
    """Undo `enable_segment_attention`."""
    name = model.config._attn_implementation
    assert name is not None
    model.config._attn_implementation = name.removeprefix(SEGMENTED)


def position_function(model: nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """A function from a sample's token ids, [L], to its position ids, [..., L], and the length of its bidirectional context.

    The model's own `places` if it has one (ChatGLM-6B), else positions 0, 1, 2, ... and no bidirectional context.
    """
    places: Callable[[torch.Tensor], tuple[torch.Tensor, int]] = getattr(model, "places", causal_positions)
    return places


def _segmented(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, applied to each segment if `segments` are given: outputs [1, T, H, D], no weights."""

    # segments have other lengths in every batch, so this is not traced; the rest of a block compiles once
    @torch.compiler.disable
    def segment_attention(
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1GTD: torch.Tensor,
        value_1GTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segments: Segments | None = None,
        **options: Any,
    ) -> Any:
        if segments is None:
            return attention(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **options)
        window = options.get("sliding_window")
        if _uses_varlen(module, query_1HTD, segments, options):
            return _varlen_attention(query_1HTD, key_1GTD, value_1GTD, segments, window, options.get("scaling")), None
        lengths = segments.lengths
        attended = [
            attention(
                module, query, key, value, _sliding_window(mask, query.shape[2], window, query.device), **options
            )[0]
            for query, key, value, mask in zip(
                query_1HTD.split(lengths, dim=2),
                key_1GTD.split(lengths, dim=2),
                value_1GTD.split(lengths, dim=2),
                segments.masks(query_1HTD.device),
                strict=True,
            )
        ]
        return torch.cat(attended, dim=1), None

    return segment_attention


def _sliding_window(
    mask: torch.Tensor | None, length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """A segment's mask, [1, 1, L, L], if a token attends to the last `window` tokens only, itself included; else `mask`."""
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None, None].to(device)
    return mask


def _uses_varlen(module: nn.Module, query: torch.Tensor, segments: Segments, options: dict[str, Any]) -> bool:
    """Whether torch's variable-length flash attention computes the same, in one call for all segments."""
    return (
        _varlen_runs(query)
        and query.shape[-1] <= 256
        and not any(segments.contexts)
        and not options.get("dropout")
        and getattr(module, "prefix", None) is None
    )


def _varlen_runs(query: torch.Tensor) -> bool:
    """Whether the kernel exists for this device and dtype."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def _has_enable_gqa() -> bool:
    """Whether grouped queries must be requested: torch 2.11 groups heads without it, later versions have the parameter."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen_attention(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention within all segments, [1, T, H, D], by torch's variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.bounds(query_1HTD.device), max(segments.lengths)
    grouped: dict[str, Any] = {"enable_gqa": query_1HTD.shape[1] != key_1GTD.shape[1]} if _has_enable_gqa() else {}
    query, key, value = (states[0].transpose(0, 1) for states in (query_1HTD, key_1GTD, value_1GTD))
    attended = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(attended, torch.Tensor)
    return attended[None]
