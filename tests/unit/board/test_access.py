"""Who may read a board and who may change something: every request that is refused, and the headers of every answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body

from glmtuner.board import access
from glmtuner.board.access import MAX_BODY_BYTES, POLICY, authority, cookie_of
from glmtuner.board.app import PAGE, application
from glmtuner.errors import ConfigError

TOKEN = "a-token-of-24-characters"
NAME, TICKET = cookie_of(TOKEN)
COOKIE = {"Cookie": f"{NAME}={TICKET}"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ASKED = {"X-Glmtuner-Board": "1", "Content-Type": "application/json"}
LOCAL = ("127.0.0.1", "localhost", "[::1]")


def routes() -> APIRouter:
    router = APIRouter()

    @router.get("/api/about")
    def about(number: int = 0) -> dict[str, Any]:
        return {"number": number}

    @router.post("/api/start")
    def start(words: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
        return {"started": words}

    @router.get("/api/wrong")
    def wrong() -> None:
        raise ConfigError("finetuning.lora_rank=0: a LoRA rank is at least 1")

    @router.get("/api/broken")
    def broken() -> None:
        raise RuntimeError("a secret path: /home/me")

    return router


class Answer:
    def __init__(self, sent: list[Any]) -> None:
        self.status: int = sent[0]["status"]
        self.headers = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
        self.text = b"".join(part.get("body", b"") for part in sent[1:]).decode()

    def header(self, name: str) -> str | None:
        found = [value for known, value in self.headers if known == name]
        assert len(found) < 2, found
        return found[0] if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ask(
    method: str, path: str, *headers: dict[str, str], body: list[bytes | float] | None = None, query: str = "",
    token: str | None = TOKEN, hosts: tuple[str, ...] | None = LOCAL, **options: Any,
) -> Answer:  # fmt: skip
    """The answer to one request; a number in its body is a delay in seconds."""
    given: dict[str, str] = {"Host": "127.0.0.1:8100"}
    for some in headers:
        given |= some
    waiting, sent = list(body or [b""]), []

    async def receive() -> Any:
        while waiting and isinstance(waiting[0], float):
            await asyncio.sleep(waiting.pop(0))  # type: ignore[arg-type]
        if not waiting:
            await asyncio.Event().wait()  # the client stays
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "scheme": "http",
        "raw_path": path.encode(), "root_path": "", "query_string": query.encode("latin-1"), "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8100), "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
    }  # fmt: skip
    app = application([routes()], token, hosts, **options)
    try:
        asyncio.run(app(scope, receive, send))
    except RuntimeError:  # uvicorn prints it; the answer has been sent
        assert path == "/api/broken"
    return Answer(sent)


def test_the_printed_address_gives_the_page_and_a_cookie_that_is_not_the_token() -> None:
    answer = ask("GET", "/", query=f"token={TOKEN}")
    assert answer.status == 200 and answer.text == (PAGE / "index.html").read_text(encoding="utf-8")
    value, *attributes = str(answer.header("set-cookie")).split("; ")
    assert value == f"{NAME}={TICKET}" and {*attributes} == {"HttpOnly", "SameSite=Strict", "Path=/"}
    assert TOKEN not in value and ask("GET", "/api/about", COOKIE).header("set-cookie") is None
    assert cookie_of("another-token-of-24-char")[0] != NAME  # two boards behind one host name keep theirs


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Cookie": f"{NAME}={TOKEN}"}, {"Cookie": f"{NAME}="}, {"Cookie": f"{NAME}={TICKET[:-1]}"}, {"Cookie": NAME},
        {"Cookie": f"x{NAME}={TICKET}"}, {"Cookie": f"{NAME}=é"}, {"Authorization": f"Bearer {TICKET}"},
        {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer ÿ"},
        {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Bearer {TOKEN.upper()}"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/api/about", "/page/main.js", "/api/none", "/nowhere"])
def test_nothing_is_read_without_the_token(path: str, headers: dict[str, str]) -> None:
    answer = ask("GET", path, headers)
    assert answer.status == 401 and "open the address that the program printed" in answer.text
    assert ask("HEAD", path, headers).status == 401


@pytest.mark.parametrize(
    "query", ["token=", "token=x", f"token={TICKET}", "token=%FF%00", "token=令牌".encode().decode("latin-1")]
)
def test_a_wrong_token_in_the_address_gives_nothing(query: str) -> None:
    for headers in ({}, COOKIE):
        answer = ask("GET", "/", headers, query=query)
        assert answer.status == 401 and answer.header("set-cookie") is None and "not the board's token" in answer.text
    assert ask("GET", "/api/about", query=f"token={TOKEN}").status == 401  # it is taken at the page's address alone


def test_a_cookie_reads_beside_any_other_cookies_and_a_bearer_token_needs_none() -> None:
    for cookie in (f'a={{"b": 1}}; {NAME}={TICKET}', f"{NAME}=old; {NAME}={TICKET};;", f"=; ä; {NAME}={TICKET}"):
        assert ask("GET", "/api/about", {"Cookie": cookie}).status == 200
    assert ask("GET", "/api/about", {"Authorization": f"bearer  {TOKEN}"}).json == {"number": 0}
    assert ask("GET", "/api/about", token=None).status == 200


def change(*headers: dict[str, str], **options: Any) -> Answer:
    return ask("POST", "/api/start", *headers, body=[b'{"words": ["a"]}'], **options)


def test_a_change_needs_the_token_itself_and_the_pages_header_and_json() -> None:
    assert change(BEARER, ASKED).json == {"started": ["a"]}
    assert change(BEARER, ASKED, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    assert change(ASKED, token=None).status == 200
    assert change(COOKIE, ASKED).status == 401  # every port of a host name gets its cookies
    assert change(ASKED).status == 401
    for wrong in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
    ):
        assert change(BEARER, ASKED, wrong).status == 403
        assert change(ASKED, wrong, token=None).status == 403
    assert change(BEARER, {"Content-Type": "application/json"}).status == 403


@pytest.mark.parametrize(
    ("host", "origin", "passes"),
    [
        ("127.0.0.1:8100", "http://127.0.0.1:8100", True), ("localhost:9000", "http://LOCALHOST:9000", True),
        ("[::1]:8100", "http://[::1]:8100", True), ("127.0.0.1:8100", "null", False), ("127.0.0.1:8100", "", False),
        ("127.0.0.1:8100", "http://127.0.0.1:8101", False), ("127.0.0.1:8100", "http://localhost:8100", False),
        ("127.0.0.1:8100", "http://127.0.0.1:8100.evil.example", False), ("127.0.0.1:8100", "http://[", False),
        ("127.0.0.1:8100", "http://127.0.0.1:8100@evil.example", False), ("127.0.0.1:8100", "file://", False),
    ],
)  # fmt: skip
def test_a_change_comes_from_the_boards_own_page(host: str, origin: str, passes: bool) -> None:
    for token, more in ((TOKEN, BEARER), (None, {})):
        answer = change({"Host": host, "Origin": origin}, ASKED, more, token=token)
        assert answer.status == (200 if passes else 403), answer.text
    assert authority("http://A:1/x") == "a:1"


@pytest.mark.parametrize(
    ("site", "path", "status"),
    [
        ("none", "/api/about", 200), ("same-origin", "/api/about", 200), ("same-site", "/api/about", 403),
        ("cross-site", "/api/about", 403), ("cross-site", "/page/main.js", 403), ("cross-site", "/", 200), ("same-site", "/", 200),
    ],
)  # fmt: skip
def test_pages_of_other_addresses_may_link_to_the_page_and_load_nothing(site: str, path: str, status: int) -> None:
    assert ask("GET", path, COOKIE, {"Sec-Fetch-Site": site}).status == status
    assert change(BEARER, ASKED, {"Sec-Fetch-Site": site}).status == (200 if site in ("none", "same-origin") else 403)


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("127.0.0.1", True), ("localhost:9000", True), ("LOCALHOST.:1", True), ("[::1]:8100", True), ("", False), ("evil.com", False),
        ("127.0.0.1.evil.com", False), ("127.0.0.1.evil.com:8100", False), ("localhost.evil.com", False), ("evil.com:127.0.0.1", False),
        ("127.0.0.2", False), ("0.0.0.0:8100", False), ("[::ffff:127.0.0.1]:8100", False), ("2130706433", False), ("127.1", False),
        ("localhost@evil.com", False), ("evil.com#localhost", False), ("[::1]x", False), ("ÿ", False),
    ],
)  # fmt: skip
def test_a_local_board_answers_to_its_own_host_names(host: str, passes: bool) -> None:
    """A page whose DNS name was bound to 127.0.0.1 sends its own name."""
    for token in (TOKEN, None):
        answer = ask("GET", "/api/about", {"Host": host}, BEARER, token=token)
        assert answer.status == (200 if passes else 403), answer.text
        assert ask("GET", "/api/about", {"Host": host}, BEARER, token=token, hosts=None).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"])
def test_other_methods_change_nothing(method: str) -> None:
    for path in ("/", "/api/about", "/page/main.js"):
        assert ask(method, path, COOKIE).status == 401
        assert ask(method, path, BEARER).status == 403
        answer = ask(method, path, BEARER, ASKED, body=[b"{}"])
        assert answer.status == 405 and "does not take" in answer.json["error"]
        assert not [name for name, _ in answer.headers if name.startswith("access-control")]
    assert ask("TRACE", "/api/about", BEARER, ASKED, {"Cookie": "secret=1"}).text.find("secret") == -1


def test_a_body_is_bounded_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (str(MAX_BODY_BYTES + 1), "9" * 5000, "-1", "1e9", "x", "²"):
        assert change(BEARER, ASKED, {"Content-Length": length}).status == 413
    parts: list[bytes | float] = [b'{"words": ["', *[b"x" * 2**16] * 16, b'"]}']
    answer = ask("POST", "/api/start", BEARER, ASKED, body=parts)  # chunks, without a length
    assert answer.status == 413 and answer.json == {"error": "a request may have at most 1024 KiB"}
    monkeypatch.setattr(access, "READ_TIMEOUT_S", 0.1)
    answer = ask("POST", "/api/start", BEARER, ASKED, body=[b"{", 0.07, b'"words"', 0.07, b": []}"])
    assert answer.status == 408 and answer.header("connection") == "close"
    assert ask("POST", "/api/start", BEARER, ASKED, body=[b'{"words"', 0.02, b': ["a", "b"]}']).json == {
        "started": ["a", "b"]
    }


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"words": "a"}', b'{"words": [1]}', b"\xff", b"[" * 100_000, b'{"words": [null]}']
)
def test_a_malformed_body_is_refused_in_one_line(body: bytes) -> None:
    answer = ask("POST", "/api/start", BEARER, ASKED, body=[body])
    assert answer.status in (400, 422) and "\n" not in answer.json["error"] and "Traceback" not in answer.text


def test_errors_are_paragraphs_and_tell_nothing_of_the_program() -> None:
    assert ask("GET", "/api/wrong", COOKIE).json == {"error": "finetuning.lora_rank=0: a LoRA rank is at least 1"}
    assert ask("GET", "/api/about", COOKIE, query="number=x").json["error"].startswith("number: ")
    broken = ask("GET", "/api/broken", COOKIE)
    assert broken.status == 500 and broken.json == {
        "error": "the board failed on this request (RuntimeError); its output says why"
    }
    assert ask("GET", "/openapi.json", COOKIE).status == ask("GET", "/docs", COOKIE).status == 404


@pytest.mark.parametrize(
    "name",
    [
        "../access.py", "..%2faccess.py", "%2e%2e/access.py", "/etc/passwd", "//etc/passwd", "..\\access.py", "main.js/", "MAIN.JS",
        "uplot/../main.js", "./main.js", "main.js\0", "uplot", "", "uplot/LICENSE", "file:///etc/passwd", "main.js%00.html",
    ],
)  # fmt: skip
def test_only_the_pages_own_files_are_given(name: str) -> None:
    answer = ask("GET", f"/page/{name}", COOKIE)
    assert answer.status == 404 and "root:" not in answer.text and "import" not in answer.text


def test_every_file_of_the_page_is_given_with_its_type() -> None:
    files = [path for path in PAGE.rglob("*") if path.suffix in (".js", ".css", ".html")]
    assert len(files) >= 7
    types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
    for path in files:
        answer = ask("GET", f"/page/{path.relative_to(PAGE).as_posix()}", COOKIE)
        assert answer.text == path.read_text(encoding="utf-8")
        assert answer.header("content-type") == f"{types[path.suffix]}; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", COOKIE, 200), ("/page/main.js", COOKIE, 200), ("/api/about", COOKIE, 200), ("/api/wrong", COOKIE, 400),
        ("/api/about", {}, 401), ("/api/about", {"Host": "evil.com"}, 403), ("/x", COOKIE, 404), ("/api/broken", COOKIE, 500),
    ],
)  # fmt: skip
def test_every_answer_keeps_the_browser_from_doing_more(path: str, headers: dict[str, str], status: int) -> None:
    answer = ask("GET", path, headers)
    assert answer.status == status
    assert answer.header("content-security-policy") == POLICY
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cross-origin-resource-policy") == "same-origin"
    assert answer.header("cache-control") in ("no-store", "no-cache")
    assert answer.header("access-control-allow-origin") is None


def test_the_policy_allows_no_inline_script_and_nothing_of_another_address() -> None:
    directives = dict(part.strip().partition(" ")[::2] for part in POLICY.split(";"))
    assert directives["default-src"] == "'none'" and directives["require-trusted-types-for"] == "'script'"
    assert {source for value in directives.values() for source in value.split()} <= {
        "'none'",
        "'self'",
        "'script'",
        "data:",
        "blob:",
    }
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"


def test_a_client_that_stops_reading_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SEND_TIMEOUT_S", 0.05)
    aborted: list[Any] = []

    async def asked() -> None:
        lost = asyncio.Event()

        async def send(message: Any) -> None:
            await lost.wait()  # the buffers are full

        def abort(scope: Any) -> None:
            aborted.append(scope["client"])
            lost.set()

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def endless(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        scope = {
            "type": "http", "method": "GET", "path": "/api/about", "client": ("127.0.0.1", 5), "headers": [], "query_string": b"",
        }  # fmt: skip
        await access.BoardFilter(endless, token=None, hosts=None, abort=abort)(scope, receive, send)

    asyncio.run(asked())
    assert aborted == [("127.0.0.1", 5)]


def test_a_stream_is_passed_on_as_it_comes() -> None:
    from starlette.responses import StreamingResponse

    router = APIRouter()

    @router.post("/api/talk/chat")
    async def chat() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    bodies = [b"{}"]

    async def receive() -> Any:
        if not bodies:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    headers = {"host": "localhost", **BEARER, **ASKED}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "path": "/api/talk/chat", "scheme": "http", "query_string": b"",
        "client": ("127.0.0.1", 5), "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "root_path": "",
    }  # fmt: skip
    asyncio.run(application([router], TOKEN, LOCAL)(scope, receive, send))
    assert [part["body"] for part in sent[1:]] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", b""]
