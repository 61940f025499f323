"""What stands in front of the routes: who may ask for what, and how long a client may take to send and to read."""

import asyncio
import hmac
from collections.abc import Callable
from contextlib import suppress

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmtuner.serving.protocol import ApiError

READ_TIMEOUT_S = 30  # from a request's head to the end of its body
SEND_TIMEOUT_S = 30  # for the client to read on, once the buffers between it and the server are full


class Gate:
    """Counts the requests of the API in progress, and keeps new ones out while the server is stopping."""

    def __init__(self) -> None:
        self.inside = 0
        self.is_closed = False
        self.stopped = False  # those inside are being ended, too


class RequestFilter:
    """Middleware that rejects requests without the key, for another host, too large, or too slow.

    `hosts` are the allowed host names; None allows any. On the loopback address they keep a web page from reaching the
    server by a DNS name of its own (DNS rebinding). `abort` closes the connection of a client that stopped reading.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: tuple[str, ...] | None,
        max_body_bytes: int,
        gate: Gate,
        abort: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self.app, self.key, self.hosts, self.max_body_bytes = app, key, hosts, max_body_bytes
        self.gate, self.abort = gate, abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error = self._error(scope, headers_of(scope))
        if error is not None:
            return await error_response(error)(scope, receive, send)
        loop = asyncio.get_running_loop()
        body_bytes, deadline, is_complete = 0, loop.time() + READ_TIMEOUT_S, False

        async def receive_limited() -> Message:
            nonlocal body_bytes, is_complete
            if is_complete:  # what comes now is the client's departure
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not come within {READ_TIMEOUT_S} s after the request's head", "request_timeout"
                ) from None
            body_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if body_bytes > self.max_body_bytes:
                raise too_large(self.max_body_bytes)
            return message

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                self.abort(scope)
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await send(message)  # returns when the connection is lost

        is_counted = is_api(scope)
        self.gate.inside += is_counted
        try:
            await self.app(scope, receive_limited, send_in_time)
        finally:
            self.gate.inside -= is_counted

    def _error(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        """The reason to reject the request; None if there is none."""
        host = host_name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return ApiError(403, f"this server answers to {', '.join(self.hosts)}, not to '{host[:100]}'", "wrong_host")
        if self.key is not None and is_api(scope):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            is_known = hmac.compare_digest(token.strip().encode("latin-1"), self.key.encode("utf-8"))
            if scheme.lower() != "bearer" or not is_known:
                return ApiError(401, "an API key is needed: 'Authorization: Bearer KEY'", "invalid_api_key")
        if self.gate.is_closed and is_api(scope):
            return ApiError(503, "the server is stopping and takes no new requests", "stopping")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            return too_large(self.max_body_bytes)
        return None


def is_api(scope: Scope) -> bool:
    """Whether the request is for the API."""
    path: str = scope["path"]
    return path.startswith("/v1/")


def headers_of(scope: Scope) -> dict[str, str]:
    """The request's headers, by their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def host_name(header: str) -> str:
    """The name in a Host header, in lower case, without the port and the dot of a fully qualified name."""
    host = header.strip().lower()
    if not host.endswith("]"):  # an IPv6 address without a port
        name, colon, port = host.rpartition(":")
        host = name if colon and (port.isdecimal() or not port) else host
    return host.removesuffix(".")


def is_json(scope: Scope) -> bool:
    """Whether the request says that its body is JSON.

    A web page may send plain text to any address, but needs this server's permission to send JSON.
    """
    return headers_of(scope).get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def too_large(max_body_bytes: int) -> ApiError:
    """The error for a body of more bytes."""
    return ApiError(413, f"a request may have at most {max_body_bytes // 1024} KiB", "request_too_large")


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """The error as an HTTP response."""
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "10"}}
    closes = {"Connection": "close"} if error.status == 408 else {}  # the rest of the body is not waited for
    return JSONResponse(error.body, error.status, {**more.get(error.status, {}), **closes, **(headers or {})})
