"""The HTTP side of `serve`: routes, access, and the limits of a request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from glmtuner.inference.finished import Finished
from glmtuner.serving.access import Gate, RequestFilter, error_response, is_json
from glmtuner.serving.answers import WholeAnswer, parts_of
from glmtuner.serving.calls import Call, Choice, Delta
from glmtuner.serving.description import (
    ANSWER,
    Health,
    ModelInfo,
    ModelList,
    abilities_of,
    describe,
    errors,
    request_body,
)
from glmtuner.serving.engine import Engine, QueueFullError, Request, Sampling
from glmtuner.serving.prompt import Prompt, length_of, prompt_of, tools_of, turns_of
from glmtuner.serving.protocol import MAX_CHOICES, ApiError, ChatRequest, parse_request

PAGE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES = 4 * 2**20
OTHER_BYTES = 256 * 1024  # of a body, beside the characters of its messages


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts of one request.

    `max_characters` of all messages together is what no conversation that fits into the context exceeds.
    """

    max_characters: int
    timeout_s: float = 300.0  # from a request's arrival to the end of its answer

    @property
    def max_body_bytes(self) -> int:
        """How many bytes a body may have: JSON may escape a character with 12 of them."""
        return min(MAX_BODY_BYTES, 12 * self.max_characters + OTHER_BYTES)


def max_characters(finished: Finished) -> int:
    """As many characters as the context holds of the vocabulary's longest tokens."""
    vocabulary = finished.tokenizer.get_vocab()
    texts = [*vocabulary, *finished.tokenizer.batch_decode([[token] for token in vocabulary.values()])]
    return finished.run.generation.max_length * max(map(len, texts))


