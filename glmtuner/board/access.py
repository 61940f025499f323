"""Who may look at a board, and which requests may change something.

A board starts programs, so that whoever reaches it could do everything that its user can. It asks for a token on every address, on
the loopback one too, which all users of a login node share: the printed address carries it once, and a cookie keeps it.
"""

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmtuner.serving.access import headers_of, host_name, is_json

HEADER = "x-glmtuner-board"  # no form and no image of another page can send it without this server's permission
MAX_BODY_BYTES = 2**20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'"
)
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class BoardFilter:
    """Middleware that answers only to its own host names, to who has the token, and to changes that its own page asks for.

    `hosts` are the allowed host names, None for any; `token` is None where none is asked for.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: tuple[str, ...] | None, port: int) -> None:
        self.app, self.token, self.hosts, self.cookie = app, token, hosts, f"glmtuner-board-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return None
        response = self.refusal(scope)
        if response is not None:
            response.headers.update(SAFE)
            return await response(scope, receive, send)
        return await self.app(scope, limited(receive), with_headers(send))

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        headers = headers_of(scope)
        host = host_name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return _error(403, f"this board answers to {', '.join(self.hosts)}, not to {host[:100]!r}")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if self.token is not None and "token" in query and scope["method"] == "GET" and scope["path"] == "/":
            if not self._is_token(query["token"][0]):
                return PlainTextResponse(
                    "This is not the board's token: open the address that the program printed.", 401
                )
            rest = urlencode({name: values[0] for name, values in query.items() if name != "token"})
            response = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return response
        if self.token is not None and not self._has_token(headers):
            return PlainTextResponse("This board needs its token: open the address that the program printed.", 401)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
                return _error(403, f"a change may be asked for by this board's own page alone, not by {origin[:100]}")
            if HEADER not in headers or not is_json(scope):
                return _error(403, f"a change needs the header {HEADER} and a body of JSON")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            return _error(413, f"a request may have at most {MAX_BODY_BYTES // 1024} KiB")
        return None

    def _has_token(self, headers: dict[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(token.strip()):
            return True
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._is_token(found.value)

    def _is_token(self, text: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(text.encode(), self.token.encode())


def limited(receive: Receive) -> Receive:
    """The request's body, which ends with an error when it grows beyond MAX_BODY_BYTES."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge
        return message

    return receive_limited


class BodyTooLarge(Exception):
    """A body without a Content-Length has more than MAX_BODY_BYTES."""


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


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
