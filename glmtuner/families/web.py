"""HTTP requests whose address is checked before the connection is made, for the URL and for every redirect."""

from __future__ import annotations

import errno
import re
import socket
import ssl
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit

from glmtuner import __version__
from glmtuner.families.addresses import AddressRefused, Origin, checked_addresses

TIMEOUT_S = 60.0
MAX_REDIRECTS = 10
TRANSIENT_STATUS_CODES = {408, 425, 429}  # timeout, too early, rate limit; and all of the server's own errors, from 500
ADVICE = {
    401: "it asks for a login; download the file with your account and type its path",
    403: "it refuses access; download the file with your account and type its path",
    404: "check the URL",
    410: "check the URL",
    429: "wait, and type the same command again",
}
PERMANENT_OS_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


class ServerError(Exception):
    """An answer other than the file: its status, what to do, and how long the server asks to wait."""

    def __init__(self, status: int, reason: str, retry_after_s: float | None) -> None:
        super().__init__(f"the server answers {status} {reason}".rstrip())
        self.status, self.retry_after_s = status, retry_after_s
        self.advice = ADVICE.get(
            status, "try again later, or download it elsewhere and type its path instead of the name"
        )


@dataclass(frozen=True)
class Response:
    """A server's answer; `length` is the number of bytes that it announces, None if it does not.

    `first_byte` is where a part of the file (206) begins, None if the server does not say.
    """

    status: int
    length: int | None
    etag: str | None
    body: IO[bytes] | None
    first_byte: int | None = None

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; empty at the end. Raises OSError if the connection is lost."""
        try:
            return self.body.read(size) if self.body is not None else b""
        except HTTPException as error:
            raise ConnectionError(f"the connection was lost ({type(error).__name__})") from error


@contextmanager
def connect(url: str, trusted: Collection[Origin], headers: dict[str, str]) -> Iterator[Response]:
    """The server's answer to a GET request, after its redirects.

    Raises AddressRefused for an address that may not be opened, ServerError for an error of the server, OSError for one of the
    network.
    """
    for hop in range(MAX_REDIRECTS + 1):
        try:
            opener = _opener(url, trusted)
        except AddressRefused as error:
            if not hop:
                raise
            raise AddressRefused(f"it redirects to {url[:200]}: {error}", error.private_url) from None
        safe = quote(url, safe="%/:=&?~#+!$,;'@()*[]-._")  # characters beyond ASCII
        request = urllib.request.Request(safe, headers={"User-Agent": f"glmtuner/{__version__}", **headers})
        try:
            response = opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            with error:
                if error.code == 304:
                    yield Response(304, None, None, None)
                    return
                target = error.headers.get("Location") if error.code in (301, 302, 303, 307, 308) else None
                if target is None:
                    raise ServerError(
                        error.code, error.reason, _retry_after(error.headers.get("Retry-After"))
                    ) from None
            url = urljoin(url, target)
            continue
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        with response:
            length = response.headers.get("Content-Length", "")
            yield Response(
                status=response.status,
                length=int(length) if length.isdecimal() else None,
                etag=response.headers.get("ETag"),
                body=response,
                first_byte=_first_byte(response.headers.get("Content-Range", "")),
            )
        return
    raise AddressRefused(f"it redirects more than {MAX_REDIRECTS} times")


def is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed: the connection failed or was lost, or the server has a problem."""
    if isinstance(error, ServerError):
        return error.status >= 500 or error.status in TRANSIENT_STATUS_CODES
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return False
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    return isinstance(cause, OSError) and cause.errno not in PERMANENT_OS_ERRORS


def _first_byte(content_range: str) -> int | None:
    """Where the part begins that a Content-Range header describes, `bytes 100-199/200`."""
    found = re.match(r"bytes (\d+)-", content_range)
    return int(found.group(1)) if found else None


def _retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `connect`, which checks them."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:  # fmt: skip
        return None


def _opener(url: str, trusted: Collection[Origin]) -> urllib.request.OpenerDirector:
    """An opener that connects to the checked addresses of the URL's host, or to the proxy of the environment."""
    parts = urlsplit(url)
    by_proxy = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")
    addresses = checked_addresses(url, trusted, by_proxy=by_proxy)
    if by_proxy:
        return urllib.request.build_opener(_NoRedirect())
    return urllib.request.build_opener(
        _NoRedirect(), urllib.request.ProxyHandler({}), _Http(addresses), _Https(addresses)
    )


def _connected(addresses: list[str], port: int, timeout: float | None) -> socket.socket:
    """A connection to the first of the addresses that answers."""
    failure: OSError = OSError("the host has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout)
        except OSError as error:
            failure = error
    raise failure


class _HttpConnection(HTTPConnection):
    def __init__(self, addresses: list[str], host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.addresses = addresses

    def connect(self) -> None:
        self.sock = _connected(self.addresses, self.port, self.timeout)


class _HttpsConnection(HTTPSConnection):
    def __init__(self, addresses: list[str], host: str, **options: Any) -> None:
        self.tls = ssl.create_default_context()
        super().__init__(host, context=self.tls, **options)
        self.addresses = addresses

    def connect(self) -> None:
        self.sock = self.tls.wrap_socket(_connected(self.addresses, self.port, self.timeout), server_hostname=self.host)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self.addresses = addresses

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_HttpConnection, self.addresses), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self.addresses = addresses

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_HttpsConnection, self.addresses), req)
