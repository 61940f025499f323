"""Attention within each segment of a batch without padding.

A token attends to the tokens, and has the position, that it would have in a row of its own. Losses and gradients are thus
those of padded batches, without computing the padding (Krell et al. 2021, arXiv:2107.02027, section 3.2).

Shape letters: T tokens of all segments together, L tokens of one segment, H query heads, G key-value heads, D head dimension.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.data.segments import Segments, causal_positions
from glmtuner.distributed import accelerator
from glmtuner.kernels.segment_masks import CURRENT, SegmentMasks, register_segment_masks
from glmtuner.kernels.segment_states import reset_states
from glmtuner.kernels.shared_rows import over_ranks
from glmtuner.models.mixing_layers import ATTENTION_LAYERS, is_recurrent, mixing_layers, recurrent_layer_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEGMENTED = "segments|"  # segments|sdpa is sdpa within each segment


def segment_attention_problem(model: "PreTrainedModel") -> str | None:
    """Why segments cannot be kept apart.

    None where every layer has attention by AttentionInterface, or a state that can be reset.
    """
    config: Any = model.config.get_text_config()
    recurrent, layers = is_recurrent(model), list(mixing_layers(model))
    if not recurrent:
        own = sorted({type(layer).__name__ for layer, is_attention in layers if not is_attention})
        if own or not (layers or getattr(model, "_supports_attention_backend", False)):
            where = f" in {', '.join(own)}" if own else ""
            return f"{type(model).__name__} does not compute attention through transformers' AttentionInterface{where}"
    base = _base_attention(model)
    has_attention = not recurrent or any(is_attention for _, is_attention in layers)
    if has_attention and (base not in ALL_MASK_ATTENTION_FUNCTIONS or _attention_of(base) is None):
        return f"not for attention by {base}"
    others = set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS - recurrent_layer_types(config)
    return f"not for layers of type {', '.join(sorted(others))}" if others else None


def enable_segment_attention(model: "PreTrainedModel") -> None:
    """Let the model's forward pass take `segments`, the Segments of a batch; without them it computes as before."""
    base = _base_attention(model)
    if takes_segments(model):
        return
    layers = list(mixing_layers(model)) if is_recurrent(model) else []
    has_attention = not layers or any(is_attention for _, is_attention in layers)
    model.__dict__["segmented"] = _Segmented(model, [layer for layer, is_attention in layers if not is_attention])
    attention = _attention_of(base)
    if not has_attention or attention is None:
        return
    name = f"{SEGMENTED}{base}"
    AttentionInterface.register(name, _segmented(attention, base))
    register_segment_masks(name, base)
    # not set_attn_implementation, which looks up a name with "flash" in it as a kernel on the hub
    model.config._attn_implementation = name


def takes_segments(model: "PreTrainedModel") -> bool:
    """Whether `enable_segment_attention` is in effect."""
    return "segmented" in model.__dict__


def disable_segment_attention(model: "PreTrainedModel") -> None:
    """Undo `enable_segment_attention`."""
    model.config._attn_implementation = _base_attention(model)
    if takes_segments(model):
        model.__dict__.pop("segmented").remove(model)


def _base_attention(model: "PreTrainedModel") -> str:
    return (model.config._attn_implementation or "eager").removeprefix(SEGMENTED)


def _attention_of(base: str) -> Callable[..., Any] | None:
    """The attention function of this name; for "eager" the one in the module of the model's own code."""
    if base == "eager":
        return _eager_attention
    attention: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(base)
    return attention


