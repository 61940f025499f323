"""What stands in front of the routes: hosts, keys, sizes, and clients that are slow to send or to read."""

import asyncio
import json
from typing import Any

import pytest

from glmtuner.serving import access
from glmtuner.serving.access import Gate, RequestFilter, host_name, is_json
from glmtuner.serving.protocol import ApiError

LOCAL = ("127.0.0.1", "localhost", "[::1]")


async def reading_app(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the body and answers 200; an ApiError is answered as the server does it."""
    try:
        while (await receive()).get("more_body"):
            pass
    except ApiError as error:
        return await access.error_response(error)(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(
    *parts: bytes | float, path: str = "/v1/x", headers: dict[str, str] | None = None, **options: Any
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON body and headers for a request whose body comes in these parts; a number is a delay in seconds."""
    settings: dict[str, Any] = {"key": None, "hosts": LOCAL, "max_body_bytes": 1000, "gate": Gate(), **options}
    sent: list[Any] = []
    waiting = list(parts)

    async def receive() -> Any:
        while waiting and isinstance(waiting[0], float):
            await asyncio.sleep(waiting.pop(0))
        body = waiting.pop(0) if waiting else b""
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "localhost", **(headers or {})}
    scope = {
        "type": "http", "method": "POST", "path": path, "client": ("127.0.0.1", 1),
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
    }  # fmt: skip
    asyncio.run(RequestFilter(reading_app, **settings)(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert settings["gate"].inside == 0
    return sent[0]["status"], json.loads(sent[1]["body"]), found


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"), ("LocalHost:8000", "localhost"), ("LOCALHOST.", "localhost"), ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"), ("127.0.0.1:1", "127.0.0.1"), ("evil.example", "evil.example"), ("", ""), ("localhost:", "localhost"),
        ("localhost:x", "localhost:x"), ("localhost.evil.example", "localhost.evil.example"),
    ],
)  # fmt: skip
def test_hosts_compare_without_regard_to_case_and_port(header: str, name: str) -> None:
    assert host_name(header) == name
    status, body, _ = ask(b"{}", headers={"host": header})
    assert status == (200 if name in LOCAL else 403), body
    assert ask(b"{}", headers={"host": header}, hosts=None)[0] == 200


def test_names_of_headers_and_schemes_compare_without_regard_to_case() -> None:
    for name, value in (("Authorization", "Bearer k"), ("AUTHORIZATION", "bearer k"), ("authorization", "BEARER  k ")):
        assert ask(b"{}", headers={name: value}, key="k")[0] == 200
    for value in ("Bearer K", "Basic k", "k", "Bearer", ""):
        status, body, headers = ask(b"{}", headers={"Authorization": value}, key="k")
        assert status == 401 and body["error"]["code"] == "invalid_api_key" and headers["www-authenticate"] == "Bearer"
    assert ask(b"{}", path="/health", key="k")[0] == 200


@pytest.mark.parametrize(
    ("value", "legal"),
    [
        ("application/json", True), ("Application/JSON; charset=UTF-8", True), (" APPLICATION/JSON ", True),
        ("application/json;charset=utf-8", True), ("text/plain", False), ("application/jsonp", False), ("", False),
    ],
)  # fmt: skip
def test_media_types_compare_without_regard_to_case(value: str, legal: bool) -> None:
    for name in (b"content-type", b"Content-Type", b"CONTENT-TYPE"):
        assert is_json({"headers": [(name, value.encode())]}) is legal
    assert not is_json({"headers": []})


def test_a_body_is_bounded_however_it_comes() -> None:
    assert ask(b"x" * 1000)[0] == 200
    for length in ("1001", "9" * 5000):
        assert ask(b"", headers={"content-length": length})[0] == 413
    status, body, _ = ask(*[b"x" * 100] * 11)
    assert status == 413 and body["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "READ_TIMEOUT_S", 0.1)
    status, body, headers = ask(b"a", 0.06, b"b", 0.06, b"c")  # each part is in time, the whole is not
    assert status == 408 and body["error"]["code"] == "request_timeout" and headers["connection"] == "close"
    assert ask(b"a", 0.02, b"b")[0] == 200


def test_a_client_that_stops_reading_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SEND_TIMEOUT_S", 0.05)
    lost, aborted = asyncio.Event(), []

    async def send(message: Any) -> None:
        await lost.wait()  # the buffers are full

    def abort(scope: Any) -> None:
        aborted.append(scope["client"])
        lost.set()

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "GET", "path": "/v1/x", "client": ("127.0.0.1", 5), "headers": []}
    app = RequestFilter(reading_app, key=None, hosts=None, max_body_bytes=9, gate=Gate(), abort=abort)
    asyncio.run(app(scope, receive, send))
    assert aborted == [("127.0.0.1", 5)]


def test_a_closed_gate_lets_no_request_of_the_api_in() -> None:
    gate = Gate()
    assert ask(b"{}", gate=gate)[0] == 200
    gate.is_closed = True
    status, body, headers = ask(b"{}", gate=gate)
    assert status == 503 and body["error"]["type"] == "server_error" and headers["retry-after"]
    assert ask(b"{}", path="/health", gate=gate)[0] == 200  # its route says what it is
