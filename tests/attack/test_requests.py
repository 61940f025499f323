"""Requests from clients that are broken, hostile or many: each gets an answer or an error of the API within ten seconds, or within
a minute where clients that never read have all rows.

ATTACK_REQUESTS is the number of fuzzed requests (1000), ATTACK_SEED their seed, ATTACK_EXAMPLES the number that Schemathesis makes of
each operation and kind (300).
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from small_models import run_of_one_step

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
from schema_checks import check_description

ROOT = Path(__file__).parent.parent.parent
COUNT = int(os.environ.get("ATTACK_REQUESTS", "1000"))
SEED = int(os.environ.get("ATTACK_SEED", "0"))
EXAMPLES = int(os.environ.get("ATTACK_EXAMPLES", "300"))
LIMIT_S = 30
HELLO = [{"role": "user", "content": "你是谁？"}]
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_one_step(tmp_path_factory.mktemp("requests") / "m")


@pytest.fixture
def port(run: Path, tmp_path: Path) -> Iterator[int]:
    """That of a server in a process of its own, which afterwards ends by itself and has shown no traceback."""
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner", "serve", str(run), "--port", "0", "--grace", "2", "generation.max_new_tokens=16"],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        )  # fmt: skip
    try:
        while not (found := re.search(r"at http://\S+:(\d+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield int(found.group(1))
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
    told = log.read_text()
    assert "Traceback" not in told and "rror" not in told.replace("ApiError", ""), told[-3000:]


def post(port: int, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes, float]:
    """Status, body, and seconds until the response had ended."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", PATH, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    found = response.status, response.read(), time.monotonic() - started
    connection.close()
    return found


