"""Answers to many requests at once: every step of the model gives each of them its next token.

Requests join between two steps and leave when they have finished (glmtuner/inference/decoding.py). If a model's cache cannot
be joined row by row, waiting requests start together when the batch before them has finished.

A request whose tokens nobody takes is paused: it leaves the batch, and its prompt and tokens so far are read again when it
continues. A request that fails (logits that are not finite, an error in its own callbacks) ends alone.

Shape letters: B rows, V vocabulary.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from glmtuner.distributed import accelerator
from glmtuner.inference.batch import Batch
from glmtuner.inference.decoding import FAILED, Decoder, most_likely, prefill_count

if TYPE_CHECKING:
    from glmtuner.inference.finished import Finished

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-6  # below it, sampling is greedy decoding: logits divided by less overflow


class QueueFullError(Exception):
    """As many requests are waiting as may wait."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen; a temperature below MIN_TEMPERATURE is greedy decoding."""

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
        return not self.draws and self.repetition_penalty == 1 and not self.needs_counts

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn at random."""
        return self.temperature >= MIN_TEMPERATURE

    @property
    def needs_counts(self) -> bool:
        """Whether logits depend on how often each token was generated."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def processors(self) -> LogitsProcessorList:
        """transformers' logits processors, in the order in which `generate` applies them."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.draws and self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.draws and self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.draws and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors


@dataclass(eq=False)
class Request:
    """One answer to be generated.

    `on_token` gets each token and returns whether to continue; `on_end` gets the reason why the answer ends: stop, length,
    cancelled or error. Both are called in the engine's thread. Set `cancelled` to end the answer early, and `paused` while
    its tokens are not taken; call the engine's `wake` after setting it to False again. The answer begins with one of `begins`
    if there are any.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    on_token: Callable[[int], bool]
    on_end: Callable[[str], None]
    begins: Sequence[Sequence[int]] = ()
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False
    paused: bool = False

    def allowed(self) -> list[int]:
        """The tokens of which the next one must be one; [] if it may be any."""
        length = len(self.generated)
        if not any(length < len(begin) for begin in self.begins):
            return []
        if any(self.generated[: len(begin)] == list(begin) for begin in self.begins):
            return []
        return sorted({begin[length] for begin in self.begins if list(begin[:length]) == self.generated})

    def end(self, reason: str) -> None:
        """Call `on_end`; an error in it is logged and concerns no other request."""
        try:
            self.on_end(reason)
        except Exception:
            log.exception("a request's end could not be reported")


