"""A batch of sequences that are being generated: tokens, masks and the key-value cache; rows join and leave between steps."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

SPARE_COLUMNS = 64  # free columns that a new buffer has at least


class RecordedStep(Protocol):
    """A decoding step that was recorded on a batch's buffers (replay.py)."""

    def step(self, batch: "Batch") -> torch.Tensor:
        """The logits after each row's last token, [B, V]."""


class BufferedLayer(DynamicLayer):
    """One layer's keys and values, [B, G, W, D]: views of preallocated buffers [R, G, C, D]; the batch moves the window."""

    def __init__(self, layer: DynamicLayer, batch: "Batch") -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.batch, self.end = batch, layer.keys.shape[2]
        self.buffers = [layer.keys, layer.values]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns and return keys and values: of the columns in use, or of whole buffers in a replayed step."""
        if self.batch.write_column is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.batch.write_column, states)
            return self.buffers[0], self.buffers[1]
        first, self.end = self.end, self.end + key_states.shape[2]
        rows, start = len(self.batch.rows), self.batch.start
        keys, values = self.buffers
        keys[:rows, :, first : self.end] = key_states
        values[:rows, :, first : self.end] = value_states
        self.keys, self.values = keys[:rows, :, start : self.end], values[:rows, :, start : self.end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many columns are in use, padding included."""
        return self.end - self.batch.start


