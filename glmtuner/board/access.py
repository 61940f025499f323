"""Who may look at a board, and which requests may change something.

A board starts programs, so that whoever reaches it could do everything that its user can. It asks for a token on every address, on
the loopback one too, which all users of a login node share. The printed address carries it once. A cookie, which is not the token,
then lets the browser read. Browsers send cookies to every port of a host name, though, so that what changes something needs the
token itself, which the page keeps where only its own origin can read it.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmtuner.serving.access import headers_of, host_name, is_json

HEADER = "x-glmtuner-board"  # no form and no image of another page can send it without this server's permission
MAX_BODY_BYTES = 2**20
READ_TIMEOUT_S = 30  # for a body to come
SEND_TIMEOUT_S = 30  # for the client to read on, once the buffers between it and the board are full
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "frame-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NEEDS_TOKEN = (
    "This board needs its token: open the address that the program printed.\n请打开程序输出的地址，其中带有令牌。"
)
WRONG_TOKEN = (
    "This is not the board's token: open the address that the program printed.\n令牌不对：请打开程序输出的地址。"
)


class BoardFilter:
    """Middleware that answers only to its own host names, to who has the token, and to changes that its own page asks for.

    `hosts` are the allowed host names, None for any; `token` is None where none is asked for. `abort` closes the connection of a
    client that stopped reading.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: tuple[str, ...] | None,
        abort: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self.app, self.token, self.hosts, self.abort = app, token, hosts, abort
        self.cookie, self.ticket = cookie_of(token) if token is not None else ("", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return None
        send = with_headers(self._in_time(scope, send))
        response = self.refusal(scope)
        if response is None and scope["method"] not in ("GET", "HEAD"):
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    body = await body_of(receive)
            except TimeoutError:
                response = _error(408, f"the request's body did not come within {READ_TIMEOUT_S} s")
                response.headers["Connection"] = "close"
            else:
                if body is None:
                    response = _too_large()
                else:
                    receive = with_body(body, receive)
        if response is not None:
            return await response(scope, receive, send)
        if self._token_in_address(scope) is not None:
            send = with_cookie(send, f"{self.cookie}={self.ticket}; HttpOnly; SameSite=Strict; Path=/")
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        headers = headers_of(scope)
        host = host_name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return _error(403, f"this board answers to {', '.join(self.hosts)}, not to {host[:100]!r}")
        reads = scope["method"] in ("GET", "HEAD")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not (reads and scope["path"] == "/"):
            return _error(403, "a page of another address asked for this; open the board itself")
        if self.token is not None:
            in_address = self._token_in_address(scope)
            if in_address is not None and not _equal(in_address, self.token):
                return PlainTextResponse(WRONG_TOKEN, 401)
            if in_address is None and not self._has_bearer(headers):
                if not reads:
                    return _error(
                        401, "a change needs the board's token: open the address that the program printed again"
                    )
                if not self._has_cookie(headers):
                    return PlainTextResponse(NEEDS_TOKEN, 401)
        if not reads:
            origin = headers.get("origin")
            if origin is not None and authority(origin) != headers.get("host", "").lower():
                return _error(403, f"a change may be asked for by this board's own page alone, not by {origin[:100]}")
            if HEADER not in headers or not is_json(scope):
                return _error(403, f"a change needs the header {HEADER} and a body of JSON")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            return _too_large()
        return None

    def _token_in_address(self, scope: Scope) -> str | None:
        """The token in the address of the page itself; None if there is none, or if none is asked for."""
        if self.token is None or scope["method"] not in ("GET", "HEAD") or scope["path"] != "/":
            return None
        values = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("token")
        return values[0] if values else None

    def _has_bearer(self, headers: dict[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        assert self.token is not None
        return scheme.lower() == "bearer" and _equal(token.strip(), self.token)

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        # http.cookies gives up at the first cookie that is not to its taste, and other programs of this host name set some
        pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
        return any(name == self.cookie and _equal(value, self.ticket) for name, _, value in pairs)

    def _in_time(self, scope: Scope, send: Send) -> Send:
        """`send`, which closes the connection of a client that does not read on."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                self.abort(scope)
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await send(message)  # returns when the connection is lost

        return send_in_time


def cookie_of(token: str) -> tuple[str, str]:
    """Name and value of the cookie of a board with this token.

    Each board has a name of its own: behind `ssh -L` boards of several machines share a host name. Neither tells the token.
    """
    name = hashlib.sha256(token.encode()).hexdigest()[:12]
    return f"glmtuner-board-{name}", hmac.new(token.encode(), b"read", hashlib.sha256).hexdigest()


def authority(origin: str) -> str | None:
    """Host and port of an Origin header, in lower case; None if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # half of an IPv6 address
        return None


async def body_of(receive: Receive) -> bytes | None:
    """The request's body; None if it is larger than MAX_BODY_BYTES, whether or not its length was announced."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):  # the end, or the client's departure
            return bytes(body)


def with_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then what comes from the client."""
    waiting = [body]

    async def receive_again() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return receive_again


def with_headers(send: Send) -> Send:
    """`send` with the headers that keep a browser from doing more than the page needs, unless the response has its own."""

    async def send_safely(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            known = {name.lower() for name, _ in headers}
            for name, value in {**SAFE, "Content-Security-Policy": POLICY}.items():
                if name.lower().encode() not in known:
                    headers.append((name.encode(), value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return send_safely


def with_cookie(send: Send, cookie: str) -> Send:
    """`send` with a cookie for the browser to keep."""

    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"set-cookie", cookie.encode())]}
        await send(message)

    return send_with_cookie


def _equal(text: str, secret: str) -> bool:
    return hmac.compare_digest(text.encode(), secret.encode())


def _too_large() -> Response:
    return _error(413, f"a request may have at most {MAX_BODY_BYTES // 1024} KiB")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
