"""The mask that a model's own code makes for its attention, for each segment of a batch without padding.

A model says by its masks, and often by nothing else, that a layer attends to a sliding window or to chunks of the text.

Shape letters: T tokens of all segments together, L tokens of one segment.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from glmtuner.data.segments import Segments

CURRENT: ContextVar[Segments | None] = ContextVar("segments", default=None)  # of the forward pass that makes masks


class SegmentMasks:
    """What stands in place of a layer's mask: each segment's mask, as in a row of its own.

    `size` is the length of the sliding window, or of the chunks; None for causal attention. Code that takes it for a tensor
    gets a NotImplementedError.
    """

    def __init__(self, segments: Segments, allowed: Callable[..., torch.Tensor], size: int | None) -> None:
        self.segments, self.allowed, self.size = segments, allowed, size
        self._made: dict[Any, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"the model computes with its masks ({name})")

    def __getitem__(self, key: Any) -> Any:
        raise NotImplementedError("the model computes with its masks")

    def of_length(self, length: int, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor | None:
        """A segment's mask, [1, 1, L, L]: True = attended to, or, with a `dtype`, what is added to the scores.

        None is causal attention; with a `dtype` there is always a mask.
        """
        if dtype is None and (self.size is None or length <= self.size):
            return None
        if (length, device, dtype) not in self._made:
            place = torch.arange(length, device=device)
            mask = self.allowed(0, 0, place[:, None], place[None]).to(torch.bool).expand(length, length)[None, None]
            if dtype is not None:
                mask = torch.zeros((), dtype=dtype, device=device).where(mask, torch.finfo(dtype).min)
            self._made[length, device, dtype] = mask
        return self._made[length, device, dtype]

    @property
    def is_causal(self) -> bool:
        """Whether every segment has causal attention, of all its tokens."""
        return self.size is None or max(self.segments.reaches) <= self.size

    @cached_property
    def is_window(self) -> bool:
        """Whether a token attends to the last `size` tokens, itself included; otherwise to those of its chunk."""
        if self.size is None:
            return False
        at, first = torch.tensor(self.size), torch.tensor(0)
        return bool(self.allowed(0, 0, at, at)) and (self.size == 1 or bool(self.allowed(0, 0, at, first + 1)))


def register_segment_masks(name: str, base: str) -> None:
    """Let models with attention by `name` make SegmentMasks while a forward pass has segments, and the masks of `base` else."""
    plain = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def masks(
        *args: Any,
        mask_function: Callable[..., torch.Tensor],
        allow_is_causal_skip: bool = True,
        local_size: int | None = None,
        **options: Any,
    ) -> Any:
        segments = CURRENT.get()
        if segments is None:
            return plain(
                *args,
                mask_function=mask_function,
                allow_is_causal_skip=allow_is_causal_skip,
                **({} if local_size is None else {"local_size": local_size}),
                **options,
            )
        if not allow_is_causal_skip:  # a mask that depends on the tokens, or that the model computes with
            raise NotImplementedError("the model's masks are neither causal nor a window")
        return SegmentMasks(segments, mask_function, local_size)

    AttentionMaskInterface.register(name, masks)
