"""Recurrent layers on a batch without padding: every segment starts with an empty state.

Recurrent are state-space layers, linear attention and short convolutions: what a token gets from those before it comes through a
state, or a few neighbours, and not through masked attention. Such a layer is given the segments as rows, padded on the right, where
padding reaches no token; all other layers compute without padding. Where ranks share a row, a rank is given the tokens before its
own that they need, and computes these once more: a segment of many parts is computed by its last rank as a whole.

Shape letters: T tokens of all segments together, L tokens of the longest segment, B segments.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from glmtuner.data.segments import Segments
from glmtuner.distributed.exchange import exchange


def reset_states(layer: nn.Module, current: Callable[[], Segments | None]) -> None:
    """Let a recurrent layer start anew at every segment of the batch, if `current` returns one; else it computes as before."""
    plain = type(layer).forward
    signature = inspect.signature(plain)

    @torch.compiler.disable
    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        segments = current()
        if segments is None:
            return plain(self, *args, **options)
        call = signature.bind(self, *args, **options)
        given, lengths, own = dict(call.arguments), segments.lengths, segments.tokens
        if segments.parts:
            first, end = segments.reach_of_part(segments.own)
            given = {name: gathered(value, segments) for name, value in given.items() if name != "self"}
            lengths = segments.lengths_between(first, end)
        total = sum(lengths)
        # kwargs hold what the attention layers need
        extra = next((name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD), None)
        outputs: list[torch.Tensor | None] = [None] * len(lengths)
        rest: tuple[Any, ...] | None = None
        for indices in by_length(lengths):

            def rows(value: Any, indices: list[int] = indices) -> Any:
                return as_rows(value, lengths, total, indices)

            call.arguments.update({name: rows(value) for name, value in given.items() if name not in ("self", extra)})
            call.arguments.update({name: None for name in ("attention_mask", "mask") if given.get(name) is not None})
            if extra in given:
                call.arguments[extra] = {
                    name: rows(value) for name, value in given[extra].items() if name != "segments"
                }
            out = plain(*call.args, **call.kwargs)
            if isinstance(out, tuple):
                out, rest = out[0], out[1:]
            for row, index in enumerate(indices):
                outputs[index] = out[row, : lengths[index]]
        joined = torch.cat([each for each in outputs if each is not None])[None, total - own :]
        return joined if rest is None else (joined, *rest)

    layer.forward = types.MethodType(forward, layer)


def gathered(value: Any, segments: Segments) -> Any:
    """A tensor of this rank's part of a row, [1, tokens, ...], with the tokens before it that its first segment has on other ranks.

    Tuples and dictionaries of such too; any other value as it is.
    """
    if isinstance(value, tuple):
        return tuple(gathered(each, segments) for each in value)
    if isinstance(value, dict):
        return {name: gathered(each, segments) for name, each in value.items()}
    if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, segments.tokens):
        return value
    places, own = range(len(segments.parts)), segments.own
    begins = segments.part(own)[0]
    sent = [value[0, slice(*overlap(segments, own, place, begins))] for place in places]
    spans = [overlap(segments, place, own) for place in places]
    row_shape = value.shape[2:]
    pieces = exchange(sent, [(end - first) * row_shape.numel() for first, end in spans])
    rows = [piece.view(-1, *row_shape) for piece, (first, end) in zip(pieces, spans, strict=True) if end > first]
    return torch.cat(rows)[None]


def overlap(segments: Segments, of: int, for_place: int, origin: int = 0) -> tuple[int, int]:
    """Where the tokens stand, less `origin`, of which one rank has the values and another needs them; an empty place without any."""
    has, needs = segments.part(of), segments.reach_of_part(for_place)
    first, end = max(has[0], needs[0]), min(has[1], needs[1])
    return (first - origin, end - origin) if end > first else (0, 0)


def by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """The indices of the segments in groups of similar lengths: the longest of a group is less than twice the shortest."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(index)
    return list(groups.values())


def as_rows(value: Any, lengths: tuple[int, ...], total: int, indices: list[int]) -> Any:
    """A tensor [1, T, ...], or a tuple of such, as [B, L, ...]; any other value as it is."""
    if isinstance(value, tuple):
        return tuple(as_rows(each, lengths, total, indices) for each in value)
    if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, total):
        return value
    segments = value[0].split(list(lengths))
    return pad_sequence([segments[index] for index in indices], batch_first=True)
