"""A board in a process of its own: what it loads, who reaches it, how it ends, and the errors of its command line."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from glmtuner.board import serve as board_serve
from glmtuner.board.access import cookie_of
from glmtuner.cli.main import main

ROOT = Path(__file__).parent.parent.parent.parent
TOKEN = "the-token-of-these-tests"
SPY = """\
import sys
from glmtuner.__main__ import main
code = main(sys.argv[1:])
print("LOADED", code, *sys.modules)
"""


class Board:
    """`glmtuner board`, once it says where it listens."""

    def __init__(self, folder: Path, *words: str, **env: str) -> None:
        self.log = folder.parent / f"board-{time.monotonic_ns()}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SPY, "board", str(folder), "--port", "0", *words], stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "GLMTUNER_BOARD_TOKEN": TOKEN, **env}, start_new_session=True,
            )  # fmt: skip
        while not (found := re.search(r"at (http://\S+?:(\d+)/)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.url, self.port = found.group(1), int(found.group(2))

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        given = {
            "Authorization": f"Bearer {TOKEN}",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        found = answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        return found

    def raw(self, request: bytes) -> bytes:
        """All that comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(2**16):
                answer += part
            return answer

    def stop(self, *signals: int) -> tuple[int, float, str]:
        """Exit code, seconds and output."""
        started = time.monotonic()
        for number in signals or (signal.SIGINT,):
            self.process.send_signal(number)
        self.process.wait(20)
        text = self.log.read_text()
        return int(re.findall(r"^LOADED (\d+)", text, re.MULTILINE)[0]), time.monotonic() - started, text


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("board") / "outputs"
    folder.mkdir()
    started = Board(folder)
    yield started
    if started.process.poll() is None:
        code, _, text = started.stop()
        assert code == 0 and "Traceback" not in text


def test_a_board_prints_its_address_with_the_token(board: Board) -> None:
    first = board.log.read_text().splitlines()[0]
    assert first.endswith(f"outputs at {board.url}?token={TOKEN} ; Ctrl-C stops the board, not the runs")
    name, ticket = cookie_of(TOKEN)
    status, _, headers = board.ask(f"/?token={TOKEN}", Authorization="")
    assert status == 200 and f"{name}={ticket}" in headers["set-cookie"]
    assert board.ask("/api/about", Authorization="", Cookie=f"{name}={ticket}")[0] == 200
    assert board.ask("/api/about", Authorization="")[0] == 401


@pytest.mark.parametrize(
    ("request_line", "headers"),
    [
        (b"GET /api/about HTTP/1.1", b"Host: evil.com"), (b"GET /api/about HTTP/1.1", b"Host: 127.0.0.1.evil.com"),
        (b"GET http://evil.com/api/about HTTP/1.1", b"Host: evil.com"), (b"GET /api/about HTTP/1.0", b"X: y"),
        (b"GET /api/about HTTP/1.1", b"Host: 127.0.0.1\r\nHost: evil.com"), (b"GET /api/about HTTP/1.1", b"Host: evil.com\r\nHost: 127.0.0.1"),
        (b"GET /page/../access.py HTTP/1.1", b"Host: localhost"), (b"GET /page/%2e%2e/access.py HTTP/1.1", b"Host: localhost"),
        (b"GET /page/..%2faccess.py HTTP/1.1", b"Host: localhost"), (b"GET /page/%2fetc%2fpasswd HTTP/1.1", b"Host: localhost"),
        (b"GET /page/main.js%00 HTTP/1.1", b"Host: localhost"), (b"GET /page/..%5caccess.py HTTP/1.1", b"Host: localhost"),
        (b"TRACE / HTTP/1.1", b"Host: localhost"), (b"OPTIONS * HTTP/1.1", b"Host: localhost"), (b"CONNECT evil.com:80 HTTP/1.1", b"Host: localhost"),
        (b"POST /api/about HTTP/1.1", b"Host: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"),
        (b"\x16\x03\x01\x02\x00", b""), (b"GET /" + b"a" * 100_000 + b" HTTP/1.1", b"Host: localhost"),
    ],
    ids=lambda value: ascii(value)[:50],
)  # fmt: skip
def test_raw_requests_get_an_error_and_no_more(board: Board, request_line: bytes, headers: bytes) -> None:
    bearer = b"" if b"X: y" in headers else f"Authorization: Bearer {TOKEN}\r\n".encode()
    answer = board.raw(request_line + b"\r\n" + headers + b"\r\n" + bearer + b"Connection: close\r\n\r\n")
    assert not answer or int(answer.split(b" ", 2)[1]) in (400, 401, 403, 404, 405, 413), answer
    assert (
        b"Traceback" not in answer and b"root:" not in answer and b"import " not in answer and b"outputs" not in answer
    )
    assert board.ask("/api/about")[0] == 200


