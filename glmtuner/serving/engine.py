"""Answers to many requests at once: every step gives each of them its next token, from one batch of the model.

Requests join between two steps and leave when they are done (continuous batching; Yu et al., Orca, OSDI 2022), as rows
of one left-padded key-value cache. Caches that cannot be joined row by row (sliding windows, linear attention) still
batch: those who wait start together when the batch before them is done.

Shape letters: B rows, W width, G key-value heads, D head dimension, V vocabulary.
"""

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from glmtuner.data.records import Message
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from glmtuner.assemble import Finished

log = logging.getLogger(__name__)
PREFILL = 8192  # prompt tokens, padding counted, that are read in one step: it bounds memory, and how long others wait
PADDED = 0.05  # the largest difference that padding may make, as a share of the largest logit: rounding makes less


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer's tokens are chosen; temperature 0 takes the likeliest."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the next token is simply the likeliest one."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.counts

    @property
    def counts(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """transformers' own, in the order in which `generate` applies them."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found


@dataclass(eq=False)
class Request:
    """One answer to be generated. `take` gets each token and tells whether to go on; `end` gets why it ended.

    Both are called in the engine's thread. The reason is stop, length, cancelled, or error.
    """

    prompt: Sequence[int]
    room: int  # tokens that may be generated
    sampling: Sampling
    take: Callable[[int], bool]
    end: Callable[[str], None]
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False


class Row:
    """A request in the batch."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self.processors = request.sampling.processors(device)
        self.generator: torch.Generator | None = None
        if request.sampling.seed is not None:
            self.generator = torch.Generator(device).manual_seed(request.sampling.seed)

    def choose(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The next token's id."""
        sampling, generated = self.request.sampling, self.request.generated
        scores_1V = logits_V[None]
        if sampling.counts and generated:
            counts = torch.bincount(torch.tensor(generated, device=logits_V.device), minlength=len(logits_V))
            scores_1V = scores_1V - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        if self.processors:
            ids = torch.tensor([[*self.request.prompt, *generated]], device=logits_V.device)
            scores_1V = self.processors(ids, scores_1V)
        if sampling.temperature == 0:
            return scores_1V[0].argmax()
        return torch.multinomial(scores_1V[0].softmax(-1), 1, generator=self.generator)[0]

    def advance(self, token: int, stops: Sequence[int]) -> str | None:
        """Why the answer ends with this token; None when it goes on."""
        request = self.request
        if request.cancelled:
            return "cancelled"
        request.generated.append(token)
        if token in stops or not request.take(token):
            return "stop"
        return "length" if len(request.generated) >= request.room else None


@dataclass
class Batch:
    """Rows with their tokens [B, W], which of them are not padding [B, W], and the cache of all but the last one."""

    rows: list[Row | None]  # None: done, in a cache whose rows cannot leave
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Cache

    @property
    def joinable(self) -> bool:
        """Whether rows can join and leave: only keys and values of every token are kept."""
        return type(self.cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    @property
    def live(self) -> int:
        return sum(row is not None for row in self.rows)

    def joined(self, other: "Batch") -> "Batch":
        """Both batches as one, the narrower one padded on the left."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        for batch in (self, other):
            missing = width - batch.ids.shape[1]
            batch.ids = torch.nn.functional.pad(batch.ids, (missing, 0))
            batch.mask = torch.nn.functional.pad(batch.mask, (missing, 0))
            for layer in batch.cache.layers:
                layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, missing, 0))
                layer.values = torch.nn.functional.pad(layer.values, (0, 0, missing, 0))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        ids, mask = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        return Batch([*self.rows, *other.rows], ids, mask, self.cache)

    def without(self, done: set[int]) -> "Batch | None":
        """The batch without these rows, and without columns that were padding for all others; None when none is left."""
        if len(done) == len(self.rows):
            return None
        if not self.joinable:
            rows = [None if place in done else row for place, row in enumerate(self.rows)]
            return Batch(rows, self.ids, self.mask, self.cache) if any(rows) else None
        kept = [place for place in range(len(self.rows)) if place not in done]
        places = torch.tensor(kept, device=self.ids.device)
        ids, mask = self.ids[places], self.mask[places]
        first = int(mask.any(dim=0).int().argmax())
        for layer in self.cache.layers:
            layer.keys = layer.keys[places, :, first:]
            layer.values = layer.values[places, :, first:]
        return Batch([self.rows[place] for place in kept], ids[:, first:], mask[:, first:], self.cache)

    def widened(self, tokens: torch.Tensor) -> None:
        """Each row gets its next token, [B]."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)


class Engine:
    """One thread that owns the model; `submit` may be called from any other.

    `most_rows` answers are generated at once, and `most_waiting` requests may wait for their turn.
    """

    def __init__(self, finished: "Finished", most_rows: int, most_waiting: int) -> None:
        self.finished, self.most_rows, self.most_waiting = finished, most_rows, most_waiting
        model: Any = finished.model
        # an adapter's layers stand in the base model itself; PEFT's wrapper adds nothing to its forward pass
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.accepted = inspect.signature(self.model.forward).parameters
        self.batch: Batch | None = None
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.largest_batch = 0  # rows of the largest step so far

    def start(self) -> None:
        """Try the model, then serve. Raises ConfigError for a model that keeps no cache between steps.

        A model that answers otherwise when its prompt is padded (transformers' Bloom gives NaN) gets one row at a time.
        """
        finished = self.finished
        conversations = [[Message("user", "你好")], [Message("user", "你好，请用一句话介绍你自己。")]]
        short, long = (
            Row(
                Request(found.input_ids, 1, Sampling(temperature=0), lambda token: True, lambda reason: None),
                self.device,
            )
            for found in finished.template.encode(finished.tokenizer, conversations)
        )
        alone, beside = self._read([short])[1][0], self._read([short, long])[1][0]
        if not (alone - beside).abs().max() <= PADDED * alone.abs().max():
            self.most_rows = 1
        self.thread.start()

    def close(self) -> None:
        """End every answer, and the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def submit(self, request: Request) -> None:
        """Queue the request. Raises Busy when too many wait."""
        with self.changed:
            if len(self.waiting) >= self.most_waiting:
                raise Busy
            self.waiting.append(request)
            self.changed.notify()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.waiting or self.batch)
                if self.closing:
                    break
            joining = self._admitted()
            read = self._guarded(joining, self._begin, joining) if joining else None
            if read and self.batch:
                self.batch = self._guarded([*self.batch.rows, *read.rows], self.batch.joined, read)
            elif read:
                self.batch = read
            if self.batch:
                self.batch = self._guarded(self.batch.rows, self._step, self.batch)
        left = [row.request for row in self.batch.rows if row] if self.batch else []
        for request in [*left, *self.waiting]:
            request.end("cancelled")

    def _guarded(
        self, rows: Sequence[Row | None], work: Callable[..., Batch | None], *given: list[Row] | Batch
    ) -> Batch | None:
        """What `work` gives; when it fails (out of memory), the requests of these rows fail, and no others."""
        try:
            with torch.no_grad():
                return work(*given)
        except Exception:
            log.exception("%d requests failed", len(rows))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for row in rows:
            if row is not None:
                row.request.end("error")
        return None

    def _admitted(self) -> list[Row]:
        """The requests whose turn has come: those that fit beside the ones being answered, in the order they came."""
        if self.batch and not self.batch.joinable:
            return []
        free = self.most_rows - (self.batch.live if self.batch else 0)
        found: list[Row] = []
        longest = 0
        with self.changed:
            while self.waiting and len(found) < free:
                request = self.waiting[0]
                if request.cancelled:
                    self.waiting.popleft().end("cancelled")
                    continue
                longest = max(longest, len(request.prompt))
                if found and longest * (len(found) + 1) > PREFILL:
                    break
                found.append(Row(self.waiting.popleft(), self.device))
        return found

    def _begin(self, rows: list[Row]) -> Batch | None:
        """A batch of these rows with their first tokens; None when these were their last."""
        return self._chosen(*self._read(rows))

    def _step(self, batch: Batch) -> Batch | None:
        self.largest_batch = max(self.largest_batch, batch.live)
        return self._chosen(batch, self._forward(batch, new=1))

    def _read(self, rows: list[Row]) -> tuple[Batch, torch.Tensor]:
        """The rows' prompts in a batch of their own, and the logits behind them, [B, V]."""
        width = max(len(row.request.prompt) for row in rows)
        padded = [[0] * (width - len(row.request.prompt)) + list(row.request.prompt) for row in rows]
        lengths = torch.tensor([len(row.request.prompt) for row in rows], device=self.device)
        mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        ids = torch.tensor(padded, device=self.device)
        ids = ids.masked_fill(mask == 0, self.finished.tokenizer.pad_token_id)
        batch = Batch(list(rows), ids, mask, None)  # type: ignore[arg-type]  # the model makes the cache that it needs
        with torch.no_grad():
            return batch, self._forward(batch, new=None)

    def _forward(self, batch: Batch, new: int | None) -> torch.Tensor:
        """The logits behind the last token, [B, V]; the last `new` tokens are read, all of them when None."""
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            options["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        inputs = self.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=new, past_key_values=batch.cache, attention_mask=batch.mask,
            is_first_iteration=new is None, use_cache=True, **options,
        )  # fmt: skip
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        out = self.model(**inputs)
        cache = getattr(out, "past_key_values", None)
        if not isinstance(cache, Cache):
            name = type(self.model).__name__
            raise ConfigError(f"{name} gives no transformers Cache for its next step, so it cannot be served; chat can")
        batch.cache = cache
        return out.logits[:, -1].float()

    def _chosen(self, batch: Batch, logits: torch.Tensor) -> "Batch | None":
        """The batch with a new token a row, and without the rows that this ended."""
        tokens = logits.argmax(-1)
        for place, row in enumerate(batch.rows):
            if row is not None and not row.request.sampling.plain:
                tokens[place] = row.choose(logits[place])
        ended = {}
        for place, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            reason = row.advance(token, self.finished.stops) if row else None
            if row and reason:
                ended[place] = (row, reason)
        batch.widened(tokens)
        left = batch.without(set(ended)) if ended else batch
        for row, reason in ended.values():
            row.request.end(reason)
        return left
