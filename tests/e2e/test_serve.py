"""`serve`: the real command line, asked by the official client, by raw HTTP, and by a browser."""

import gc
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import openai
import pytest
from listening import listening
from openai import OpenAI
from small_models import run_of_one_step

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = ["你是谁？", "3 + 4 = ?", "你好", "Who are you?", "把“天空”倒过来写", "12 - 5 = ?", "请写一句话", "再见"]
HELLO = [{"role": "user", "content": "你是谁？"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped model, trained for a step."""
    return run_of_one_step(tmp_path_factory.mktemp("serve") / "小格")


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600)

    def post(self, body: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
        """Status and JSON of a raw request."""
        sent = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, body.encode() if isinstance(body, str) else body, sent)
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    def stop(self, how: int = signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


def started(run: Path, folder: Path, *words: str, **env: str) -> Served:
    """`glmtuner serve`, once it says where it listens."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner", "serve", str(run), "--port", "0", *words], stdout=file,
            stderr=subprocess.STDOUT, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )  # fmt: skip
    for _ in range(600):
        found = re.search(r"at (http://\S+:\d+)/v1", log.read_text())
        if found:
            return Served(process, found.group(1).replace("0.0.0.0", "127.0.0.1"), log)
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = started(run, tmp_path_factory.mktemp("server"), "generation=greedy", "--timeout", "60")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def answers(run: Path) -> dict[str, str]:
    """What `chat` answers, greedily."""
    from glmtuner.inference.conversation import Conversation
    from glmtuner.launch.build import finished_run

    finished = finished_run([run], ["generation=greedy"])
    return {question: Conversation(finished).ask(question, lambda text: None)[0] for question in QUESTIONS}


def test_the_official_client_gets_an_answer(served: Served, answers: dict[str, str]) -> None:
    client = served.client()
    assert [model.id for model in client.models.list().data] == ["小格"]
    assert client.models.retrieve("小格").owned_by == "glmtuner"
    found = client.chat.completions.create(model="小格", messages=HELLO)
    assert found.choices[0].message.content == answers["你是谁？"]
    assert found.choices[0].finish_reason == "stop" and found.choices[0].message.role == "assistant"
    assert found.usage and found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.completion_tokens > 5
    assert found.usage.prompt_tokens > 5 and abs(found.created - time.time()) < 60


