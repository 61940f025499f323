"""NEFTune: uniform noise on the embeddings of a training (Jain et al. 2023, arXiv:2310.05914).

A sample's noise is uniform in (-a, a) with a = alpha / sqrt(L d), for its own L tokens and the embeddings' size d, whatever
batch it is in. transformers takes the length of the batch's rows instead, which is that of all samples together in a row
without padding (transformers#34659), and that of the longest one in a padded batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from glmtuner.models.unwrap import unwrapped


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """While this lasts, the embeddings of `model` have noise of strength `alpha` whenever the model is in training mode.

    Without an alpha nothing changes. `model` is the outermost module that batches are passed to, but for wrappers of ranks.
    """
    if not alpha:
        yield
        return
    lengths: list[list[int]] = []  # of the batch that the model is called with

    def read_lengths(module: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        lengths[:] = sample_lengths(batch)

    def forget_lengths(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        lengths.clear()

    def add_noise(module: nn.Module, args: tuple[Any, ...], embeddings_BTH: torch.Tensor) -> torch.Tensor | None:
        return embeddings_BTH + noise(embeddings_BTH, lengths, alpha) if module.training else None

    handles = [
        model.register_forward_pre_hook(read_lengths, with_kwargs=True),
        model.register_forward_hook(forget_lengths, always_call=True),
        unwrapped(model).get_input_embeddings().register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_lengths(batch: Mapping[str, Any]) -> list[list[int]]:
    """The numbers of tokens of the samples in each row of a batch, padding excluded; empty if every row is one whole sample."""
    if batch.get("segments") is not None:
        return [list(batch["segments"].lengths)]
    mask: torch.Tensor | None = batch.get("attention_mask")
    return [] if mask is None or mask.dim() != 2 else [[length] for length in mask.sum(1).tolist()]


def noise(embeddings_BTH: torch.Tensor, lengths: list[list[int]], alpha: float) -> torch.Tensor:
    """The noise of the rows, [B, T, H]; that of padding has the strength of its row's sample. Draws as transformers does."""
    noise_BTH = torch.zeros_like(embeddings_BTH)
    rows, tokens, size = embeddings_BTH.shape
    for noise_TH, in_row in zip(noise_BTH, lengths or [[tokens]] * rows, strict=True):
        parts = noise_TH.split(in_row) if len(in_row) > 1 else [noise_TH]
        for length, part in zip(in_row, parts, strict=True):
            bound = float(alpha / torch.sqrt(torch.tensor(max(length, 1) * size)))
            part.uniform_(-bound, bound)
    return noise_BTH
