"""The next tokens of many prompts at once, as rows of one batch that join and leave it between two tokens.

This is continuous batching (Yu et al., Orca, OSDI 2022). Each row ends in the last column (left padding), so all rows get
their next token in one column. Keys and values stand in buffers with room for more columns: a token is written into them,
where transformers' cache copies itself for every token.
Caches that are more than keys and values of every token (sliding windows, linear attention) cannot be joined row by row;
such rows start together, and a row that is done stays in the batch until all are.

A step of a large model is a thousand small kernels and more, and starting them one by one from Python takes longer than a GPU
takes to run them. So where a batch's buffers stay the same, a step is recorded as a CUDA graph and replayed
(glmtuner/replay.py).

Shape letters: B rows, W columns in use, R rows and C columns of a buffer, G key-value heads, D head dimension, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.replay import Recorder, Replay, can_replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL = 8192  # prompt tokens, padding counted, that are read in one step: it bounds memory, and how long others wait
PADDED = 0.05  # the largest difference that padding may make, as a share of the largest logit: rounding makes less
SPARE = 64  # columns that a buffer has at least to spare when it is made
FIRST_RECORDED = 3  # step on the same buffers that is recorded: many batches end sooner


class NoCache(ConfigError):
    """The model gives no transformers Cache for its next step."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} gives no transformers Cache for its next step, so it cannot be served; chat can")


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
        self.replay: Replay | None = None  # of a step on these buffers
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


class Decoder:
    """A model that reads prompts and gives the logits behind them, and behind every further token of a batch.

    `replays` says whether steps are recorded and replayed; where nothing is said, they are on a GPU.
    """

    def __init__(self, model: "PreTrainedModel", pad_id: int, replays: bool | None = None) -> None:
        # an adapter's layers stand in the base model itself; PEFT's wrapper adds nothing to its forward pass
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        # weights shared out by torch are gathered by the module that was given to it
        self.forward: Any = model if isinstance(model, FSDPModule) else self.model
        self.accepted = inspect.signature(self.model.forward).parameters
        self.pad_id = pad_id
        wanted = self.device.type == "cuda" if replays is None else replays
        self.recorder = Recorder(self.model, self.accepted) if wanted and can_replay(model, self.model) else None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def pads(self, short: Sequence[int], long: Sequence[int]) -> bool:
        """Whether the model answers the shorter prompt alike beside the longer one (transformers' Bloom gives NaN).

        Raises ConfigError for a model that keeps no cache between steps.
        """
        alone, beside = self.read([0], [short])[1][0], self.read([0, 1], [short, long])[1][0]
        return bool((alone - beside).abs().max() <= PADDED * alone.abs().max())

    def read(self, rows: Sequence[Any], prompts: Sequence[Sequence[int]]) -> tuple[Batch, torch.Tensor]:
        """A batch of these rows, and the logits behind their prompts, [B, V]."""
        batch = Batch(rows, prompts, self.pad_id, self.device)
        return batch, self._forward(batch, new=None)

    def step(self, batch: Batch) -> torch.Tensor:
        """The logits behind each row's last token, [B, V]."""
        batch.make_room()
        batch.steps += 1
        if batch.replay is not None:
            return batch.replay.step(batch)
        logits_BV = self._forward(batch, new=1)
        if self.recorder is not None and batch.joinable and batch.steps == FIRST_RECORDED:
            batch.replay = self.recorder.recorded(batch, logits_BV)
            if batch.replay is None:
                say(f"steps of generation are not replayed as CUDA graphs: {self.recorder.refused}")
                self.recorder = None
        return logits_BV

    @torch.no_grad()
    def _forward(self, batch: Batch, new: int | None) -> torch.Tensor:
        """The last `new` tokens are read, all of them when None."""
        mask = batch.mask
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            counted = mask.sum(-1, keepdim=True) if new else mask.cumsum(-1).clamp(min=1)
            options["position_ids"] = counted - 1
        inputs = self.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=new, past_key_values=batch.cache, attention_mask=mask,
            is_first_iteration=new is None, use_cache=True, **options,
        )  # fmt: skip
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        out = self.forward(**inputs)
        cache = getattr(out, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise NoCache(type(self.model).__name__)
        if cache is not batch.cache:
            batch.keep(cache)
        return out.logits[:, -1].float()


def greedy(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    room: int,
    stops: Sequence[int],
    repetition_penalty: float,
) -> Iterator[tuple[int, list[int]]]:
    """(place in `prompts`, the likeliest tokens behind it up to and with the first of `stops`), as they are done.

    At most `rows` prompts are answered at once and `room` tokens generated for each; they start in their order.
    """
    processor = RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty != 1 else None
    batch: Batch | None = None
    begun = 0

    def chosen(group: Batch, logits_BV: torch.Tensor) -> list[tuple[int, list[int]]]:
        if processor:
            # a row's padding counts as its last token, so that nothing but its own tokens is penalized
            logits_BV = processor(group.ids.where(group.mask.bool(), group.ids[:, -1:]), logits_BV)
        tokens_B = logits_BV.argmax(-1)
        done: list[int] = []
        for place, (row, token) in enumerate(zip(group.rows, tokens_B.tolist(), strict=True)):
            if row is not None:
                row[1].append(token)
                if token in stops or len(row[1]) == room:
                    done.append(place)
        group.widen(tokens_B)
        ended = [group.rows[place] for place in done]
        group.leave(done)
        return ended

    while begun < len(prompts) or batch:
        free = rows - batch.live if batch else rows
        # prompts are read an eighth of the rows at a time: one by one, each would cost what a step of all rows does
        waits = free < min(max(rows // 8, 1), len(prompts) - begun)
        if begun < len(prompts) and (batch is None or (batch.joinable and not waits)):
            count = taken(prompts[begun : begun + free])
            group = [(place, []) for place in range(begun, begun + count)]
            begun += count
            read, logits_BV = decoder.read(group, prompts[group[0][0] : begun])
            yield from chosen(read, logits_BV)
            if batch is None:
                batch = read
            elif read.rows:
                batch.join(read)
        else:
            yield from chosen(batch, decoder.step(batch))
        if not batch.live:
            batch = None


def taken(prompts: Sequence[Sequence[int]]) -> int:
    """How many of these prompts, at least one, are read together."""
    longest = 0
    for count, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if count and longest * (count + 1) > PREFILL:
            return count
    return len(prompts)
