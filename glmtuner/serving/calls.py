"""A chat request while it is answered: what the engine's tokens become, and how far the client has read."""

import asyncio
import logging
import secrets
import string
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glmtuner.console import say
from glmtuner.inference.answer import answer_behind
from glmtuner.inference.finished import Finished
from glmtuner.serving.engine import Request
from glmtuner.serving.prompt import Prompt
from glmtuner.serving.protocol import ChatRequest
from glmtuner.templates.answers import Delta as Part
from glmtuner.templates.tool_calls import ToolCall

MAX_UNSENT = 256  # deltas that wait for a client to read: at so many, its answer is paused
ID_LENGTH = 9  # characters of a call's id; Mistral's templates refuse any other

log = logging.getLogger(__name__)


class Delta(NamedTuple):
    """What comes next in one choice of a request; `finish_reason` is None until the choice ends."""

    choice: int
    text: str
    finish_reason: str | None
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()  # in OpenAI's form, each with its index in the answer


class Choice:
    """One answer of a request: turns the engine's tokens into deltas and passes them to `emit`, in the engine's thread."""

    def __init__(
        self, index: int, finished: Finished, prompt: Prompt, stops: list[str], emit: Callable[[Delta], None]
    ) -> None:
        self.index, self.stop_ids, self.emit = index, finished.stops, emit
        self.answer = answer_behind(finished, prompt.ids, prompt.syntax, prompt.tools, stops)
        self.parallel, self.call_ids = prompt.parallel, {*prompt.call_ids}
        self.num_calls = 0

    def on_token(self, token: int) -> bool:
        """Take the engine's next token; False if it ends the answer: a stop token, a stop text, the only call."""
        if token in self.stop_ids:
            return False
        self._emit(self.answer.put(token), None)
        return not self.answer.stopped and (self.parallel or not self.num_calls)

    def on_end(self, reason: str) -> None:
        """Emit what remains, and the finish reason."""
        part = Part()
        if reason in ("stop", "length") and not self.answer.stopped and (self.parallel or not self.num_calls):
            try:
                part = self.answer.finish()
                reason = "stop" if self.answer.stopped else reason
            except Exception:
                log.exception("the end of an answer cannot be decoded")
                reason = "error"
        self._emit(part, reason)

    def _emit(self, part: Part, reason: str | None) -> None:
        given = part.calls if self.parallel else part.calls[: 1 - min(self.num_calls, 1)]
        calls = tuple(self._as_openai(call) for call in given)
        if reason == "stop" and self.num_calls:
            reason = "tool_calls"
        if part.content or part.reasoning or calls or reason:
            self.emit(Delta(self.index, part.content, reason, part.reasoning, calls))

    def _as_openai(self, call: ToolCall) -> dict[str, Any]:
        """The call with its index and an id of its own: the model's, if it wrote one and no earlier call has it."""
        call_id = call.id
        while not call_id or call_id in self.call_ids:
            call_id = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))
        self.call_ids.add(call_id)
        self.num_calls += 1
        function = {"name": call.name, "arguments": call.arguments_json}
        return {"index": self.num_calls - 1, "id": call_id, "type": "function", "function": function}


@dataclass(eq=False)
class Call:
    """A chat request in progress: its requests to the engine, one per choice, and the deltas that these produce."""

    chat: ChatRequest
    prompt: Prompt
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
            "prompt_tokens": len(self.prompt.ids), "completion_tokens": generated,
            "total_tokens": len(self.prompt.ids) + generated,
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
