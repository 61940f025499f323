"""Attention within the segments of a batch without padding, each by itself.

What a token sees and where it stands is what it would be in a row of its own, so losses and gradients are those of padded
batches; only the padding is not computed (Krell et al. 2021, arXiv:2107.02027, section 3.2).

Shape letters: T tokens of all segments together, H query heads, G key-value heads, D head dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.data.segments import Segments, places_from_0

SEGMENTED = "segments|"  # segments|sdpa is sdpa that takes each segment by itself
LAYERS = {
    "full_attention",
    "sliding_attention",
}  # kinds of layers, as config.json names them, that segments are right for


def supports_segment_attention(model: nn.Module) -> bool:
    """Whether every layer computes attention through transformers' interface, all of it or a window."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return False
    base = (model.config._attn_implementation or "eager").removeprefix(SEGMENTED)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return base in ALL_MASK_ATTENTION_FUNCTIONS and base in ALL_ATTENTION_FUNCTIONS and kinds <= LAYERS


def enable_segment_attention(model: nn.Module) -> None:
    """Let the model's attention take `segments`; without them it computes what it did before."""
    base = model.config._attn_implementation
    if base.startswith(SEGMENTED):
        return
    name = f"{SEGMENTED}{base}"
    AttentionInterface.register(name, _segmented(ALL_ATTENTION_FUNCTIONS[base]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation = name


def disable_segment_attention(model: nn.Module) -> None:
    """Undo `use_segments`."""
    model.config._attn_implementation = model.config._attn_implementation.removeprefix(SEGMENTED)


def position_function(model: nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """How the model's family counts the positions of a sample: its own `places`, or 0, 1, 2, ..."""
    return getattr(model, "places", places_from_0)


def _segmented(attend: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable  # the lengths of segments are other ones in every batch; the rest of a block compiles once
    def attend_segments(
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1GTD: torch.Tensor,
        value_1GTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segments: Segments | None = None,
        **options: Any,
    ) -> Any:
        if segments is None:
            return attend(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **options)
        window = options.get("sliding_window")
        if _has_kernel(module, query_1HTD, segments, options):
            return _by_kernel(query_1HTD, key_1GTD, value_1GTD, segments, window, options.get("scaling")), None
        lengths = segments.lengths
        attended = [
            attend(module, query, key, value, _windowed(mask, query.shape[2], window, query.device), **options)[0]
            for query, key, value, mask in zip(
                query_1HTD.split(lengths, dim=2),
                key_1GTD.split(lengths, dim=2),
                value_1GTD.split(lengths, dim=2),
                segments.masks(query_1HTD.device),
                strict=True,
            )
        ]
        return torch.cat(attended, dim=1), None

    return attend_segments


def _windowed(
    mask: torch.Tensor | None, length: int, window: int | None, device: torch.device
) -> "torch.Tensor | None":
    """A segment's mask where a token sees no more than the last `window` tokens, itself among them."""
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None, None].to(device)
    return mask


def _has_kernel(module: nn.Module, query: torch.Tensor, segments: Segments, options: dict[str, Any]) -> bool:
    """Whether torch's own flash attention for rows of different lengths computes the same: one call for all segments."""
    return (
        _kernel_runs(query)
        and query.shape[-1] <= 256
        and not any(segments.contexts)
        and not options.get("dropout")
        and getattr(module, "prefix", None) is None
    )


def _kernel_runs(query: torch.Tensor) -> bool:
    """Whether the device and the precision have the kernel."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def _asks_for_grouping() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _by_kernel(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention over all segments, [1, T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.bounds(query_1HTD.device), max(segments.lengths)
    # torch 2.11 groups heads without being told; a later one wants to be
    grouped = {"enable_gqa": query_1HTD.shape[1] != key_1GTD.shape[1]} if _asks_for_grouping() else {}
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
