"""The HTTP side of `serve`: routes, access, and the limits of a request."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from glmtuner.console import say
from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.inference.finished import Finished
from glmtuner.inference.generate import AnswerText
from glmtuner.serving.engine import Engine, QueueFullError, Request, Sampling
from glmtuner.serving.protocol import ApiError, ChatRequest, validation_error

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts of one request."""

    max_body_bytes: int = 4 * 2**20
    timeout_s: float = 300.0  # from a request's arrival to the end of its answer


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
        text = "" if self.text.stopped else self.text.finish()
        self.emit(Delta(self.index, text, "stop" if self.text.stopped else reason))


@dataclass
class Call:
    """A chat request in progress: its requests to the engine, one per choice, and the deltas that these produce."""

    chat: ChatRequest
    prompt: list[int]
    requests: list[Request] = field(default_factory=list)
    deltas: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.monotonic)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in the API's form."""
        generated = sum(len(request.generated) for request in self.requests)
        return {
            "prompt_tokens": len(self.prompt), "completion_tokens": generated,
            "total_tokens": len(self.prompt) + generated,
        }  # fmt: skip

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


class Server:
    """The API of one finished run."""

    def __init__(self, finished: Finished, engine: Engine, name: str, limits: Limits) -> None:
        self.finished, self.engine, self.name, self.limits = finished, engine, name, limits
        self.created = int(time.time())

    def start(self, chat: ChatRequest) -> Call:
        """Submit the request to the engine. Raises ApiError if it cannot be answered."""
        if chat.model != self.name:
            raise self.unknown_model(chat.model)
        if chat.messages[-1].role != "user":
            raise ApiError(
                400, "the last of 'messages' must be the user's: it is what the model answers", None, "messages"
            )
        roles = {"developer": "system"}
        turns = [Message(roles.get(message.role, message.role), message.text) for message in chat.messages]
        try:
            (encoded,) = self.finished.template.encode(self.finished.tokenizer, [turns])
        except ConfigError as error:  # a jinja template that rejects the order of the turns
            raise ApiError(400, str(error), None, "messages") from None
        prompt = list(encoded.input_ids)
        values = self.finished.run.generation
        room = values.max_length - len(prompt)
        max_new_tokens = chat.max_new_tokens or values.max_new_tokens
        if room < (chat.max_new_tokens or 1):
            raise ApiError(
                400,
                f"this server's context holds {values.max_length} tokens (generation.max_length): the messages have "
                f"{len(prompt)}, and {max_new_tokens or 1} were requested for the answer",
                "context_length_exceeded",
                "messages",
            )
        call = Call(chat, prompt)
        loop = asyncio.get_running_loop()

        def emit(delta: Delta) -> None:
            with suppress(RuntimeError):  # the loop is closed when the server stops
                loop.call_soon_threadsafe(call.deltas.put_nowait, delta)

        try:
            for index in range(chat.n or 1):
                choice = Choice(index, self.finished, chat.stop or [], emit)
                request = Request(
                    prompt,
                    min(max_new_tokens or room, room),
                    self.sampling(chat, index),
                    choice.on_token,
                    choice.on_end,
                )
                self.engine.submit(request)
                call.requests.append(request)
        except QueueFullError:
            call.cancel()
            raise ApiError(
                429, "too many requests are waiting for an answer; try again later", "rate_limit_exceeded"
            ) from None
        return call

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
                delta = await asyncio.wait_for(call.deltas.get(), max(remaining, 0))
            except TimeoutError:
                raise ApiError(
                    504, f"the answer was not finished after {self.limits.timeout_s:g} s (--timeout)", "timeout"
                ) from None
            if delta.finish_reason == "error":
                raise ApiError(500, "the model failed on this request; the server's output says why", "model_error")
            if delta.finish_reason == "cancelled":
                raise ApiError(503, "the server is stopping", "stopping")
            unfinished -= delta.finish_reason is not None
            yield delta

    async def completion(self, call: Call, http: HttpRequest) -> dict[str, Any]:
        """The whole answer as one object; generation stops if the client disconnects."""
        texts = [""] * len(call.requests)
        reasons: list[str | None] = [None] * len(call.requests)
        watcher = asyncio.create_task(_cancel_on_disconnect(http, call))
        try:
            async for delta in self.deltas(call):
                texts[delta.choice] += delta.text
                reasons[delta.choice] = delta.finish_reason or reasons[delta.choice]
        except ApiError as error:
            call.log(error.message)
            raise
        finally:
            watcher.cancel()
            call.cancel()
        call.log(", ".join(dict.fromkeys(str(reason) for reason in reasons)))
        choices = [
            {
                "index": index, "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None, "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]  # fmt: skip
        return {
            "id": call.id, "object": "chat.completion", "created": call.created, "model": self.name,
            "choices": choices, "usage": call.usage,
        }  # fmt: skip

    async def events(self, call: Call) -> AsyncIterator[str]:
        """The answer as server-sent events; an error after the first of them is an event, too."""
        options = call.chat.stream_options
        includes_usage = options is not None and options.include_usage
        head = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": self.name}

        def event(index: int, delta: dict[str, str], reason: str | None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _sse({**head, "choices": [choice], **({"usage": None} if includes_usage else {})})

        outcome = "the client disconnected"
        try:
            for index in range(len(call.requests)):
                yield event(index, {"role": "assistant", "content": ""}, None)
            async for index, text, reason in self.deltas(call):
                if text:
                    yield event(index, {"content": text}, None)
                if reason is not None:
                    outcome = reason
                    yield event(index, {}, reason)
            if includes_usage:
                yield _sse({**head, "choices": [], "usage": call.usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            outcome = error.message
            yield _sse(error.body)
        finally:
            call.cancel()
            call.log(outcome)

    def model_info(self) -> dict[str, Any]:
        """The served model in the API's form."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "glmtuner"}

    def unknown_model(self, name: str) -> ApiError:
        """The error for a request of another model."""
        message = f"the model '{name}' does not exist; this server has '{self.name}'"
        return ApiError(404, message, "model_not_found", "model")


async def _cancel_on_disconnect(http: HttpRequest, call: Call) -> None:
    """Cancel the call when its client closes the connection."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)
    call.cancel()


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class RequestFilter:
    """Middleware that rejects, before the body is read, requests without the key, for another host, or too large.

    `hosts` are the allowed host names; None allows any. On the loopback address they keep a web page from reaching the
    server by a DNS name of its own (DNS rebinding). JSON is required for the same reason: a page may post plain text to any
    address without a preflight request.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: tuple[str, ...] | None, max_body_bytes: int) -> None:
        self.app, self.key, self.hosts, self.max_body_bytes = app, key, hosts, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        error = self._error(scope, headers)
        if error is not None:
            return await _error_response(error)(scope, receive, send)
        body_bytes = 0

        async def receive_limited() -> AsgiMessage:
            nonlocal body_bytes
            message = await receive()
            body_bytes += len(message.get("body", b""))
            if body_bytes > self.max_body_bytes:
                raise HTTPException(413)
            return message

        await self.app(scope, receive_limited, send)

    def _error(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        """The reason to reject the request; None if there is none."""
        host = headers.get("host", "")
        if not host.endswith("]"):  # an IPv6 address without a port
            host = host.rsplit(":", 1)[0]
        if self.hosts is not None and host not in self.hosts:
            return ApiError(403, f"this server answers to {', '.join(self.hosts)}, not to '{host}'", "wrong_host")
        if self.key is not None and scope["path"].startswith("/v1/"):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            is_known = hmac.compare_digest(token.strip().encode("latin-1"), self.key.encode("utf-8"))
            if scheme.lower() != "bearer" or not is_known:
                return ApiError(401, "an API key is needed: 'Authorization: Bearer KEY'", "invalid_api_key")
        content_type = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] == "POST" and content_type != "application/json":
            return ApiError(415, "the body must be JSON: 'Content-Type: application/json'", "wrong_content_type")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return _too_large(self.max_body_bytes)
        return None


def _too_large(max_body_bytes: int) -> ApiError:
    return ApiError(413, f"a request may have at most {max_body_bytes // 2**20} MiB", "request_too_large")


def _error_response(error: ApiError) -> Response:
    headers = (
        {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": "1"} if error.status == 429 else {}
    )
    return JSONResponse(error.body, error.status, headers)


def application(server: Server, key: str | None, hosts: tuple[str, ...] | None) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/models, /health, and the page at /."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestFilter, key=key, hosts=hosts, max_body_bytes=server.limits.max_body_bytes)

    @app.post("/v1/chat/completions", response_model=None)
    async def completions(chat: ChatRequest, http: HttpRequest) -> Response:
        call = server.start(chat)
        if chat.stream:
            return StreamingResponse(
                server.events(call), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return JSONResponse(await server.completion(call, http))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_info()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise server.unknown_model(name)
        return server.model_info()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse)
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
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return _error_response(validation_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        if error.status_code == 413:
            return _error_response(_too_large(server.limits.max_body_bytes))
        if error.status_code in (404, 405):
            return _error_response(
                ApiError(error.status_code, f"{http.method} {http.url.path} does not exist", "unknown_url")
            )
        return _error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def crash(_: HttpRequest, error: Exception) -> Response:
        return _error_response(ApiError(500, "the server failed on this request; its output says why"))

    return app