def _eager_attention(module: nn.Module, *args: Any, **options: Any) -> Any:
    for kind in type(module).__mro__:
        if (attention := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None:
            return attention(module, *args, **options)
    raise NotImplementedError(f"{type(module).__name__} has no eager attention function")


class _Segmented:
    """Hands the segments of a forward pass to the model's masks and recurrent layers, until the next forward pass.

    Activation checkpointing computes layers again in the backward pass, with the same segments.
    """

    def __init__(self, model: "PreTrainedModel", recurrent: list[nn.Module]) -> None:
        self.segments: Segments | None = None
        self.inside = False  # the model's own forward method
        self.recurrent = recurrent
        # ChatGLM makes its masks of the Segments
        self.reads_masks = not type(model).__module__.startswith("glmtuner.")
        decoder = model.base_model
        for layer in recurrent:
            reset_states(layer, lambda: self.segments)
        self.hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, always_call=True),
        ]
        plain, owner = type(model).forward, self

        # no hook: PEFT's wrappers call the forward method itself
        @functools.wraps(plain)
        def forward(self: Any, *args: Any, **options: Any) -> Any:
            owner.segments, owner.inside = options.get("segments"), True
            try:
                return plain(self, *args, **owner.prepared(self, options))
            finally:
                owner.inside = False

        model.forward = types.MethodType(forward, model)

    def remove(self, model: "PreTrainedModel") -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        for module in (model, *self.recurrent):
            module.__dict__.pop("forward", None)

    def prepared(self, owner: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass of the model or its decoder, as its code takes them where there are segments."""
        segments, mask = self.segments, options.get("attention_mask")
        if segments is None or not self.reads_masks:
            return options
        options = dict(options)
        # of two dimensions, as it is read where tokens are counted, such as in the routers' auxiliary loss; without values, where
        # memory is estimated, it would be asked for them
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and not isinstance(mask, FakeTensor):
            options["attention_mask"] = torch.ones(1, segments.tokens, dtype=torch.long, device=mask.device)
        if self.recurrent:
            accepted = inspect.signature(type(owner).forward).parameters
            if "use_cache" in accepted:
                options["use_cache"] = False  # a state that is kept is that of one row
            if not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
                options = {name: value for name, value in options.items() if name in accepted}  # no position ids
        return options

    def _before(self, decoder: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not self.inside:
            self.segments = options.get("segments")
        CURRENT.set(self.segments if self.reads_masks else None)
        return args, self.prepared(decoder, options)

    def _after(self, *_: Any) -> None:
        CURRENT.set(None)


def position_function(model: nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """A function from a sample's token ids, [L], to its position ids, [..., L], and the length of its bidirectional context.

    The model's own `places` if it has one (ChatGLM-6B), else positions 0, 1, 2, ... and no bidirectional context.
    """
    places: Callable[[torch.Tensor], tuple[torch.Tensor, int]] = getattr(model, "places", causal_positions)
    return places


def _segmented(attention: Callable[..., Any], base: str = "sdpa") -> Callable[..., Any]:
    """The attention function, applied to each segment if `segments` are given: outputs [1, T, H, D], no weights."""
    kind = base.rpartition("|")[2]

    # segments have other lengths in every batch, so this is not traced; the rest of a block compiles once
    @torch.compiler.disable
    def segment_attention(
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1GTD: torch.Tensor,
        value_1GTD: torch.Tensor,
        attention_mask: "torch.Tensor | SegmentMasks | None",
        segments: Segments | None = None,
        **options: Any,
    ) -> Any:
        made = attention_mask if isinstance(attention_mask, SegmentMasks) else None
        if segments is None and made is None:
            return attention(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **options)
        segments = made.segments if made is not None else segments
        assert segments is not None
        lengths, reaches, device = segments.lengths, segments.reaches, query_1HTD.device
        window, varlen = options.get("sliding_window"), kind != "eager"
        if made is not None:
            window = made.size if made.is_window else None
            varlen = varlen and (made.is_causal or made.is_window)
        if varlen and _uses_varlen(module, query_1HTD, value_1GTD, segments, options):
            return _varlen_attention(query_1HTD, key_1GTD, value_1GTD, segments, window, options.get("scaling")), None
        masks: list[torch.Tensor | None]
        if made is not None:
            dtype = query_1HTD.dtype if kind == "eager" else None
            masks = [made.of_length(reach, device, dtype) for reach in reaches]
        elif kind == "eager" and not any(segments.contexts) and not isinstance(attention_mask, FakeTensor):
            raise NotImplementedError("the model makes no mask by transformers' functions")
        else:
            masks = [
                _sliding_window(mask, reach, window, device)
                for mask, reach in zip(segments.masks(device), reaches, strict=True)
            ]
        attended = [
            attention(module, query, key, value, _last_rows(mask, query.shape[2], key), **options)[0]
            for query, key, value, mask in zip(
                query_1HTD.split(lengths, dim=2),
                _with_before(key_1GTD, segments),
                _with_before(value_1GTD, segments),
                masks,
                strict=True,
            )
        ]
        return torch.cat(attended, dim=1), None

    return over_ranks(segment_attention)


def _with_before(states_1GTD: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
    """Each segment's keys or values, [1, G, reach, D]: those of the tokens before its own, then its own."""
    own = states_1GTD.split(segments.lengths, dim=2)
    if not segments.before:
        return list(own)
    return [
        torch.cat([states_1GTD.narrow(2, start, count), states], dim=2) if count else states
        for states, (start, count) in zip(own, segments.before, strict=True)
    ]


def _last_rows(mask: torch.Tensor | None, queries: int, key_1GTD: torch.Tensor) -> torch.Tensor | None:
    """The rows of a mask, [1, 1, reach, reach], that belong to a segment's own tokens; None stays plain causal attention."""
    reach = key_1GTD.shape[2]
    if queries == reach:
        return mask
    if mask is None:
        mask = torch.ones(reach, reach, dtype=torch.bool, device=key_1GTD.device).tril()[None, None]
    return mask[:, :, reach - queries :]


def _sliding_window(
    mask: torch.Tensor | None, length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """A segment's mask, [1, 1, L, L], if a token attends to the last `window` tokens only, itself included; else `mask`."""
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None, None].to(device)
    return mask


def _uses_varlen(
    module: nn.Module, query: torch.Tensor, value: torch.Tensor, segments: Segments, options: dict[str, Any]
) -> bool:
    """Whether torch's variable-length flash attention computes the same, in one call for all segments."""
    return (
        _varlen_runs(query)
        and query.shape[-1] <= 256
        and query.shape[-1] == value.shape[-1]
        and options.get("position_bias") is None
        and not any(segments.contexts)
        and not options.get("dropout")
        and getattr(module, "prefix", None) is None
    )


def _varlen_runs(query: torch.Tensor) -> bool:
    """Whether the kernel exists for this device and dtype."""
    return query.dtype in (torch.float16, torch.bfloat16) and accelerator.supports("flash", query.device)


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

    device = query_1HTD.device
    bounds, longest = segments.bounds(device), max(segments.lengths)
    reaching, farthest = bounds, longest
    if segments.before:  # the last query attends to the last key, as flash attention aligns them
        reaching, farthest = segments.reaching_bounds(device), max(segments.reaches)
        key_1GTD, value_1GTD = (torch.cat(_with_before(each, segments), dim=2) for each in (key_1GTD, value_1GTD))
    grouped: dict[str, Any] = {"enable_gqa": query_1HTD.shape[1] != key_1GTD.shape[1]} if _has_enable_gqa() else {}
    query, key, value = (states[0].transpose(0, 1) for states in (query_1HTD, key_1GTD, value_1GTD))
    attended = varlen_attn(
        query,
        key,
        value,
        bounds,
        reaching,
        longest,
        farthest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(attended, torch.Tensor)
    return attended[None]
