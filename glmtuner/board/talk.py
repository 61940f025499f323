"""Talking with runs: each is loaded by a child, `serve` on a free port of the loopback address, with a key that only the board has."""

import http.client
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from glmtuner.board.begun import read_tail
from glmtuner.board.processes import child_environment
from glmtuner.board.root import Root
from glmtuner.errors import CheckpointError, ConfigError

MOST, IDLE_SECONDS, LOOK_SECONDS = 2, 600.0, 5.0
ANSWER_SECONDS = 300.0  # from a question to the end of its answer
ADDRESS = re.compile(r"OpenAI API at http://127\.0\.0\.1:(\d+)/v1")
MODEL = "run"  # its name in the API
PARAMETERS = (  # of the page's, besides the messages
    "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed", "stop", "tools", "tool_choice", "chat_template_kwargs",
)  # fmt: skip


@dataclass
class Talk:
    """One loaded run; `answering` is how many questions it is answering."""

    id: str
    run: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path
    used: float = field(default_factory=time.monotonic)
    answering: int = 0
    port: int | None = None
    abilities: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """loading, ready or ended; what can be asked of it is looked up when it is ready."""
        if self.process.poll() is not None:
            return "ended"
        if self.port is None:
            found = ADDRESS.search("\n".join(read_tail(self.log, 0)))
            if found is None:
                return "loading"
            try:
                self.abilities = abilities(int(found.group(1)))
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                return "loading"
            self.port = int(found.group(1))
        return "ready"

    def record(self) -> dict[str, Any]:
        """What the page knows of it; `lines` are what its process has said."""
        state = self.state
        nothing = {"thinking": None, "tools": None, "max_length": None}
        return {
            "talk": self.id, "id": self.run, "model": MODEL, "state": state, "lines": read_tail(self.log, 0)[-40:],
            **nothing, **self.abilities,
        }  # fmt: skip

    def end(self) -> None:
        """End the process; it gets some seconds, and is then killed."""
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Talks:
    """At most MOST loaded runs, the one that was not asked for the longest time makes room; after IDLE_SECONDS each is ended."""

    def __init__(self, root: Root, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.open_ones: dict[str, Talk] = {}
        self.lock = threading.Lock()
        self.closed = threading.Event()
        threading.Thread(target=self._end_idle, name="board-talks", daemon=True).start()

    def open(self, name: str) -> Talk:
        """Load the run with this id, unless it is; raises CheckpointError if its folder has nothing to talk with."""
        run = self.root.run(name)
        if not run.is_finished:
            raise CheckpointError(
                f"{name} is not finished, so that there is no model to talk with; wait, or continue it"
            )
        with self.lock:
            for talk in [*self.open_ones.values()]:
                if talk.process.poll() is not None:
                    del self.open_ones[talk.id]
                elif talk.run == name:
                    talk.used = time.monotonic()
                    return talk
            if len(self.open_ones) >= MOST:
                idle = sorted(
                    (talk for talk in self.open_ones.values() if not talk.answering), key=lambda talk: talk.used
                )
                if not idle:
                    raise CheckpointError(
                        f"{MOST} runs are loaded, and both are answering; wait until one has answered, or close one"
                    )
                del self.open_ones[idle[0].id]
                idle[0].end()
            talk = self._started(name, run.path)
            self.open_ones[talk.id] = talk
            return talk

    def get(self, talk_id: str) -> Talk:
        """The loaded run with this id; raises CheckpointError if there is none, or none any more."""
        with self.lock:
            if talk_id in self.open_ones:
                return self.open_ones[talk_id]
        raise CheckpointError("this run is not loaded any more; open it again")

    def close(self, talk_id: str) -> None:
        """End a loaded run."""
        with self.lock:
            talk = self.open_ones.pop(talk_id, None)
        if talk is not None:
            talk.end()

    def close_all(self) -> None:
        """End all of them."""
        self.closed.set()
        for talk_id in [*self.open_ones]:
            self.close(talk_id)

    def uses(self, name: str) -> bool:
        """Whether the run, or one in the sweep, is loaded."""
        with self.lock:
            loaded = [talk.run for talk in self.open_ones.values() if talk.process.poll() is None]
        return any(run == name or run.startswith(f"{name}/") for run in loaded)

    def ask(self, talk_id: str, messages: list[dict[str, Any]], parameters: dict[str, Any]) -> AsyncIterator[bytes]:
        """The answer as the server-sent events of `serve`; an error is one, too. It ends with the request that it is for."""
        talk = self.get(talk_id)
        if talk.state != "ready":
            raise CheckpointError(f"{talk.run} is {talk.state}; its model answers once it is loaded")
        if unknown := [name for name in parameters if name not in PARAMETERS]:
            raise ConfigError(f"{unknown[0][:100]}: no parameter of a question; legal: {', '.join(PARAMETERS)}")
        asked = {name: value for name, value in parameters.items() if value is not None}
        body = {
            "model": MODEL,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": messages,
            **asked,
        }
        return events(talk, json.dumps(body).encode())

    def _started(self, name: str, run: Path) -> Talk:
        key, log = secrets.token_urlsafe(24), self.folder / f"talk-{secrets.token_hex(6)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "glmtuner.cli.talker", str(run), "--port", "0", "--name", MODEL, "--grace", "1"],
                cwd=run, env={**child_environment(), "GLMTUNER_API_KEY": key}, stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Talk(secrets.token_urlsafe(12), name, key, process, log)

    def _end_idle(self) -> None:
        while not self.closed.wait(LOOK_SECONDS):
            with self.lock:
                idle = [
                    talk
                    for talk in self.open_ones.values()
                    if not talk.answering and time.monotonic() - talk.used > IDLE_SECONDS
                ]
                for talk in idle:
                    del self.open_ones[talk.id]
            for talk in idle:
                talk.end()


def abilities(port: int) -> dict[str, Any]:
    """What the model's template has, as its server describes itself: both modes of thinking, tools; and the longest conversation."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/openapi.json")
        schemas = json.loads(connection.getresponse().read())["components"]["schemas"]
    finally:
        connection.close()
    thinking = schemas["TemplateOptions"]["properties"]["enable_thinking"]["anyOf"]
    tools = schemas["ChatRequest"]["properties"]["tools"]["anyOf"][0]
    most = schemas["ChatRequest"]["properties"]["max_tokens"]["anyOf"][0].get("maximum")
    return {"thinking": len(thinking) > 1, "tools": tools.get("maxItems") != 0, "max_length": most}


async def events(talk: Talk, body: bytes) -> AsyncIterator[bytes]:
    """What the server of the run answers to the body; a page that leaves ends the answer."""
    assert talk.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", talk.port, timeout=ANSWER_SECONDS)
    talk.answering += 1
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {talk.key}"}
        await run_in_threadpool(connection.request, "POST", "/v1/chat/completions", body, headers)
        answer = await run_in_threadpool(connection.getresponse)
        if answer.status != 200:
            content = await run_in_threadpool(answer.read)
            yield b"data: " + json.dumps(json.loads(content)).encode() + b"\n\n"
            return
        while line := await run_in_threadpool(answer.readline):
            yield line
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"the process of the run has ended or does not answer ({type(error).__name__})"
        yield b"data: " + json.dumps({"error": {"message": reason}}).encode() + b"\n\n"
    finally:
        connection.close()
        talk.answering -= 1
        talk.used = time.monotonic()