def health(port: int) -> float:
    """Seconds that /health takes."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    return time.monotonic() - started


def at_once(port: int) -> float:
    """Seconds in which /health answers at once: a tenth, on a machine that does other things ten times what it takes now."""
    return max(0.1, 10 * median(health(port) for _ in range(20)))


def check(status: int, body: bytes, request: Any) -> None:
    """A whole answer, a whole stream, or one error in the form of the API: nothing less, and nothing of Python."""
    text = body.decode()
    if status == 200 and text.startswith("data: "):
        *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        ended = [json.loads(event) for event in events]
        assert last == "[DONE]" and not any("error" in event for event in ended), text[-500:]
        reasons = [choice["finish_reason"] for event in ended for choice in event["choices"]]
        assert len([reason for reason in reasons if reason]) == (request.get("n") or 1)
        return
    answer = json.loads(text)
    if status == 200:
        assert all(choice["finish_reason"] in ("stop", "length", "tool_calls") for choice in answer["choices"])
        return
    assert 400 <= status < 500, (status, text[:500], str(request)[:500])
    error = answer["error"]
    assert {*error} == {"message", "type", "param", "code"} and 5 < len(error["message"]) < 1000
    assert "Traceback" not in text and "pydantic" not in text and len(text) < 3000


VALUES = [
    None, True, False, 0, 1, -1, 2, 16, 17, 2048, 2049, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**4000, 0.0, -0.0, 0.5, 1.0,
    2.0, 2.5, 1e-5, 2e-38, 1e-45, 5e-324, 1e308, float("nan"), float("inf"), float("-inf"), "", "a", "你好", "\ud83d", "\x00",
    "\u202e", "😀" * 50, "a" * 1024, "1" * 5000, " " * 5000, "<|user|>", "</s>", "[gMASK]", "auto", "none", "text", [], [None],
    ["a"], ["text"], ["a"] * 5, ["a" * 1000] * 4, [[]], {}, {"type": "text"}, {"a": "b"}, {"1": 0}, {"1": -100}, {"a": {}},
    {"include_usage": True}, {"type": "function", "function": {"name": "f"}}, HELLO, HELLO * 50, [{"role": "user"}],
]  # fmt: skip
NAMES = [
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "n", "stop", "user", "safety_identifier", "metadata",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "audio", "function_call",
    "functions", "logit_bias", "logprobs", "top_logprobs", "modalities", "moderation", "prediction", "reasoning_effort",
    "response_format", "service_tier", "store", "tool_choice", "tools", "verbosity", "web_search_options", "\ud800", "x" * 5000, "",
]  # fmt: skip
LEGAL: dict[str, list[Any]] = {
    "temperature": [0, 2e-38, 1e-45, 0.7, 2], "frequency_penalty": [-2, 0, 2], "presence_penalty": [-2, 2], "top_p": [1e-9, 1],
    "top_k": [0, 1, 2**31 - 1], "repetition_penalty": [0.01, 1, 100], "seed": [0, -(2**63), 2**63 - 1], "stop": ["a", ["的"] * 4],
    "n": [1, 2, 5], "stream": [True, False], "max_tokens": [1, 3, 16], "stream_options": [{"include_usage": True}],
}  # fmt: skip


def fuzzed(draw: random.Random) -> tuple[bytes, Any]:
    """(body, the request in it if it is one): legal values at their bounds, anything anywhere, or damaged bytes."""
    request: dict[str, Any] = {"model": "m", "messages": HELLO}
    for name in draw.sample([*LEGAL], draw.randint(0, 6)):
        request[name] = draw.choice(LEGAL[name])
    kind = draw.random()
    if kind < 0.45:
        for name in draw.sample(NAMES, draw.randint(1, 2)):
            request[name] = draw.choice(VALUES)
    elif kind < 0.65:
        message = {
            "role": draw.choice(["system", "developer", "user", "assistant", "tool", None]),
            "content": draw.choice(VALUES),
        }
        message |= {draw.choice(["name", "refusal", "tool_calls", "audio", "annotations", "x"]): draw.choice(VALUES)}
        request["messages"] = draw.choice([[message], [*HELLO, message], [message, *HELLO], HELLO + [message] * 20])
    try:
        body = json.dumps(request, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of more digits than Python writes
        body = b'{"model": "m", "seed": ' + b"9" * 4500 + b"}"
    if kind > 0.85:
        damaged = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(damaged))
            damaged[place : place + draw.randint(0, 5)] = draw.randbytes(draw.randint(0, 5))
        body = bytes(damaged)
    return body, request


def test_fuzzed_requests(port: int) -> None:
    draw = random.Random(SEED)
    requests = [fuzzed(draw) for _ in range(COUNT)]
    slowest = []

    def ask(number: int) -> None:
        body, request = requests[number]
        status, answer, seconds = post(port, body)
        try:
            found = json.loads(body)
            request = found if isinstance(found, dict) else request
        except ValueError:
            pass
        check(status, answer, request)
        slowest.append((seconds, number))
        statuses.append(status)

    statuses: list[int] = []
    usual, stop, seen = at_once(port), threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.2):
            seen.append(health(port))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(COUNT)))
    finally:
        stop.set()
        watcher.join()
    assert max(slowest)[0] < LIMIT_S, max(slowest)
    assert median(seen) < usual and max(seen) < LIMIT_S / 2, sorted(seen)
    assert statuses.count(200) > COUNT / 10 and statuses.count(400) > COUNT / 10


def opened(port: int, body: dict[str, Any]) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    content = json.dumps({"model": "m", "messages": HELLO, **body}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_32_clients_that_never_read_and_32_that_never_finish_sending(port: int) -> None:
    deaf = [
        opened(port, {"stream": True, "max_tokens": 1900, "temperature": 2, "top_k": 0, "top_p": 1}) for _ in range(32)
    ]
    mute = []
    for _ in range(32):
        mute.append(socket.create_connection(("127.0.0.1", port)))
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
        mute[-1].sendall(head.encode())
    times = []
    for _ in range(5):
        status, answer, seconds = post(port, json.dumps({"model": "m", "messages": HELLO, "max_tokens": 16}).encode())
        check(status, answer, {})
        times.append(seconds)
        assert health(port) < 10
    assert max(times) < 60  # as long as 32 answers of 1900 tokens take at most
    for one in (*deaf, *mute):
        one.close()


def test_the_largest_bodies_do_not_hold_the_others_up(port: int) -> None:
    megabytes = 4_000_000
    bodies = [
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "1" * megabytes}]}).encode(),
        json.dumps({"model": "m", "messages": HELLO, "stop": ["a" * (megabytes // 4)] * 4}).encode(),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "1" * 600_000}]}).encode(),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "1" * 30_000}]}).encode(),
        json.dumps({"model": "m", "messages": HELLO * 2000}).encode(),
        b'{"model":"m","messages":[' + b"[]," * 200_000 + b"1]}",
        b"[" * 600_000,
        json.dumps(
            {"model": "m", "messages": HELLO, "stop": ["a" * 1000 + end for end in "wxyz"], "temperature": 2}
        ).encode(),
    ]
    usual, seen = at_once(port), []
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, port, bodies[number % len(bodies)]) for number in range(10 * len(bodies))]
        while not all(one.done() for one in asked):
            seen.append(health(port))
        for number, one in enumerate(asked):
            status, answer, seconds = one.result()
            check(status, answer, {})
            assert status == [413, 413, 400, 400, 400, 400, 400, 200][number % len(bodies)] and seconds < LIMIT_S
    assert median(seen) < usual and max(seen) < LIMIT_S / 2, sorted(seen)


def test_schemathesis(run: Path) -> None:
    from glmtuner.launch.build import finished_run
    from glmtuner.serving.app import Limits, Server, max_characters
    from glmtuner.serving.engine import Engine

    finished = finished_run([run], ["generation=greedy"])
    engine = Engine(finished, 32, 256)
    engine.start()
    try:
        check_description(
            Server(finished, engine, "m", Limits(max_characters=max_characters(finished))), EXAMPLES, SEED
        )
    finally:
        engine.close()
