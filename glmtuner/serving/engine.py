"""Answers to many requests at once: every step of the model gives each of them its next token.

Requests join between two steps and leave when they have finished (glmtuner/inference/decoding.py). If a model's cache cannot
be joined row by row, waiting requests start together when the batch before them has finished.

Shape letters: B rows, V vocabulary.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtuner.data.records import Message
from glmtuner.inference.batch import Batch
from glmtuner.inference.decoding import Decoder, prefill_count

if TYPE_CHECKING:
    from glmtuner.inference.finished import Finished

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests are waiting as may wait."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen; temperature 0 is greedy decoding."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is simply the most likely one."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.needs_counts

    @property
    def needs_counts(self) -> bool:
        """Whether logits depend on how often each token was generated."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def processors(self) -> LogitsProcessorList:
        """transformers' logits processors, in the order in which `generate` applies them."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors


@dataclass(eq=False)
class Request:
    """One answer to be generated.

    `on_token` gets each token and returns whether to continue; `on_end` gets the reason why the answer ends: stop, length,
    cancelled or error. Both are called in the engine's thread. Set `cancelled` to end the answer early.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    on_token: Callable[[int], bool]
    on_end: Callable[[str], None]
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False


class Row:
    """A request in the batch."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self.processors = request.sampling.processors()
        self.generator: torch.Generator | None = None
        if request.sampling.seed is not None:
            self.generator = torch.Generator(device).manual_seed(request.sampling.seed)

    def choose(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The next token's id, a tensor without dimensions."""
        sampling, generated = self.request.sampling, self.request.generated
        scores_1V = logits_V[None]
        if sampling.needs_counts and generated:
            counts_V = torch.bincount(torch.tensor(generated, device=logits_V.device), minlength=len(logits_V))
            scores_1V = scores_1V - sampling.frequency_penalty * counts_V - sampling.presence_penalty * (counts_V > 0)
        if self.processors:
            ids = torch.tensor([[*self.request.prompt, *generated]], device=logits_V.device)
            scores_1V = self.processors(ids, scores_1V)  # type: ignore[arg-type]  # annotated LongTensor, a legacy type
        if sampling.temperature == 0:
            return scores_1V[0].argmax()
        return torch.multinomial(scores_1V[0].softmax(-1), 1, generator=self.generator)[0]

    def advance(self, token: int, stop_ids: Sequence[int]) -> str | None:
        """Add the token; returns the reason why the answer ends with it, None if it continues."""
        request = self.request
        if request.cancelled:
            return "cancelled"
        request.generated.append(token)
        if token in stop_ids or not request.on_token(token):
            return "stop"
        return "length" if len(request.generated) >= request.max_new_tokens else None


class Engine:
    """One thread that owns the model; `submit` may be called from any other.

    At most `max_rows` answers are generated at once, and at most `max_waiting` requests wait.
    """

    def __init__(self, finished: "Finished", max_rows: int, max_waiting: int) -> None:
        self.finished, self.max_rows, self.max_waiting = finished, max_rows, max_waiting
        self.decoder = Decoder(finished.model, finished.tokenizer.pad_token_id)
        self.batch: Batch | None = None
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()  # guards `waiting` and `closing`
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.largest_batch = 0  # rows of the largest step so far

    def start(self) -> None:
        """Check how the model takes padding, then serve. Raises ConfigError for a model that returns no cache.

        A model whose logits change when its prompt is padded (transformers' Bloom gives NaN) gets one row at a time.
        """
        finished = self.finished
        conversations = [[Message("user", "你好")], [Message("user", "你好，请用一句话介绍你自己。")]]
        short, long = (encoded.input_ids for encoded in finished.template.encode(finished.tokenizer, conversations))
        if not self.decoder.padding_invariant(short, long):
            self.max_rows = 1
        self.thread.start()

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def submit(self, request: Request) -> None:
        """Queue the request. Raises QueueFullError if too many are waiting."""
        with self.changed:
            if len(self.waiting) >= self.max_waiting:
                raise QueueFullError
            self.waiting.append(request)
            self.changed.notify()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.decoder.device

    def _run(self) -> None:
        """The thread's loop: prefill waiting requests, join them to the batch, then one step of the batch."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.waiting or self.batch)
                if self.closing:
                    break
            new_rows = self._admit()
            new_batch = self._guard(new_rows, partial(self._prefill, new_rows)) if new_rows else None
            if new_batch and self.batch:
                self.batch = self._guard([*self.batch.rows, *new_batch.rows], partial(self._join, new_batch))
            elif new_batch:
                self.batch = new_batch
            if self.batch:
                self.batch = self._guard(self.batch.rows, self._step)
        unfinished = [row.request for row in self.batch.rows if row] if self.batch else []
        for request in [*unfinished, *self.waiting]:
            request.on_end("cancelled")

    def _guard(self, rows: Sequence[Row | None], compute: Callable[[], Batch | None]) -> Batch | None:
        """What `compute` returns; if it raises (out of memory), the requests of these rows end with error, and no others."""
        try:
            with torch.no_grad():
                return compute()
        except Exception:
            log.exception("%d requests failed", len(rows))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for row in rows:
            if row is not None:
                row.request.on_end("error")
        return None

    def _admit(self) -> list[Row]:
        """Rows for the requests that start now: as many as there is room for beside the batch, in their order."""
        if self.batch and not self.batch.joinable:
            return []
        free = self.max_rows - (self.batch.num_active if self.batch else 0)
        with self.changed:
            for request in [request for request in self.waiting if request.cancelled]:
                self.waiting.remove(request)
                request.on_end("cancelled")
            count = prefill_count([request.prompt for request in islice(self.waiting, free)])
            return [Row(self.waiting.popleft(), self.device) for _ in range(count)]

    def _prefill(self, rows: list[Row]) -> Batch | None:
        """A batch of these rows with their first tokens; None if all end with these."""
        return self._advance(*self.decoder.prefill(rows, [row.request.prompt for row in rows]))

    def _join(self, new_batch: Batch) -> Batch:
        """The current batch with the rows of the new one."""
        assert self.batch is not None
        self.batch.join(new_batch)
        return self.batch

    def _step(self) -> Batch | None:
        """The current batch with each row's next token; None if all rows end with these."""
        assert self.batch is not None
        self.largest_batch = max(self.largest_batch, self.batch.num_active)
        return self._advance(self.batch, self.decoder.step(self.batch))

    def _advance(self, batch: Batch, logits_BV: torch.Tensor) -> Batch | None:
        """The batch with a new token in each row, without the rows that end with it; None if none is left."""
        tokens_B = logits_BV.argmax(-1)
        for row_id, row in enumerate(batch.rows):
            if row is not None and not row.request.sampling.is_greedy:
                tokens_B[row_id] = row.choose(logits_BV[row_id])
        ended: dict[int, tuple[Row, str]] = {}
        for row_id, (row, token) in enumerate(zip(batch.rows, tokens_B.tolist(), strict=True)):
            reason = row.advance(token, self.finished.stops) if row else None
            if reason:
                ended[row_id] = (row, reason)
        batch.append(tokens_B)
        batch.remove(ended)
        for row, reason in ended.values():
            row.request.on_end(reason)
        return batch if batch.num_active else None