class Batch:
    """Rows with their tokens, and the cache of all tokens but the last of each row.

    `rows` are the caller's own objects, one per sequence; None marks a row that has finished and cannot be removed.
    """

    def __init__(
        self, rows: Sequence[Any], prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
    ) -> None:
        self.rows, self.lengths = list(rows), [len(prompt) for prompt in prompts]  # tokens without padding
        self.start, self.end = 0, max(self.lengths)
        self.padding = [pad_id, 0]  # of ids and of mask
        # the last column is for the first generated tokens
        ids = [[pad_id] * (self.end - len(prompt)) + [*prompt, pad_id] for prompt in prompts]
        mask = [[0] * (self.end - length) + [1] * length + [0] for length in self.lengths]
        # ids and mask are [R, 1, C], so that columns are the third dimension of every buffer
        self.buffers = [torch.tensor(values, device=device)[:, None] for values in (ids, mask)]
        self.cache: Any = None
        self.joinable = False
        self.write_column: torch.Tensor | None = None  # index of the column that a replayed step writes, [1]
        self.replay: RecordedStep | None = None  # of a step on these buffers
        self.steps = 0  # since the buffers were allocated

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, left-padded, [B, W]."""
        return self.buffers[0][: len(self.rows), 0, self.start : self.end]

    @property
    def mask(self) -> torch.Tensor:
        """1 for a token, 0 for padding, [B, W]."""
        return self.buffers[1][: len(self.rows), 0, self.start : self.end]

    @property
    def num_active(self) -> int:
        """How many rows have not finished."""
        return sum(row is not None for row in self.rows)

    def adopt_cache(self, cache: Cache) -> None:
        """Take over the cache that the model made of the prompts; plain caches become buffers, so that rows can join."""
        self.joinable = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        if self.joinable:
            cache.layers = [BufferedLayer(layer, self) for layer in cache.layers if isinstance(layer, DynamicLayer)]
        self.cache = cache

    def repeat(self, rows: Sequence[Any], indices: torch.Tensor) -> None:
        """Replace the rows by these, each a copy of the old row at its index in `indices`, [number of new rows]."""
        self.rows, self.lengths = list(rows), [self.lengths[index] for index in indices.tolist()]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        if self.joinable:
            for layer in self.cache.layers:
                layer.buffers = [buffer[indices] for buffer in layer.buffers]
        else:
            self.cache.reorder_cache(indices)

    def append(self, tokens_B: torch.Tensor) -> None:
        """Add each row's next token, in a new column."""
        self.buffers[0][: len(self.rows), 0, self.end] = tokens_B
        self.buffers[1][: len(self.rows), 0, self.end] = 1
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def ensure_capacity(self) -> None:
        """Make room for the last token in the cache and for one more token in every row."""
        if self.end + 1 > self.num_columns:
            self._resize(len(self.rows), self.end - self.start)

    @property
    def num_columns(self) -> int:
        """How many columns every buffer has."""
        return min(buffer.shape[2] for buffer in self._all_buffers())

    def join(self, other: "Batch") -> None:
        """Add the rows of another batch; both must be `joinable`."""
        count, total = len(self.rows), len(self.rows) + len(other.rows)
        width = other.end - other.start
        if total > self.buffers[0].shape[0] or width > self.end:
            self._resize(total, max(width, self.end - self.start))
        for target, source in zip(self._all_buffers(), other._all_buffers(), strict=True):
            columns = slice(other.start, min(other.end, source.shape[2]))
            first = self.end - width
            target[count:total, :, first : first + columns.stop - columns.start] = source[: len(other.rows), :, columns]
        for buffer, padding in zip(self.buffers, self.padding, strict=True):
            buffer[count:total, :, : self.end - width] = padding  # over what rows that have left wrote there
        self.rows += other.rows
        self.lengths += other.lengths
        self._trim()

    def clear(self, rows: Iterable[int]) -> None:
        """Set the keys and values of these rows to 0; the rows must be removed next."""
        for index in rows:
            for buffer in self._all_buffers()[len(self.buffers) :]:
                buffer[index] = 0

    def remove(self, finished: Iterable[int]) -> None:
        """Remove the rows with these indices, and columns that are padding in all others; last rows take their places.

        Rows of a batch that is not `joinable` become None.
        """
        indices = sorted(finished, reverse=True)
        if not self.joinable:
            for index in indices:
                self.rows[index] = None
            return
        for index in indices:
            last = len(self.rows) - 1
            if index != last:
                for buffer in self._all_buffers():
                    buffer[index, :, : self.end] = buffer[last, :, : self.end]
                self.rows[index], self.lengths[index] = self.rows[last], self.lengths[last]
            del self.rows[last], self.lengths[last]
        self._trim()

    def _trim(self) -> None:
        self.start = self.end - max(self.lengths, default=0)

    def _all_buffers(self) -> list[torch.Tensor]:
        caches = [buffer for layer in self.cache.layers for buffer in layer.buffers] if self.joinable else []
        return [*self.buffers, *caches]

    def _resize(self, rows: int, width: int) -> None:
        """Move the columns in use so that they end at column `width`, with room for `rows` rows and for more columns.

        They stay in their buffers where these are large enough, else they are copied to new ones.
        """
        capacity, first = self.buffers[0].shape[0], width - (self.end - self.start)
        if rows <= capacity and width + SPARE_COLUMNS <= self.num_columns:
            for buffer in self._all_buffers():
                used = buffer[: len(self.rows), :, self.start : self.end].clone()
                buffer[: len(self.rows), :, first : first + used.shape[2]] = used
            for buffer, padding in zip(self.buffers, self.padding, strict=True):
                buffer[:, :, :first] = buffer[:, :, width:] = padding  # where the columns were before
            self._set_window(first, width)
            return
        rows = capacity if rows <= capacity else max(rows, 2 * capacity)
        columns = (
            -(-(width + max(SPARE_COLUMNS, width // 2)) // 8) * 8
        )  # a multiple of 8, as attention kernels read masks

        def reallocated(old: torch.Tensor, padding: int = 0) -> torch.Tensor:
            # filled, not empty: masked values must be finite, too
            new = old.new_full((rows, old.shape[1], columns, *old.shape[3:]), padding)
            used = old[: len(self.rows), :, self.start : self.end]
            new[: len(self.rows), :, first : first + used.shape[2]] = used
            return new

        self.buffers = [reallocated(*pair) for pair in zip(self.buffers, self.padding, strict=True)]
        for layer in self.cache.layers if self.joinable else ():
            layer.buffers = [reallocated(buffer) for buffer in layer.buffers]
        self.replay, self.steps = None, 0
        self._set_window(first, width)

    def _set_window(self, start: int, end: int) -> None:
        for layer in self.cache.layers if self.joinable else ():
            layer.end += end - self.end
        self.start, self.end = start, end