class Row:
    """A request in the batch; `start` is where it enters: its prompt, and after a pause its tokens so far, too."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request, self.start = request, request.prompt
        self.processors = request.sampling.processors()
        self.generator: torch.Generator | None = None
        if request.sampling.seed is not None:
            self.generator = torch.Generator(device).manual_seed(request.sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is simply the most likely one."""
        return self.request.sampling.is_greedy and not self.request.allowed()

    def choose(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The next token's id, a tensor without dimensions; FAILED if the row's logits are not finite."""
        sampling, generated = self.request.sampling, self.request.generated
        if allowed := self.request.allowed():
            return self._choose_of(logits_V, allowed)
        scores_1V = logits_V[None]
        if sampling.needs_counts and generated:
            counts_V = torch.bincount(torch.tensor(generated, device=logits_V.device), minlength=len(logits_V))
            scores_1V = scores_1V - sampling.frequency_penalty * counts_V - sampling.presence_penalty * (counts_V > 0)
        if self.processors:
            ids = torch.tensor([[*self.request.prompt, *generated]], device=logits_V.device)
            scores_1V = self.processors(ids, scores_1V)  # type: ignore[arg-type]  # annotated LongTensor, a legacy type
        if not sampling.draws:
            return most_likely(scores_1V)[0]
        probabilities_V = scores_1V[0].softmax(-1)  # all are NaN if one logit is NaN or infinite, or none is above -inf
        # a CUDA kernel that draws from NaN ends the process's use of the GPU, so such rows draw from something else
        token = torch.multinomial(probabilities_V.nan_to_num(nan=1.0), 1, generator=self.generator)[0]
        return token.where(probabilities_V[0].isfinite(), FAILED)

    def _choose_of(self, logits_V: torch.Tensor, allowed: Sequence[int]) -> torch.Tensor:
        """The next token's id, of these: the most likely one, or one drawn at the request's temperature."""
        ids = torch.tensor(allowed, device=logits_V.device)
        logits = logits_V[ids].float()
        if not self.request.sampling.draws:
            token = ids[logits.argmax()]
        else:
            probabilities = (logits / self.request.sampling.temperature).softmax(-1)
            token = ids[torch.multinomial(probabilities.nan_to_num(nan=1.0), 1, generator=self.generator)[0]]
        return token.where(logits.isfinite().all(), FAILED)

    def advance(self, token: int, stop_ids: Sequence[int]) -> str | None:
        """Add the token; returns the reason why the answer ends with it, None if it continues."""
        request = self.request
        if request.cancelled:
            return "cancelled"
        if token == FAILED:
            log.error("a request failed: the model's logits for it are not finite")
            return "error"
        request.generated.append(token)
        if token in stop_ids or not request.on_token(token):
            return "stop"
        return "length" if len(request.generated) >= request.max_new_tokens else None


def request_of(row: Row | Request) -> Request:
    """The request that waits, alone or as a row that was paused."""
    return row.request if isinstance(row, Row) else row


class Engine:
    """One thread that owns the model; `submit` may be called from any other.

    At most `max_rows` answers are generated at once, and at most `max_waiting` requests wait.
    """

    def __init__(self, finished: "Finished", max_rows: int, max_waiting: int) -> None:
        self.finished, self.max_rows, self.max_waiting = finished, max_rows, max_waiting
        self.decoder = Decoder(finished.model, finished.tokenizer.pad_token_id)
        self.batch: Batch | None = None
        self.waiting: deque[Row | Request] = deque()  # a row continues after a pause
        self.paused: list[Row] = []
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

    def submit(self, *requests: Request) -> None:
        """Queue the requests, all or none. Raises QueueFullError if too many are waiting."""
        with self.changed:
            if len(self.waiting) + len(requests) > self.max_waiting:
                raise QueueFullError
            self.waiting.extend(requests)
            self.changed.notify()

    def wake(self) -> None:
        """Let a request that was paused, or that was cancelled while it was, go on."""
        with self.changed:
            self.changed.notify()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.decoder.device

    def _run(self) -> None:
        """The thread's loop: prefill waiting requests, join them to the batch, then one step of the batch."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.waiting or self.batch or self._resumable())
                if self.closing:
                    break
            self._resume()
            new_rows = self._admit()
            new_batch = self._guard(new_rows, partial(self._prefill, new_rows)) if new_rows else None
            if new_batch and self.batch:
                self.batch = self._guard([*self.batch.rows, *new_batch.rows], partial(self._join, new_batch))
            elif new_batch:
                self.batch = new_batch
            if self.batch:
                self.batch = self._guard(self.batch.rows, self._step)
        rows = [row for row in self.batch.rows if row] if self.batch else []
        for row in [*rows, *self.paused, *self.waiting]:
            request_of(row).end("cancelled")

    def _guard(self, rows: Sequence[Row | None], compute: Callable[[], Batch | None]) -> Batch | None:
        """What `compute` returns; if it raises (out of memory), the requests of these rows end with error, and no others."""
        unfinished = [row for row in rows if row is not None]
        try:
            with torch.no_grad():
                return compute()
        except Exception:
            log.exception("%d requests failed", len(unfinished))
        accelerator.empty_cache()
        for row in unfinished:
            row.request.end("error")
        return None

    def _resumable(self) -> list[Row]:
        """Rows whose requests are paused no longer, or were cancelled meanwhile."""
        return [row for row in self.paused if not row.request.paused or row.request.cancelled]

    def _resume(self) -> None:
        """Move them to the head of the queue."""
        for row in self._resumable():
            self.paused.remove(row)
            row.start = [*row.request.prompt, *row.request.generated]
            with self.changed:
                self.waiting.appendleft(row)

    def _admit(self) -> list[Row]:
        """Rows for the requests that start now: as many as there is room for beside the batch, in their order."""
        with self.changed:
            cancelled = [row for row in self.waiting if request_of(row).cancelled]
            for row in cancelled:
                self.waiting.remove(row)
        for row in cancelled:
            request_of(row).end("cancelled")
        if self.batch and not self.batch.joinable:
            return []
        free = self.max_rows - (self.batch.num_active if self.batch else 0)
        with self.changed:
            starts = [row.start if isinstance(row, Row) else row.prompt for row in islice(self.waiting, free)]
            admitted = [self.waiting.popleft() for _ in range(prefill_count(starts))]
        rows = []
        for row in admitted:
            try:
                rows.append(row if isinstance(row, Row) else Row(row, self.device))
            except Exception:
                log.exception("a request's sampling values cannot be used")
                request_of(row).end("error")
        return rows

    def _prefill(self, rows: list[Row]) -> Batch | None:
        """A batch of these rows with their first tokens; None if all end with these."""
        return self._advance(*self.decoder.prefill(rows, [row.start for row in rows]))

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
        """The batch with a new token in each row, without the rows that end with it or pause; None if none is left."""
        tokens_B = most_likely(logits_BV)
        errors: set[int] = set()
        for row_id, row in enumerate(batch.rows):
            if row is not None and not row.is_greedy:
                with self._alone(row_id, errors):
                    tokens_B[row_id] = row.choose(logits_BV[row_id])
        left: dict[int, tuple[Row, str | None]] = {}  # rows that leave the batch, and why; None: it is paused
        for row_id, (row, token) in enumerate(zip(batch.rows, tokens_B.tolist(), strict=True)):
            if row is None:
                continue
            reason: str | None = None
            if row_id not in errors:
                with self._alone(row_id, errors):
                    reason = row.advance(token, self.finished.stops)
            if row_id in errors:
                reason = "error"
            if reason or row.request.paused:
                left[row_id] = (row, reason)
        batch.append(tokens_B.clamp(min=0))
        # keys and values that are not finite must not stay where another row will have masked columns: 0 times NaN is NaN
        batch.clear(row_id for row_id, (_, reason) in left.items() if reason == "error")
        batch.remove(left)
        for row, reason in left.values():
            if reason:
                row.request.end(reason)
            else:
                self.paused.append(row)
        return batch if batch.num_active else None

    @contextmanager
    def _alone(self, row_id: int, errors: set[int]) -> Iterator[None]:
        """Log an error of one row and add the row to `errors`."""
        try:
            yield
        except Exception:
            log.exception("a request failed")
            errors.add(row_id)