class Server:
    """The API of one finished run."""

    def __init__(self, finished: Finished, engine: Engine, name: str, limits: Limits) -> None:
        self.finished, self.engine, self.name, self.limits = finished, engine, name, limits
        self.created = int(time.time())
        self.gate = Gate()
        self.calls: set[Call] = set()
        # one thread reads bodies and tokenizes, so that neither delays the event loop; tokenizers are not made for several
        self.reader = ThreadPoolExecutor(1, "reader")
        self.reading = 0  # requests in that thread or in its queue

    def close_reader(self) -> None:
        """End the thread that reads bodies; what waits for it is dropped."""
        self.reader.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """End all requests in progress with an error."""
        self.gate.stopped = True
        for call in self.calls:
            call.cancel()
            call.deltas.put_nowait(Delta(0, "", "cancelled"))
        self.engine.wake()

    async def start(self, http: HttpRequest) -> Call:
        """Read the request and submit it to the engine. Raises ApiError if it cannot be answered."""
        started = time.monotonic()
        if not is_json(http.scope):
            raise ApiError(415, "the body must be JSON: 'Content-Type: application/json'", "wrong_content_type")
        try:
            body = await http.body()
        except ClientDisconnect:
            raise ApiError(400, "the client disconnected before the end of the body") from None
        if self.reading >= self.engine.max_waiting:
            raise self.busy()
        self.reading += 1
        try:
            chat, prompt = await asyncio.get_running_loop().run_in_executor(self.reader, self.read, body)
        finally:
            self.reading -= 1
        if self.gate.stopped:
            raise stopping()
        return self.submit(Call(chat, prompt, started))

    def read(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        """The request in a body, and its prompt. Raises ApiError if it cannot be answered."""
        max_length = self.finished.run.generation.max_length
        chat = parse_request(body, max_items=max_length)
        if chat.model != self.name:
            raise self.unknown_model(chat.model)
        for limit in ("max_tokens", "max_completion_tokens"):
            if (getattr(chat, limit) or 0) > max_length:
                raise ApiError(
                    400, f"'{limit}': {getattr(chat, limit)} were requested, and this server's context holds {max_length} "
                    "tokens (generation.max_length)", None, limit,
                )  # fmt: skip
        if (chat.n or 1) > self.max_choices:
            raise ApiError(
                400, f"'n': at most {self.max_choices} requests may wait on this server (--waiting)", None, "n"
            )
        turns, tools = turns_of(chat), tools_of(chat)
        characters = length_of(turns, tools)
        if characters > self.limits.max_characters:
            raise ApiError(
                400, f"this server's context holds {max_length} tokens (generation.max_length), at most "
                f"{self.limits.max_characters} characters: the messages have {characters}",
                "context_length_exceeded", "messages",
            )  # fmt: skip
        prompt = prompt_of(chat, turns, tools, self.finished)
        if len(prompt.ids) >= max_length:
            raise ApiError(
                400, f"this server's context holds {max_length} tokens (generation.max_length): the messages have "
                f"{len(prompt.ids)}, which leaves no room for an answer",
                "context_length_exceeded", "messages",
            )  # fmt: skip
        return chat, prompt

    @property
    def max_choices(self) -> int:
        """How many answers one request may ask for."""
        return min(MAX_CHOICES, self.engine.max_waiting)

    def submit(self, call: Call) -> Call:
        """Give the call to the engine. Raises ApiError if too many requests are waiting."""
        chat, values = call.chat, self.finished.run.generation
        room = values.max_length - len(call.prompt.ids)
        loop = asyncio.get_running_loop()

        def emit(delta: Delta) -> None:
            if chat.stream:
                call.emitted()
            with suppress(RuntimeError):  # the loop is closed when the server stops
                loop.call_soon_threadsafe(call.deltas.put_nowait, delta)

        for index in range(chat.n or 1):
            choice = Choice(index, self.finished, call.prompt, chat.stops, emit)
            max_new_tokens = min(chat.max_new_tokens or values.max_new_tokens or room, room)
            sampling, prompt = self.sampling(chat, index), call.prompt
            call.requests.append(
                Request(prompt.ids, max_new_tokens, sampling, choice.on_token, choice.on_end, begins=prompt.begins)
            )
        try:
            self.engine.submit(*call.requests)
        except QueueFullError:
            raise self.busy() from None
        self.calls.add(call)
        return call

    def busy(self) -> ApiError:
        """The error for one request too many."""
        return ApiError(429, "too many requests are waiting for an answer; try again later", "rate_limit_exceeded")

    def close(self, call: Call) -> None:
        """Forget a call whose response has ended."""
        call.cancel()
        self.calls.discard(call)
        self.engine.wake()  # it may be paused

    def sampling(self, chat: ChatRequest, index: int) -> Sampling:
        """The request's values, and the run's where it has none; each choice of a seeded request has its own seed."""
        values = self.finished.run.generation
        temperature = values.temperature if values.do_sample else 0.0
        penalty = chat.repetition_penalty
        return Sampling(
            temperature=temperature if chat.temperature is None else chat.temperature,
            top_p=values.top_p if chat.top_p is None else chat.top_p,
            top_k=values.top_k if chat.top_k is None else chat.top_k,
            repetition_penalty=values.repetition_penalty if penalty is None else penalty,
            presence_penalty=chat.presence_penalty or 0.0,
            frequency_penalty=chat.frequency_penalty or 0.0,
            seed=None if chat.seed is None else chat.seed + index,
        )

    async def deltas(self, call: Call) -> AsyncIterator[Delta]:
        """The deltas of all choices as they come. Raises ApiError if the time is up or the model fails."""
        unfinished = len(call.requests)
        while unfinished:
            remaining = self.limits.timeout_s - (time.monotonic() - call.started)
            try:
                async with asyncio.timeout(remaining):
                    delta = await call.deltas.get()
            except TimeoutError:
                raise ApiError(
                    504, f"the answer was not finished after {self.limits.timeout_s:g} s (--timeout)", "timeout"
                ) from None
            if delta.finish_reason == "error":
                raise ApiError(500, "the model failed on this request; the server's output says why", "model_error")
            if delta.finish_reason == "cancelled":
                raise stopping()
            if call.chat.stream and call.taken():
                self.engine.wake()
            unfinished -= delta.finish_reason is not None
            yield delta

    async def completion(self, call: Call, http: HttpRequest) -> dict[str, Any]:
        """The whole answer as one object; generation stops if the client disconnects."""
        answers = [WholeAnswer() for _ in call.requests]
        watcher = asyncio.create_task(_cancel_on_disconnect(http, call))
        try:
            async for delta in self.deltas(call):
                answers[delta.choice].add(delta)
        except ApiError as error:
            call.log(error.message)
            raise
        finally:
            watcher.cancel()
            self.close(call)
        call.log(", ".join(dict.fromkeys(str(answer.finish_reason) for answer in answers)))
        choices = [
            {"index": index, "message": answer.message, "logprobs": None, "finish_reason": answer.finish_reason}
            for index, answer in enumerate(answers)
        ]
        return {
            "id": call.id, "object": "chat.completion", "created": call.created, "model": self.name,
            "choices": choices, "usage": call.usage, **call.tier,
        }  # fmt: skip

    async def events(self, call: Call) -> AsyncIterator[str]:
        """The answer as server-sent events; an error after the first of them is an event, too."""
        options = call.chat.stream_options
        includes_usage = options is not None and options.include_usage
        head = {
            "id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": self.name, **call.tier
        }  # fmt: skip

        def event(index: int, delta: dict[str, Any], reason: str | None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _sse({**head, "choices": [choice], **({"usage": None} if includes_usage else {})})

        outcome = "the client disconnected"
        try:
            for index in range(len(call.requests)):
                yield event(index, {"role": "assistant", "content": ""}, None)
            async for delta in self.deltas(call):
                for part in parts_of(delta):
                    yield event(delta.choice, part, None)
                if delta.finish_reason is not None:
                    outcome = delta.finish_reason
                    yield event(delta.choice, {}, delta.finish_reason)
            if includes_usage:
                yield _sse({**head, "choices": [], "usage": call.usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            outcome = error.message
            yield _sse(error.body)
        finally:
            call.log(outcome)

    def model_info(self) -> dict[str, Any]:
        """The served model in the API's form."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "glmtuner"}

    def unknown_model(self, name: str) -> ApiError:
        """The error for a request of another model."""
        message = f"the model '{name[:200]}' does not exist; this server has '{self.name}'"
        return ApiError(404, message, "model_not_found", "model")


async def _cancel_on_disconnect(http: HttpRequest, call: Call) -> None:
    """Cancel the call when its client closes the connection."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)
    call.cancel()


class EventStream(StreamingResponse):
    """The answer of a call as server-sent events; the call is closed however the response ends."""

    def __init__(self, server: Server, call: Call) -> None:
        super().__init__(server.events(call), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.server, self.call = server, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.server.close(self.call)


def stopping() -> ApiError:
    """The error for requests that the server's end cuts off."""
    return ApiError(503, "the server is stopping", "stopping")


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def application(
    server: Server, key: str | None, hosts: tuple[str, ...] | None, abort: Callable[[Scope], None] = lambda scope: None
) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/models, /health, /openapi.json, and the page at /.

    `abort` closes the connection of a client that stopped reading.
    """
    app = FastAPI(docs_url=None, redoc_url=None)
    app.add_middleware(
        RequestFilter, key=key, hosts=hosts, max_body_bytes=server.limits.max_body_bytes, gate=server.gate, abort=abort
    )
    elsewhere = errors(*([403] if hosts else []))
    refused = {**errors(*([401] if key else [])), **elsewhere}

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        openapi_extra=request_body(),
        responses={200: ANSWER, **refused, **errors(400, 404, 408, 413, 415, 429, 500, 503, 504)},
    )
    async def chat_completions(http: HttpRequest) -> Response:
        call = await server.start(http)
        return EventStream(server, call) if call.chat.stream else JSONResponse(await server.completion(call, http))

    @app.get("/v1/models", response_model=ModelList, responses={**refused, **errors(503)})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_info()]}

    @app.get("/v1/models/{name:path}", response_model=ModelInfo, responses={**refused, **errors(404, 503)})
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise server.unknown_model(name)
        return server.model_info()

    @app.get("/health", response_model=Health, responses={**elsewhere, **errors(503)})
    async def health() -> dict[str, str]:
        if server.gate.is_closed:
            raise stopping()
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse, responses=elsewhere)
    async def page() -> HTMLResponse:
        page_settings = {"name": server.name, "key": key is not None}
        embedded = json.dumps(page_settings, ensure_ascii=False).replace("<", "\\u003c")  # no tag inside the script
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8").replace("{{server}}", embedded),
            headers={"Content-Security-Policy": policy},
        )

    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"{http.url.path[:200]} does not exist", "unknown_url"
        elif error.status_code == 405:
            message, code = f"{http.url.path[:200]} does not take {http.method}", "method_not_allowed"
        return error_response(ApiError(error.status_code, message, code), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def crash(_: HttpRequest, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed on this request; its output says why"))

    document = describe(
        app,
        server.name,
        max_tokens=server.finished.run.generation.max_length,
        max_choices=server.max_choices,
        has_key=key is not None,
        abilities=abilities_of(server.finished),
    )
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app
