"""Ranks with shards of one model generate answers of their own, each to its prompts (parallel=fsdp2).

A forward pass gathers the weights layer by layer, in which all ranks take part, so every rank must make as many. Before each one the
ranks therefore tell each other whether they still have answers to generate, and one that has none left makes a pass on a prompt
whose result nobody reads, until all have finished.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def in_step(model: "PreTrainedModel", prompts: Sequence[Sequence[int]], pad_id: int) -> Iterator[None]:
    """Within this, each rank may make as many forward passes as it likes; it is left when the last rank leaves it.

    A collective. `prompts` are this rank's, and may be none. Nothing happens where the model is not sharded.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    from glmtuner.inference.decoding import Decoder, NoCacheError
    from glmtuner.models.unwrap import unwrapped

    if not isinstance(model, FSDPModule):
        yield
        return
    shortest = min(ranks.all_gather(min(prompts, key=len, default=())), key=lambda prompt: (not prompt, len(prompt)))
    if not shortest:  # no rank has a prompt
        yield
        return
    base: Any = unwrapped(model)
    forward, own = base.forward, base.__dict__.get("forward")
    waits = False  # for other ranks
    device = base.device

    def anyone_generates(here: bool) -> bool:
        count = torch.tensor(int(here), device=device)
        torch.distributed.all_reduce(count)
        return bool(count.item())

    @functools.wraps(forward)
    def forward_in_step(*args: Any, **options: Any) -> Any:
        if not waits:
            anyone_generates(True)
        return forward(*args, **options)

    model.unshard()  # else the ranks' first passes would gather the root's weights before they talk
    base.forward = forward_in_step
    try:
        yield
        waits = True
        decoder = Decoder(model, pad_id, replays=False)
        while anyone_generates(False):
            with suppress(NoCacheError):
                decoder.prefill([0], [shortest])
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
        model.reshard()  # without a backward pass FSDP leaves the root module's weights gathered
