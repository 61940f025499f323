"""Attention over a row that several ranks share: each has a part of the tokens, and attends with its share of the heads.

Queries, keys and values are exchanged, so that a rank has those of all tokens for some heads, and the outputs are exchanged back
(Jacobs et al. 2023, arXiv:2309.14509). What attention does within a head is that of one process.

Shape letters: T tokens of the row, P tokens of this rank's part, H heads, S heads of a rank, D head dimension, M prefix tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import nn

from glmtuner.data.segments import Segments
from glmtuner.distributed.exchange import exchange
from glmtuner.errors import ConfigError
from glmtuner.kernels.segment_masks import SegmentMasks


def over_ranks(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, which is given the tokens of all ranks where the segments have parts; else as it is."""

    @torch.compiler.disable
    def attention_over_ranks(
        module: nn.Module,
        query_1HPD: torch.Tensor,
        key_1HPD: torch.Tensor,
        value_1HPD: torch.Tensor,
        attention_mask: "torch.Tensor | SegmentMasks | None",
        **options: Any,
    ) -> Any:
        masks_of = attention_mask.segments if isinstance(attention_mask, SegmentMasks) else None
        segments: Segments | None = masks_of or options.get("segments")
        if segments is None or not segments.parts:
            return attention(module, query_1HPD, key_1HPD, value_1HPD, attention_mask, **options)
        parts, heads = segments.parts, key_1HPD.shape[1]
        if query_1HPD.shape[1] % len(parts):
            raise ConfigError(
                f"parallel.sequence={len(parts)}: {type(module).__name__} has {query_1HPD.shape[1]} heads, which {len(parts)} processes "
                f"cannot share equally; type parallel.sequence={gcd(query_1HPD.shape[1], len(parts))}"
            )
        # keys and values that queries of several ranks attend to are repeated
        times = len(parts) // gcd(heads, len(parts))
        query = heads_of_all(query_1HPD, parts)
        key, value = (heads_of_all(each.repeat_interleave(times, dim=1), parts) for each in (key_1HPD, value_1HPD))
        with with_share(module, times, len(parts), segments.own):
            attended_1TSD = attention(module, query, key, value, attention_mask, **options)[0]
        return tokens_of_rank(attended_1TSD, parts, segments.own), None

    return attention_over_ranks


def heads_of_all(states_1HPD: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """This rank's share of the heads for the tokens of all ranks, [1, S, T, D], from all heads for its own tokens."""
    shares = states_1HPD[0].chunk(len(parts))
    share, width = shares[0].shape[0], states_1HPD.shape[-1]
    received = exchange(shares, [share * part * width for part in parts])
    return torch.cat([each.view(share, part, width) for each, part in zip(received, parts, strict=True)], dim=1)[None]


def tokens_of_rank(attended_1TSD: torch.Tensor, parts: Sequence[int], own: int) -> torch.Tensor:
    """All heads for this rank's tokens, [1, P, H, D], from its share of the heads for the tokens of all ranks."""
    share, width = attended_1TSD.shape[2:]
    received = exchange(attended_1TSD[0].split(list(parts)), [parts[own] * share * width] * len(parts))
    return torch.cat([each.view(parts[own], share, width) for each in received], dim=1)[None]


@contextmanager
def with_share(module: nn.Module, times: int, count: int, own: int) -> Iterator[None]:
    """Within it, the layer is one with a rank's share of the heads: its grouping of queries, and the prefix of p_tuning."""
    before: dict[str, Any] = {
        name: vars(module)[name] for name in ("num_key_value_groups", "prefix") if name in vars(module)
    }
    if times > 1 and "num_key_value_groups" in before:
        module.__dict__["num_key_value_groups"] = before["num_key_value_groups"] // times
    if before.get("prefix") is not None:
        module.__dict__["prefix"] = lambda: tuple(
            part_HMD.repeat_interleave(times, dim=0).chunk(count)[own] for part_HMD in before["prefix"]()
        )
    try:
        yield
    finally:
        module.__dict__.update(before)