def test_an_answer_streams_in_whole_characters(served: Served, answers: dict[str, str]) -> None:
    chunks = list(
        served.client().chat.completions.create(
            model="小格", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answers["你是谁？"] and sum(map(bool, pieces)) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any("\ufffd" in piece for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens > 5 and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(served.client().chat.completions.create(model="小格", messages=HELLO, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_common_clients_send_fields_that_ask_for_nothing(served: Served, answers: dict[str, str]) -> None:
    """All of them at once; tests/unit/serving/test_protocol.py has each, and what is refused."""
    answered = openai.types.chat.ChatCompletionMessage(role="assistant", content="我是小格。").model_dump()
    found = served.client().chat.completions.create(
        model="小格", messages=[*HELLO, answered, *HELLO], tools=[], tool_choice="none", functions=[], function_call="auto",
        logit_bias={}, logprobs=False, top_logprobs=0, n=1, response_format={"type": "text"}, modalities=["text"], user="me",
        store=False, metadata={"a": "b"}, parallel_tool_calls=True, reasoning_effort="none", verbosity="medium",
        service_tier="auto", stop=None, seed=None, audio=None, prediction=None, stream_options=None,
        extra_body={"web_search_options": None, "moderation": None, "max_tokens": None},
    )  # fmt: skip
    assert found.choices[0].message.content and found.service_tier == "default"
    last = served.client().chat.completions.create(model="小格", messages=[*HELLO, answered], max_tokens=5)
    empty = [*HELLO, answered, {"role": "user", "content": ""}]
    assert last.choices == served.client().chat.completions.create(model="小格", messages=empty, max_tokens=5).choices
    # an upper bound that the conversation leaves no room for is still a bound
    bounded = served.client().chat.completions.create(model="小格", messages=HELLO, max_tokens=2048)
    assert bounded.choices[0].message.content == answers["你是谁？"]


def test_32_clients_at_once_get_whole_and_correct_answers(served: Served, answers: dict[str, str]) -> None:
    gate = threading.Barrier(32)

    def ask(number: int) -> tuple[str, str]:
        question = QUESTIONS[number % len(QUESTIONS)]
        asked = {"model": "小格", "messages": [{"role": "user", "content": question}]}
        client = served.client()
        gate.wait()
        if number % 2:
            found = client.chat.completions.create(**asked)  # type: ignore[call-overload]
            return question, found.choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        return question, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    assert len(found) == 32
    for question, answer in found:
        assert answer == answers[question]


def test_conversations_parameters_and_stop_texts(served: Served, answers: dict[str, str]) -> None:
    def ask(**asked: Any) -> Any:
        return served.client().chat.completions.create(**{"model": "小格", "messages": HELLO, **asked})

    whole = answers["你是谁？"]
    stop = whole[4:6]
    cut = ask(stop=[stop, "不会出现"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"
    streamed = ask(stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.index(stop)].strip()
    short = ask(max_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    assert whole.startswith(short.choices[0].message.content)
    assert ask(max_completion_tokens=2).usage.completion_tokens == 2
    several = ask(n=3, temperature=1.5, seed=5, max_tokens=20)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    again = ask(n=3, temperature=1.5, seed=5, max_tokens=20)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
    turns = [{"role": "system", "content": "你是助手"}, *HELLO, {"role": "assistant", "content": whole},
             {"role": "user", "content": [{"type": "text", "text": "再说"}, {"type": "text", "text": "一遍"}]}]  # fmt: skip
    longer = ask(messages=turns, user="me", metadata={"a": "b"}, extra_body={"top_k": 5, "repetition_penalty": 1.1})
    assert longer.choices[0].message.content and longer.usage.prompt_tokens > cut.usage.prompt_tokens + 10


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("{", 400, "not JSON"),
        ("[]", 400, "chat request"),
        ("[" * 100_000, 400, ""),
        ('{"messages": [{"role": "user", "content": "hi"}]}', 400, "'model': field required"),
        ('{"model": "other", "messages": [{"role": "user", "content": "hi"}]}', 404, "does not exist"),
        ({"messages": []}, 400, "'messages'"),
        ({"messages": "hi"}, 400, "'messages'"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "'messages.0.role'"),
        ({"messages": [{"role": "user"}]}, 400, "'messages.0.content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "content.0"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, 400, "'messages.0.tool_call_id'"),
        ({"messages": [{"role": "function", "content": "hi"}]}, 400, "'messages.0.role'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "surrogate"),
        ({"messages": [{"role": "user", "content": "长" * 9000}]}, 400, "generation.max_length"),
        ({"messages": [{"role": "user", "content": "1" * 100_000}]}, 400, "the messages have 100000"),
        ({"messages": [{"role": "user", "content": ""}] * 2500}, 400, "2500 messages"),
        ({"max_tokens": 5000}, 400, "5000 were requested"),
        ({"max_tokens": 0}, 400, "'max_tokens'"),
        ({"max_tokens": "5"}, 400, "'max_tokens'"),
        ({"temperature": -1}, 400, "'temperature'"),
        ({"temperature": float("nan")}, 400, "'temperature'"),
        ({"top_p": 0}, 400, "'top_p'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "'stop'"),
        ({"stop": ""}, 400, "'stop'"),
        ({"stop": ["a" * 2**20] * 4}, 413, "KiB"),
        ({"stop": ["a" * 2000]}, 400, "'stop.0'"),
        ({"n": 1000}, 400, "'n'"),
        ({"tools": [{"type": "function"}]}, 400, "'tools.0.function': field required"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "tools other than functions are not available"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs.enable_thinking"),
        ({"repetition_penalty": 1e-300}, 400, "'repetition_penalty'"),
        ({"no_such_field": None}, 400, "unsupported parameter: 'no_such_field'"),
        ({"response_format": {"type": "json_object"}}, 400, "'response_format.type'"),
        ({"seed": 10**30}, 400, "'seed'"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_told_in_the_shape_of_the_api(served: Served, body: Any, status: int, told: str) -> None:
    if isinstance(body, dict):
        body = json.dumps({"model": "小格", "messages": HELLO, **body})
    found, answer = served.post(body)
    assert found == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert told in error["message"] and "pydantic" not in error["message"]


def test_other_requests_that_are_turned_away(served: Served) -> None:
    good = json.dumps({"model": "小格", "messages": HELLO})
    assert served.post(good, Content_Type="text/plain")[0] == 415
    assert served.post(good, CONTENT_type="Application/JSON; charset=UTF-8", Host="LocalHost")[0] == 200
    assert served.post(good, Host="evil.example")[0] == 403
    assert served.post(b"\xff\xfe", "/v1/chat/completions")[0] == 400
    status, answer = served.post(json.dumps({"model": "x" * 5 * 2**20}))
    assert status == 413 and "KiB" in answer["error"]["message"]
    assert served.post(good, "/v1/completions")[0] == 404
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client().models.retrieve("other")
    chunked = http.client.HTTPConnection("127.0.0.1", served.port, timeout=600)
    chunked.request(
        "POST",
        "/v1/chat/completions",
        iter([b" " * 2**20] * 6),
        {"Content-Type": "application/json"},
        encode_chunked=True,
    )
    assert chunked.getresponse().status == 413
    assert served.client().chat.completions.create(model="小格", messages=HELLO).choices  # and it lives on


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    body = json.dumps({"model": "小格", "messages": HELLO, "stream": True, "temperature": 2, "max_tokens": 2000})
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n\r\n"
        connection.sendall((head + body).encode())
        assert b"200 OK" in connection.recv(1000)
    for _ in range(100):
        if "the client disconnected" in served.log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(served.log.read_text())


def test_a_key_many_requests_a_long_answer_and_a_stop(run: Path, tmp_path: Path) -> None:
    server = started(
        run, tmp_path, "--host", "0.0.0.0", "--batch", "1", "--waiting", "1", "--timeout", "2", "--name", "m",
        GLMTUNER_API_KEY="秘密",
    )  # fmt: skip
    try:
        with pytest.raises(openai.AuthenticationError, match="API key is needed"):
            server.client("wrong").models.list()
        assert server.post("{}", Host="anything.example")[0] == 401  # any host, with a key
        key = {"Authorization": "Bearer 秘密".encode().decode("latin-1")}
        long = {"model": "m", "messages": HELLO, "temperature": 2, "top_k": 0, "max_tokens": 1900}
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: server.post(json.dumps(long), **key), range(6)))
        statuses = {status for status, _ in found}
        assert 429 in statuses and statuses <= {200, 429, 504}
        told = {answer["error"]["code"] for status, answer in found if status != 200}
        assert told <= {"rate_limit_exceeded", "timeout"}
        page = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        page.request("GET", "/")
        assert b'"key": true' in page.getresponse().read()
    finally:
        assert server.stop(signal.SIGTERM) == 0
    assert "秘密" not in server.log.read_text() and "Traceback" not in server.log.read_text()


# -- in this process: the same server and sockets, and a model that takes its time ----------------------------------------


@pytest.fixture(scope="module")
def endless(run: Path) -> Any:
    """The run, loaded; it has no stop token, so that answers are as long as they may be."""
    from glmtuner.launch.build import finished_run

    return replace(finished_run([run], ["generation=greedy"]), stops=())


def replace_generation(finished: Any, **values: Any) -> Any:
    return replace(finished, run=replace(finished.run, generation=replace(finished.run.generation, **values)))


def opened(port: int, receive_buffer: int = 0, **fields: Any) -> socket.socket:
    """A connection on which a request was sent and nothing was read."""
    connection = socket.socket()
    connection.settimeout(30)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    body = json.dumps({"model": "m", "messages": HELLO, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhOST: LOCALHOST\r\ncontent-TYPE: Application/JSON\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def rest_of(connection: socket.socket) -> str:
    """All that comes until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def get(port: int, path: str = "/health") -> tuple[int, float]:
    """Status, and seconds that it took."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status, time.perf_counter() - started


def contents(stream: str) -> list[str]:
    """The text of each event of a stream, as chunks may split none of them here."""
    return re.findall(r'"delta": \{"content": "((?:[^"\\]|\\.)*)"\}', stream)


def test_a_request_that_cannot_be_sampled_leaves_the_others_alone(endless: Any) -> None:
    with listening(endless, rows=12, delay_s=0.005) as (_, port):
        others = [opened(port, stream=True, max_tokens=40) for _ in range(10)]
        bad = opened(port, temperature=2e-38, frequency_penalty=2.0, max_tokens=20)
        zero = opened(port, temperature=0, frequency_penalty=2.0, max_tokens=20)
        streams = [b"".join(read_until(other, b"[DONE]")).decode() for other in others]
        assert all('"finish_reason": "length"' in stream and '"error"' not in stream for stream in streams)
        assert len({"".join(contents(stream)) for stream in streams}) == 1
        answers_to = [json.loads(b"".join(read_until(one, b'"usage"')).split(b"\r\n\r\n", 1)[1]) for one in (bad, zero)]
        assert answers_to[0]["choices"] == answers_to[1]["choices"]
        for one in (*others, bad, zero):
            one.close()


def read_until(connection: socket.socket, end: bytes) -> Iterator[bytes]:
    seen = b""
    while end not in seen:
        part = connection.recv(65536)
        assert part, seen
        seen = seen[-len(end) :] + part
        yield part


def test_the_end_waits_for_answers_and_takes_no_new_requests(endless: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(endless, delay_s=0.01) as (server, port):
        idle = socket.create_connection(("127.0.0.1", port))
        streams = [opened(port, stream=True, max_tokens=100) for _ in range(6)]  # two of them wait for a row
        whole = opened(port, max_tokens=50)
        streams[0].recv(10)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        assert get(port) == (503, pytest.approx(0, abs=9)) and get(port, "/v1/models")[0] == 503
        refused = opened(port)
        assert "503 Service Unavailable" in refused.recv(65536).decode()
        for stream in map(rest_of, streams):
            assert stream.count('"finish_reason": "length"') == 1 and "[DONE]" in stream and "error" not in stream
        assert '"completion_tokens":50' in rest_of(whole)
        for left in (idle, refused):
            left.close()
    assert "requests in progress have 10 s to finish (--grace)" in capsys.readouterr().out


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of the server and of uvicorn, whatever libraries did to the logging of this process."""
    logger = logging.Logger("server")
    logger.addHandler(caplog.handler)
    for module in ("engine", "calls"):
        monkeypatch.setattr(f"glmtuner.serving.{module}.log", logger)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", logger.error)  # each connection looks it up again
    return caplog


def test_what_the_grace_time_does_not_finish_ends_with_an_error_event(
    endless: Any, logged: pytest.LogCaptureFixture
) -> None:
    with listening(endless, grace_s=0.5, delay_s=0.05) as (server, port):
        streams = [opened(port, stream=True, max_tokens=1000) for _ in range(5)]  # one of them waits for a row
        whole = opened(port, max_tokens=1000)
        unread = opened(port, receive_buffer=4096, stream=True, max_tokens=1000)
        streams[0].recv(10)
        started = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        for stream in map(rest_of, streams):
            last = [line for line in stream.splitlines() if line.startswith("data: ")][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert "503 Service Unavailable" in (told := rest_of(whole)) and '"stopping"' in told
        assert time.monotonic() - started < 40  # of 50 s that the answers would take
    unread.close()
    assert [record for record in logged.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_clients_that_never_read_do_not_block_the_next(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their 32 answers take all rows; tests/attack/test_requests.py has 32 clients."""
    from glmtuner.cli import serve
    from glmtuner.serving import access, calls

    monkeypatch.setattr(serve, "SEND_BUFFER", 4096)
    monkeypatch.setattr(calls, "MAX_UNSENT", 8)
    monkeypatch.setattr(access, "SEND_TIMEOUT_S", 2.0)
    with listening(replace_generation(endless, max_length=100_000), rows=32) as (server, port):
        deaf = [opened(port, receive_buffer=2048, stream=True, max_tokens=50_000, n=8) for _ in range(4)]
        engine = server.api.engine
        wait_for(lambda: len(engine.paused) == 32, 60)
        stream = opened(port, stream=True, max_tokens=30)
        assert b"[DONE]" in b"".join(read_until(stream, b"[DONE]"))
        # one that reads again goes on; the others lose their connections
        first = b"".join(part for part, _ in zip(iter(lambda: deaf[0].recv(65536), b""), range(100), strict=False))
        assert first.count(b"chat.completion.chunk") > 100
        wait_for(lambda: all(call.unsent < 8 for call in list(server.api.calls)), 30)
        for one in (*deaf, stream):
            one.close()
        wait_for(lambda: not server.api.calls and server.api.gate.inside == 0, 30)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    for _ in range(round(seconds * 20)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("in vain")


def test_health_answers_at_once_while_the_largest_requests_are_read(endless: Any) -> None:
    gc.freeze()  # as `listen` does it
    with listening(endless) as (server, port):
        most, usual = server.api.limits, max(0.1, 10 * median(get(port)[1] for _ in range(20)))
        large = [
            json.dumps({"model": "m", "messages": [{"role": "user", "content": "1" * most.max_characters}]}),
            '{"model":"m","messages":[' + "[]," * (most.max_body_bytes // 3 - 20) + "1]}",
            json.dumps({"model": "m", "messages": [{"role": "user", "content": "中"}] * 2000}),
        ]
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(post_to, port, large[number % 3]) for number in range(24)]
            times = []
            while not all(one.done() for one in asked):
                times.append(get(port)[1])
            statuses = [one.result() for one in asked]
        assert {*statuses} == {400} and len(times) > 5
        assert median(times) < usual and max(times) < 30, times  # this process has the clients, too
        assert post_to(port, "1" * 4_000_000) == 413


def post_to(port: int, body: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body.encode(), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_server_does_what_its_openapi_description_says(endless: Any) -> None:
    """A few requests of each kind; tests/attack/test_requests.py tries many."""
    from schema_checks import check_description

    with listening(replace_generation(endless, max_new_tokens=2)) as (server, _):
        document = check_description(server.api, examples=12)
    request = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert request["model"]["enum"] == ["m"] and request["max_tokens"]["anyOf"][0] == {
        "type": "integer", "minimum": 1, "maximum": 2048,
    }  # fmt: skip


def test_what_cannot_be_served_is_told_before_anything_is_loaded(run: Path, glmtuner: Callable) -> None:
    for words, told in (
        (["--host", "0.0.0.0"], "type GLMTUNER_API_KEY="),
        (["--timeout", "0"], "--timeout 0.0: "),
        (["--timeout", "nan"], "--timeout nan: "),
        (["--timeout", "inf"], "--timeout inf: "),
        (["--grace", "-1"], "--grace -1.0: legal are 0"),
        (["--grace", "nan"], "--grace nan: "),
        (["--name", ""], "--name '': "),
        (["--api-key", ""], "--api-key '': "),
        (["--api-key", "a\nb"], "--api-key or GLMTUNER_API_KEY: "),
        (["--host", "x" * 300, "--api-key", "k"], "cannot listen"),
        (["--port", "99999"], "--port 99999: "),
        (["--host", "192.0.2.1", "--api-key", "k"], "--host 192.0.2.1 --port 8000: cannot listen"),
        (["--port", "0", "generation.num_beams=2"], "generation.num_beams=2: "),
        (["--port", "0", "generation.temprature=1"], "did you mean 'temperature'"),
    ):
        done = glmtuner("serve", str(run), *words)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = glmtuner("serve", str(run), "--port", str(taken.getsockname()[1]))
        assert done.returncode == 2 and "another --port" in done.stderr


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("LocalHost", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_addresses_that_need_no_key(host: str, local: bool) -> None:
    from glmtuner.cli.serve import is_loopback

    assert is_loopback(host) is local


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that speaks Chinese."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--lang=zh-CN",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,700",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(word)
    options.add_experimental_option("prefs", {"intl.accept_languages": "zh-CN"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def test_the_page_answers_in_a_browser(served: Served, answers: dict[str, str], browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def said(role: str) -> list[str]:
        return [found.text for found in browser.find_elements(By.CSS_SELECTOR, f".{role} .said")]

    def waiting() -> bool:
        return bool(browser.find_elements(By.CSS_SELECTOR, ".waits"))

    browser.get(served.url)
    box = browser.find_element(By.ID, "question")
    box.send_keys("你是谁？", Keys.ENTER)
    WebDriverWait(browser, 30).until(lambda _: answers["你是谁？"] in said("assistant") and not waiting())
    box.send_keys("<b>3 + 4</b> = ?", Keys.ENTER)
    WebDriverWait(browser, 30).until(lambda _: len(said("assistant")) == 2 and not waiting())
    assert said("user") == ["你是谁？", "<b>3 + 4</b> = ?"] and said("assistant")[1]
    assert browser.find_element(By.ID, "send").text == "发送"
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    browser.find_element(By.ID, "gear").click()
    browser.find_element(By.ID, "temperature").send_keys("7")
    box.send_keys("你好", Keys.ENTER)
    WebDriverWait(browser, 30).until(lambda _: "'temperature'" in browser.find_element(By.CLASS_NAME, "wrong").text)
    assert box.get_attribute("value") == "你好"  # nothing typed is lost
    browser.find_element(By.ID, "clear").click()
    assert said("user") == []
    assert [entry for entry in browser.get_log("browser") if "400" not in entry["message"]] == []
