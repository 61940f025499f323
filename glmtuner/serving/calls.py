"""A chat request while it is answered: what the engine's tokens become, and how far the client has read."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from glmtuner.console import say
from glmtuner.inference.finished import Finished
from glmtuner.inference.generate import AnswerText
from glmtuner.serving.engine import Request
from glmtuner.serving.protocol import ChatRequest

MAX_UNSENT = 256  # deltas that wait for a client to read: at so many, its answer is paused

log = logging.getLogger(__name__)


class Delta(NamedTuple):
    """New text of one choice of a request; `finish_reason` is None until the choice ends."""

    choice: int
    text: str
    finish_reason: str | None


class Choice:
    """One answer of a request: turns the engine's tokens into deltas and passes them to `emit`, in the engine's thread."""

    def __init__(self, index: int, finished: Finished, stops: list[str], emit: Callable[[Delta], None]) -> None:
        self.index, self.stop_ids, self.emit = index, finished.stops, emit
        self.text = AnswerText(finished.tokenizer, stops)

    def on_token(self, token: int) -> bool:
        """Take the engine's next token; False if a stop token or a stop text ends the answer."""
        if token in self.stop_ids:
            return False
        text = self.text.put(token)
        if text:
            self.emit(Delta(self.index, text, None))
        return not self.text.stopped

    def on_end(self, reason: str) -> None:
        """Emit the remaining text and the finish reason."""
        text = ""
        if reason in ("stop", "length") and not self.text.stopped:
            try:
                text = self.text.finish()
                reason = "stop" if self.text.stopped else reason
            except Exception:
                log.exception("the end of an answer cannot be decoded")
                reason = "error"
        self.emit(Delta(self.index, text, reason))


@dataclass(eq=False)
class Call:
    """A chat request in progress: its requests to the engine, one per choice, and the deltas that these produce."""

    chat: ChatRequest
    prompt: list[int]
    started: float
    requests: list[Request] = field(default_factory=list)
    deltas: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    unsent: int = 0  # deltas that the engine has emitted and the response has not taken
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards `unsent` and the requests' `paused`

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in the API's form."""
        generated = sum(len(request.generated) for request in self.requests)
        return {
            "prompt_tokens": len(self.prompt), "completion_tokens": generated,
            "total_tokens": len(self.prompt) + generated,
        }  # fmt: skip

    @property
    def tier(self) -> dict[str, str]:
        """The service tier of the response, if the request named one: there is only one."""
        return {"service_tier": "default"} if self.chat.service_tier else {}

    def emitted(self) -> None:
        """Count a delta; pause the answer if the client does not read."""
        with self.lock:
            self.unsent += 1
            if self.unsent >= MAX_UNSENT:
                self._set_paused(True)

    def taken(self) -> bool:
        """Count a delta that is sent next; True if this lets a paused answer go on."""
        with self.lock:
            self.unsent -= 1
            resumes = self.unsent <= MAX_UNSENT // 2 and any(request.paused for request in self.requests)
            if resumes:
                self._set_paused(False)
            return resumes

    def _set_paused(self, paused: bool) -> None:
        for request in self.requests:
            request.paused = paused

    def cancel(self) -> None:
        """End all its answers at the engine's next step."""
        for request in self.requests:
            request.cancelled = True

    def log(self, outcome: str) -> None:
        """Print one line: time, token counts, seconds, and how the request ended."""
        seconds = time.monotonic() - self.started
        usage = self.usage
        say(
            f"{time.strftime('%H:%M:%S')} {self.id} {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, "
            f"{seconds:.1f} s, {outcome}"
        )
