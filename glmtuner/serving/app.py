"""The HTTP side of `serve`: routes, who may ask, how much, and for how long."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from glmtuner.serving.engine import Busy, Engine, Request, Sampling
from glmtuner.serving.protocol import ApiError, ChatRequest, told

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on."""

    body: int = 4 * 2**20  # bytes of a request
    seconds: float = 300.0  # from a request's arrival to the end of its answer


class Choice:
    """One answer of a request, from the engine's thread to the event loop."""

    def __init__(
        self, index: int, finished: Finished, stops: list[str], tell: Callable[[int, str, str | None], None]
    ) -> None:
        self.index, self.stop_ids, self.tell = index, finished.stops, tell
        self.text = AnswerText(finished.tokenizer, stops)

    def take(self, token: int) -> bool:
        """The engine's next token; False when a stop text ends the answer."""
        if token in self.stop_ids:
            return False
        text = self.text.put(token)
        if text:
            self.tell(self.index, text, None)
        return not self.text.stopped

    def end(self, reason: str) -> None:
        text = "" if self.text.stopped else self.text.finish()
        self.tell(self.index, text, "stop" if self.text.stopped else reason)


@dataclass
class Call:
    """A chat request under way: its choices, and the pieces of text that came for them."""

    asked: ChatRequest
    prompt: list[int]
    requests: list[Request] = field(default_factory=list)
    pieces: asyncio.Queue[tuple[int, str, str | None]] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)

    @property
    def usage(self) -> dict[str, int]:
        generated = sum(len(request.generated) for request in self.requests)
        return {
            "prompt_tokens": len(self.prompt), "completion_tokens": generated,
            "total_tokens": len(self.prompt) + generated,
        }  # fmt: skip

    def cancel(self) -> None:
        for request in self.requests:
            request.cancelled = True

    def log(self, how: str) -> None:
        seconds = time.monotonic() - self.began
        usage = self.usage
        say(
            f"{time.strftime('%H:%M:%S')} {self.id} {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, "
            f"{seconds:.1f} s, {how}"
        )


