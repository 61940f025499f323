"""Answers to many requests at once: every step gives each of them its next token, from one batch of the model.

Requests join between two steps and leave when they are done (glmtuner/inference/decoding.py). Where a cache cannot be joined row by
row, those who wait start together when the batch before them is done.

Shape letters: B rows, V vocabulary.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


class Engine:
    """One thread that owns the model; `submit` may be called from any other.

    `most_rows` answers are generated at once, and `most_waiting` requests may wait for their turn.
    """

    def __init__(self, finished: "Finished", most_rows: int, most_waiting: int) -> None:
        self.finished, self.most_rows, self.most_waiting = finished, most_rows, most_waiting
        self.decoder = Decoder(finished.model, finished.tokenizer.pad_token_id)
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
        short, long = (found.input_ids for found in finished.template.encode(finished.tokenizer, conversations))
        if not self.decoder.padding_invariant(short, long):
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
        return self.decoder.device

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.waiting or self.batch)
                if self.closing:
                    break
            joining = self._admitted()
            read = self._guarded(joining, self._begin, joining) if joining else None
            if read and self.batch:
                self.batch = self._guarded([*self.batch.rows, *read.rows], self._joined, self.batch, read)
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
        with self.changed:
            for request in [request for request in self.waiting if request.cancelled]:
                self.waiting.remove(request)
                request.end("cancelled")
            count = prefill_count([request.prompt for request in islice(self.waiting, free)])
            return [Row(self.waiting.popleft(), self.device) for _ in range(count)]

    def _begin(self, rows: list[Row]) -> Batch | None:
        """A batch of these rows with their first tokens; None when these were their last."""
        return self._chosen(*self.decoder.prefill(rows, [row.request.prompt for row in rows]))

    def _joined(self, batch: Batch, other: Batch) -> Batch:
        batch.join(other)
        return batch

    def _step(self, batch: Batch) -> Batch | None:
        self.largest_batch = max(self.largest_batch, batch.live)
        return self._chosen(batch, self.decoder.step(batch))

    def _chosen(self, batch: Batch, logits_BV: torch.Tensor) -> Batch | None:
        """The batch with a new token a row, and without the rows that this ended; None when none is left."""
        tokens_B = logits_BV.argmax(-1)
        for place, row in enumerate(batch.rows):
            if row is not None and not row.request.sampling.plain:
                tokens_B[place] = row.choose(logits_BV[place])
        ended = {}
        for place, (row, token) in enumerate(zip(batch.rows, tokens_B.tolist(), strict=True)):
            reason = row.advance(token, self.finished.stops) if row else None
            if reason:
                ended[place] = (row, reason)
        batch.widen(tokens_B)
        batch.leave(ended)
        for row, reason in ended.values():
            row.request.end(reason)
        return batch if batch.live else None
