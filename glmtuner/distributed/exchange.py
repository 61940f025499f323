"""Tensors exchanged between the ranks that share a row (parallel.sequence), with gradients.

Ranks 0 to N - 1 share a row, N to 2 N - 1 another one, and so on. Every rank of a group must make the same calls in the same order; the
backward pass then makes the opposite exchanges in the opposite order.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import distributed

from glmtuner.distributed import ranks


def row_group(size: int) -> Any:
    """The process group of the `size` ranks that share this rank's row. The first call must be made by all ranks of the run."""
    return _row_group(distributed.group.WORLD, size)


@cache
def _row_group(world: Any, size: int) -> Any:
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, ranks.world_size(), size)]
    return groups[ranks.rank() // size]


class _Exchange(torch.autograd.Function):
    """An all-to-all of a flat tensor; the gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        ctx.sends, ctx.receives = sends, receives
        return _all_to_all(sent, sends, receives)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(gradient, ctx.receives, ctx.sends), None, None


def _all_to_all(sent: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
    received = sent.new_empty(sum(receives))
    distributed.all_to_all_single(received, sent.contiguous(), receives, sends, group=row_group(len(sends)))
    return received


def exchange(sent: Sequence[torch.Tensor], receives: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What the ranks of the group have sent to this one, flat, by rank: `sent` has a tensor for each, `receives` the sizes to come."""
    flat = torch.cat([each.reshape(-1) for each in sent])
    received: torch.Tensor = _Exchange.apply(flat, [each.numel() for each in sent], list(receives))
    return received.split(list(receives))


def sum_over_row(value: torch.Tensor, size: int) -> torch.Tensor:
    """The sum of the values of the `size` ranks that share a row, without a gradient, on each of them."""
    total = value.detach().clone()
    distributed.all_reduce(total, group=row_group(size))
    return total