class Server:
    """The API of one finished run."""

    def __init__(self, finished: Finished, engine: Engine, name: str, limits: Limits) -> None:
        self.finished, self.engine, self.name, self.limits = finished, engine, name, limits
        self.created = int(time.time())

    def begin(self, asked: ChatRequest) -> Call:
        """Hand the request to the engine. Raises ApiError where it cannot be answered."""
        if asked.model != self.name:
            raise ApiError(
                404,
                f"the model '{asked.model}' does not exist; this server has '{self.name}'",
                "model_not_found",
                "model",
            )
        if asked.messages[-1].role != "user":
            raise ApiError(
                400, "the last of 'messages' must be the user's: it is what the model answers", None, "messages"
            )
        role = {"developer": "system"}
        turns = [Message(role.get(message.role, message.role), message.text) for message in asked.messages]
        try:
            (found,) = self.finished.template.encode(self.finished.tokenizer, [turns])
        except ConfigError as error:  # a jinja template that refuses the order of the turns
            raise ApiError(400, str(error), None, "messages") from None
        values = self.finished.run.generation
        room = values.max_length - len(found.input_ids)
        wanted = asked.most_tokens or values.max_new_tokens
        if room < (wanted if asked.most_tokens else 1):
            raise ApiError(
                400,
                f"this server's context holds {values.max_length} tokens (generation.max_length): the messages have "
                f"{len(found.input_ids)}, {wanted or 1} were asked for behind them",
                "context_length_exceeded",
                "messages",
            )
        call = Call(asked, found.input_ids)
        loop = asyncio.get_running_loop()

        def tell(index: int, text: str, reason: str | None) -> None:
            with suppress(RuntimeError):  # the loop is gone when the server stops
                loop.call_soon_threadsafe(call.pieces.put_nowait, (index, text, reason))

        try:
            for index in range(asked.n or 1):
                choice = Choice(index, self.finished, asked.stop or [], tell)
                request = Request(
                    found.input_ids, min(wanted or room, room), self.sampling(asked, index), choice.take, choice.end
                )
                self.engine.submit(request)
                call.requests.append(request)
        except Busy:
            call.cancel()
            raise ApiError(
                429, "too many requests wait for an answer; ask again later", "rate_limit_exceeded"
            ) from None
        return call

    def sampling(self, asked: ChatRequest, index: int) -> Sampling:
        """The request's values over the run's."""
        values = self.finished.run.generation
        own = values.temperature if values.do_sample else 0.0
        temperature = own if asked.temperature is None else asked.temperature
        return Sampling(
            temperature=temperature,
            top_p=values.top_p if asked.top_p is None else asked.top_p,
            top_k=values.top_k if asked.top_k is None else asked.top_k,
            repetition_penalty=values.repetition_penalty
            if asked.repetition_penalty is None
            else asked.repetition_penalty,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            seed=None if asked.seed is None else asked.seed + index,
        )

    async def pieces(self, call: Call) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, text, why it ended) as they come. Raises ApiError when the time is over or the model failed."""
        left = len(call.requests)
        while left:
            remaining = self.limits.seconds - (time.monotonic() - call.began)
            try:
                index, text, reason = await asyncio.wait_for(call.pieces.get(), max(remaining, 0))
            except TimeoutError:
                raise ApiError(
                    504, f"the answer was not done after {self.limits.seconds:g} s (--timeout)", "timeout"
                ) from None
            if reason == "error":
                raise ApiError(500, "the model failed on this request; the server's output says why", "model_error")
            if reason == "cancelled":
                raise ApiError(503, "the server is stopping", "stopping")
            left -= reason is not None
            yield index, text, reason

    async def whole(self, call: Call, http: HttpRequest) -> dict[str, Any]:
        """The answer in one piece; nobody waiting for it any more ends it."""
        texts = [""] * len(call.requests)
        reasons: list[str | None] = [None] * len(call.requests)
        gone = asyncio.create_task(_gone(http, call))
        try:
            async for index, text, reason in self.pieces(call):
                texts[index] += text
                reasons[index] = reason or reasons[index]
        except ApiError as error:
            call.log(error.message)
            raise
        finally:
            gone.cancel()
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
        """The answer as server-sent events; an error behind the first of them is an event too."""
        options = call.asked.stream_options
        counted = options is not None and options.include_usage
        head = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": self.name}

        def event(index: int, delta: dict[str, str], reason: str | None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _sse({**head, "choices": [choice], **({"usage": None} if counted else {})})

        how = "the client left"
        try:
            for index in range(len(call.requests)):
                yield event(index, {"role": "assistant", "content": ""}, None)
            async for index, text, reason in self.pieces(call):
                if text:
                    yield event(index, {"content": text}, None)
                if reason is not None:
                    how = reason
                    yield event(index, {}, reason)
            if counted:
                yield _sse({**head, "choices": [], "usage": call.usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            how = error.message
            yield _sse(error.body)
        finally:
            call.cancel()
            call.log(how)

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "glmtuner"}


async def _gone(http: HttpRequest, call: Call) -> None:
    """Cancel the call when its client closes the connection."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)
    call.cancel()


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class Gate:
    """Turns away, before a body is read, who has no key, asks for another host, or sends too much.

    `hosts` are the names under which the server may be asked; None is any. On the loopback address they keep a web page
    from reaching it by a DNS name of its own (DNS rebinding); JSON is demanded for the same reason: a page may post
    plain text anywhere without asking.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: tuple[str, ...] | None, most: int) -> None:
        self.app, self.key, self.hosts, self.most = app, key, hosts, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        error = self._refusal(scope, headers)
        if error is not None:
            return await _told(error)(scope, receive, send)
        read = 0

        async def counted() -> AsgiMessage:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        host = (
            headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
        )
        if self.hosts is not None and host not in self.hosts:
            return ApiError(403, f"this server answers to {', '.join(self.hosts)}, not to '{host}'", "wrong_host")
        given = headers.get("authorization", "")
        if self.key is not None and scope["path"].startswith("/v1/"):
            scheme, _, token = given.partition(" ")
            known = hmac.compare_digest(token.strip().encode("latin-1"), self.key.encode("utf-8"))
            if scheme.lower() != "bearer" or not known:
                return ApiError(401, "an API key is needed: 'Authorization: Bearer KEY'", "invalid_api_key")
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            return ApiError(415, "the body must be JSON: 'Content-Type: application/json'", "wrong_content_type")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.most:
            return _too_large(self.most)
        return None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"a request may have {most // 2**20} MiB", "request_too_large")


def _told(error: ApiError) -> Response:
    headers = (
        {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": "1"} if error.status == 429 else {}
    )
    return JSONResponse(error.body, error.status, headers)


def application(server: Server, key: str | None, hosts: tuple[str, ...] | None) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/models, /health, and the page at /."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, key=key, hosts=hosts, most=server.limits.body)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, http: HttpRequest) -> Response:
        call = server.begin(asked)
        if asked.stream:
            return StreamingResponse(
                server.events(call), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return JSONResponse(await server.whole(call, http))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise ApiError(
                404, f"the model '{name}' does not exist; this server has '{server.name}'", "model_not_found", "model"
            )
        return server.model()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        page_settings = {"name": server.name, "key": key is not None}
        told_page = json.dumps(page_settings, ensure_ascii=False).replace("<", "\\u003c")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8").replace("{{server}}", told_page),
            headers={"Content-Security-Policy": policy},
        )

    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return _told(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return _told(told(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        if error.status_code == 413:
            return _told(_too_large(server.limits.body))
        if error.status_code in (404, 405):
            return _told(ApiError(error.status_code, f"there is no {http.method} {http.url.path} here", "unknown_url"))
        return _told(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def crash(_: HttpRequest, error: Exception) -> Response:
        return _told(ApiError(500, "the server failed on this request; its output says why"))

    return app