def test_a_chunked_body_without_length_is_bounded(board: Board) -> None:
    head = (
        f"POST /api/about HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nX-Glmtuner-Board: 1\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", board.port), timeout=20) as connection:
        connection.sendall(head.encode())
        sent, chunk = 0, b"10000\r\n" + b"x" * 2**16 + b"\r\n"
        with contextlib.suppress(OSError):
            for _ in range(64):  # four times as much as it may have
                connection.sendall(chunk)
                sent += 1
        answer = connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413"), (sent, answer)


def test_an_api_is_not_in_the_way_of_several_viewers_at_once(board: Board) -> None:
    statuses: list[int] = []

    def look() -> None:
        statuses.extend(board.ask(path)[0] for path in ("/", "/page/main.js", "/api/about") for _ in range(5))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 120


def test_a_board_goes_on_while_its_folder_is_away(board: Board) -> None:
    folder = Path(json.loads(board.ask("/api/about")[1])["folder"])
    away = folder.with_name("away")
    folder.rename(away)
    try:
        for path in ("/", "/api/about", "/api/none"):
            assert board.ask(path)[0] in (200, 400, 404)
    finally:
        away.rename(folder)
    assert board.ask("/api/about")[0] == 200


def test_ctrl_c_ends_it_soon_while_clients_are_connected(board: Board) -> None:
    """Pages keep connections open; one sends half of its request, and one nothing at all."""
    connections = [http.client.HTTPConnection("127.0.0.1", board.port) for _ in range(4)]
    for connection in connections[:2]:
        connection.request("GET", "/api/about", headers={"Authorization": f"Bearer {TOKEN}"})
        connection.getresponse().read()
    connections[2].connect()
    connections[2].sock.sendall(b"GET / HT")
    connections[3].connect()
    connections[3].sock.sendall(
        f"POST /api/about HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nX-Glmtuner-Board: 1\r\n"
        "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{".encode()
    )
    time.sleep(0.3)
    code, seconds, text = board.stop()
    printed, _, loaded_line = text.partition("LOADED ")
    said = [
        line for line in printed.splitlines() if line != "WARNING:  Invalid HTTP request received."
    ]  # the tests above
    assert code == 0 and seconds < 5 and len(said) == 1, printed
    loaded = set(loaded_line.split())
    assert "glmtuner.board.serve" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "datasets",
        "peft",
        "matplotlib",
        "pandas",
        "wandb",
        "optuna",
        "tensorboard",
    }
    for connection in connections:
        connection.close()


def test_sigterm_ends_it_too_and_a_loopback_board_may_go_without_a_token(tmp_path: Path) -> None:
    started = Board(tmp_path, "--no-token", "--read-only", "--host", "localhost")
    assert json.loads(started.ask("/api/about", Authorization="")[1])["read_only"] is True
    assert started.ask("/api/about", Authorization="", Host="evil.com")[0] == 403
    code, seconds, text = started.stop(signal.SIGTERM)
    assert code == 0 and seconds < 5 and "token" not in text.splitlines()[0]


def test_all_addresses_need_the_token_and_no_host_name(tmp_path: Path) -> None:
    started = Board(tmp_path, "--host", "0.0.0.0")
    assert started.ask("/api/about", Host="login7.example.org:8100")[0] == 200
    assert started.ask("/api/about", Host="login7.example.org:8100", Authorization="")[0] == 401
    assert started.stop()[0] == 0


