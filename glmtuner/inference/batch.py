"""Answers in progress: their tokens, masks and cached keys and values, rows joining and leaving between two steps."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

SPARE = 64  # columns that a buffer has at least to spare when it is made


class RecordedStep(Protocol):
    """A generation step that was recorded on a batch's buffers (replay.py)."""

    def step(self, batch: "Batch") -> torch.Tensor:
        """The logits behind each row's last token, [B, V]."""


class SpareLayer(DynamicLayer):
    """One layer's keys and values [B, G, W, D], views of buffers [R, G, C, D] whose window the batch moves."""

    def __init__(self, filled: Any, batch: "Batch") -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.batch, self.end = batch, filled.keys.shape[2]
        self.buffers = [filled.keys, filled.values]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns; returns all columns so far, or in a step that is replayed all that there are."""
        if self.batch.column is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.batch.column, states)
            return self.buffers[0], self.buffers[1]
        first, self.end = self.end, self.end + key_states.shape[2]
        rows, start = len(self.batch.rows), self.batch.start
        keys, values = self.buffers
        keys[:rows, :, first : self.end] = key_states
        values[:rows, :, first : self.end] = value_states
        self.keys, self.values = keys[:rows, :, start : self.end], values[:rows, :, start : self.end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.end - self.batch.start


class Batch:
    """Rows with their tokens, and the cache of all but the last one of each.

    `rows` are the caller's own objects, one a row; None stands for a row that is done and could not leave.
    """

    def __init__(
        self, rows: Sequence[Any], prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
    ) -> None:
        self.rows, self.lengths = list(rows), [len(prompt) for prompt in prompts]  # tokens without padding
        self.start, self.end = 0, max(self.lengths)
        self.padding = [pad_id, 0]
        # the last column is for the tokens that come first
        ids = [[pad_id] * (self.end - len(prompt)) + [*prompt, pad_id] for prompt in prompts]
        mask = [[0] * (self.end - length) + [1] * length + [0] for length in self.lengths]
        # ids and mask are [R, 1, C], so that columns are the third dimension of every buffer
        self.buffers = [torch.tensor(values, device=device)[:, None] for values in (ids, mask)]
        self.cache: Any = None
        self.joinable = False
        self.column: torch.Tensor | None = None  # that a replayed step writes, [1]
        self.replay: RecordedStep | None = None  # of a step on these buffers
        self.steps = 0  # on these buffers

    @property
    def ids(self) -> torch.Tensor:
        """[B, W]"""
        return self.buffers[0][: len(self.rows), 0, self.start : self.end]

    @property
    def mask(self) -> torch.Tensor:
        """1 for a token, 0 for padding, [B, W]."""
        return self.buffers[1][: len(self.rows), 0, self.start : self.end]

    @property
    def live(self) -> int:
        return sum(row is not None for row in self.rows)

    def keep(self, cache: Cache) -> None:
        """Take over what the model made of the prompts."""
        self.joinable = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        if self.joinable:
            cache.layers = [SpareLayer(layer, self) for layer in cache.layers]
        self.cache = cache

    def widen(self, tokens_B: torch.Tensor) -> None:
        """Give each row its next token."""
        for buffer, value in zip(self.buffers, (tokens_B, 1), strict=True):
            buffer[: len(self.rows), 0, self.end] = value
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def make_room(self) -> None:
        """See to it that the cache can take the last token, and the rows one more."""
        if self.end + 1 > self.columns:
            self._rebuild(len(self.rows), self.end - self.start)

    @property
    def columns(self) -> int:
        """How many columns every buffer has."""
        return min(buffer.shape[2] for buffer in self._all_buffers())

    def join(self, other: "Batch") -> None:
        """Take in the rows of another batch."""
        count, total = len(self.rows), len(self.rows) + len(other.rows)
        width = other.end - other.start
        if total > self.buffers[0].shape[0] or width > self.end:
            self._rebuild(total, max(width, self.end - self.start))
        for mine, theirs in zip(self._all_buffers(), other._all_buffers(), strict=True):
            columns = slice(other.start, min(other.end, theirs.shape[2]))
            first = self.end - width
            mine[count:total, :, first : first + columns.stop - columns.start] = theirs[: len(other.rows), :, columns]
        for buffer, padding in zip(self.buffers, self.padding, strict=True):
            buffer[count:total, :, : self.end - width] = padding  # where a row stood that has left
        self.rows += other.rows
        self.lengths += other.lengths
        self._trim()

    def leave(self, done: Iterable[int]) -> None:
        """Let go of these rows, and of columns that are padding for all others; the last rows take their places."""
        places = sorted(done, reverse=True)
        if not self.joinable:
            for place in places:
                self.rows[place] = None
            return
        for place in places:
            last = len(self.rows) - 1
            if place != last:
                for buffer in self._all_buffers():
                    buffer[place, :, : self.end] = buffer[last, :, : self.end]
                self.rows[place], self.lengths[place] = self.rows[last], self.lengths[last]
            del self.rows[last], self.lengths[last]
        self._trim()

    def _trim(self) -> None:
        self.start = self.end - max(self.lengths, default=0)

    def _all_buffers(self) -> list[torch.Tensor]:
        caches = [buffer for layer in self.cache.layers for buffer in layer.buffers] if self.joinable else []
        return [*self.buffers, *caches]

    def _rebuild(self, rows: int, width: int) -> None:
        """Move what is in use so that it ends in column `width`, with room for so many rows and for more columns.

        It stays in its buffers where they are large enough, else it moves to new ones.
        """
        capacity, first = self.buffers[0].shape[0], width - (self.end - self.start)
        if rows <= capacity and width + SPARE <= self.columns:
            for buffer in self._all_buffers():
                used = buffer[: len(self.rows), :, self.start : self.end].clone()
                buffer[: len(self.rows), :, first : first + used.shape[2]] = used
            for buffer, padding in zip(self.buffers, self.padding, strict=True):
                buffer[:, :, :first] = buffer[:, :, width:] = padding  # where they stood
            self._moved(first, width)
            return
        rows = capacity if rows <= capacity else max(rows, 2 * capacity)
        columns = -(-(width + max(SPARE, width // 2)) // 8) * 8  # by eights, as attention's kernels read masks

        def rebuilt(old: torch.Tensor, padding: int = 0) -> torch.Tensor:
            # what is masked must be a number, too
            new = old.new_full((rows, old.shape[1], columns, *old.shape[3:]), padding)
            used = old[: len(self.rows), :, self.start : self.end]
            new[: len(self.rows), :, first : first + used.shape[2]] = used
            return new

        self.buffers = [rebuilt(*pair) for pair in zip(self.buffers, self.padding, strict=True)]
        for layer in self.cache.layers if self.joinable else ():
            layer.buffers = [rebuilt(buffer) for buffer in layer.buffers]
        self.replay, self.steps = None, 0
        self._moved(first, width)

    def _moved(self, first: int, width: int) -> None:
        for layer in self.cache.layers if self.joinable else ():
            layer.end += width - self.end
        self.start, self.end = first, width