def test_a_streaming_answer_does_not_keep_the_board_from_ending(tmp_path: Path) -> None:
    """An endless stream and an endless thread, as routes of other parts of the board may have them."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import socket, sys, threading, time\n"
        "from pathlib import Path\n"
        "from starlette.responses import StreamingResponse\n"
        "from glmtuner.board import serve\n"
        "from glmtuner.board.views import Views\n"
        "from glmtuner.cli.serve import bind_listener\n"
        "before = Views.__init__\n"
        "def patched(self, *arguments, **named):\n"
        "    before(self, *arguments, **named)\n"
        "    def events():\n"
        "        while True:\n"
        "            yield 'data: x\\n\\n'\n"
        "            time.sleep(0.05)\n"
        "    self.router.get('/api/endless')(lambda: StreamingResponse(events(), media_type='text/event-stream'))\n"
        "    self.router.get('/api/asleep')(lambda: time.sleep(60))\n"
        "Views.__init__ = patched\n"
        "listener = bind_listener('127.0.0.1', 0)\n"
        "url = f'http://127.0.0.1:{listener.getsockname()[1]}/'\n"
        "serve.serve(Path(sys.argv[1]), listener, url, None, None, False)\n"
        "print('ENDED')\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    found = re.search(r":(\d+)/", process.stdout.readline())
    assert found
    connections = [http.client.HTTPConnection("127.0.0.1", int(found.group(1))) for _ in range(2)]
    connections[0].request("GET", "/api/endless")
    assert connections[0].getresponse().read(8) == b"data: x\n"
    connections[1].request("GET", "/api/asleep")
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and time.monotonic() - started < 2 * board_serve.GRACE_S + 3
    assert text == ""  # nothing of what was cut off, and not the line after it: the thread still sleeps


def refusal(*words: str) -> str:
    """The paragraph that a command line is refused with."""
    with redirect_stderr(io.StringIO()) as printed:
        assert main(["board", *words]) == 2
    text = printed.getvalue().strip()
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["none"], ["board none: no such folder", "type the folder that holds your runs"]),
        (["file"], ["board file: no such folder"]),
        ([".", "trainer.max_steps=1"], ["trainer.max_steps=1: board takes a folder and no overrides"]),
        ([".", "--port", "70000"], ["--port 70000: legal are 0 (any free one) to 65535"]),
        ([".", "--port", "-1"], ["--port -1"]),
        ([".", "--port", "x"], ["invalid int value: 'x'"]),
        ([".", "--watch", "5"], ["--watch goes with --static OUT"]),
        ([".", "--static", "out", "--watch", "0"], ["--watch 0.0: legal are"]),
        ([".", "--static", "out", "--watch", "nan"], ["--watch nan: legal are"]),
        ([".", "--no-token", "--host", "0.0.0.0"], ["--no-token --host 0.0.0.0: other machines can reach this address", "leave one"]),
        ([".", "--host", "no.such.host.invalid"], ["--host no.such.host.invalid --port 8100: cannot listen on this address"]),
        ([".", "--host", "192.0.2.1"], ["cannot listen on this address", "type another --port"]),
        ([".", "more"], ["more"]),
        (["--tokn"], ["--tokn"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_a_paragraph(
    words: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x", encoding="utf-8")
    text = refusal(*words)
    assert all(part in text for part in parts), text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "token",
    ["short", "x" * 15, "a token with some spaces", "a-token-with;a-semicolon", "ein-Schlüssel-mit-ü", "x" * 20 + "\t"],
)
def test_a_token_that_no_address_or_header_carries_is_refused(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMTUNER_BOARD_TOKEN", token)
    text = refusal(str(tmp_path))
    assert "GLMTUNER_BOARD_TOKEN: a token has at least 16" in text and token not in text


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = refusal(str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert "cannot listen on this address" in text and "0 for a free one" in text


def test_a_random_token_is_new_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMTUNER_BOARD_TOKEN", raising=False)
    tokens: list[Any] = []
    monkeypatch.setattr(
        board_serve, "serve", lambda folder, listener, url, token, hosts, read_only: tokens.append((token, hosts))
    )
    for _ in range(2):
        assert main(["board", str(tmp_path), "--port", "0"]) == 0
    (first, hosts), (second, _) = tokens
    assert first != second and len(first) == 32 and hosts == ("127.0.0.1", "localhost", "[::1]")
