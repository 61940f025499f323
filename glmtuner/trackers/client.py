"""The client library of a tracker in a process of its own.

Client libraries of experiment trackers install hooks (of exceptions, of SIGINT, of imports), print, wait for their server, and
some allow one run per process. None of this reaches the training here: it only writes lines into a pipe. If the training is
killed, the pipe ends, and the client stores what it has received and closes the run as failed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import glmtuner
from glmtuner.console import say
from glmtuner.run_folder.locks import LocksUnsupported, try_lock
from glmtuner.run_folder.redaction import redact_text

LOCK_SECONDS = 60.0  # that the client of a killed training may take to store the rest
LONGEST_ERROR = 800  # characters: libraries say in their last sentence what to do
LAST_OUTPUT = 4096  # bytes of what a client printed in which the reason of its end is looked for
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # a scheduler sends them to every process of a job


@dataclass(frozen=True)
class Description:
    """What a client is told of a run, or of the report of a sweep, when it starts; secrets are redacted, `options` aside."""

    tracker: str
    folder: str
    project: str
    name: str
    group: str | None
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    log_artifact: bool
    options: dict[str, Any] = field(default_factory=dict)  # the tracker's own keys
    is_report: bool = False


class ClientFailed(Exception):
    """The client library raised an error, or its process ended."""


class ClientSession:
    """One run at a tracker, in the client's process; subclasses import the library when they are constructed.

    A resumed run is a new session of the same run, in which the history is logged again from its first line.
    """

    address: str | None = None  # printed once the session is open
    last_step = 0  # of the lines that were logged

    def __init__(self, description: Description, note: Callable[[str], None]) -> None:
        self.about, self.note = description, note
        self.folder = Path(description.folder)
        self.logs = self.folder / description.tracker
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = wait_for_lock(self.logs / ".lock")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one line of the history."""
        raise NotImplementedError

    def finish(self, metrics: dict[str, float]) -> str | None:
        """Log pictures, tables, the final metrics and, if asked for, the weights, and close the run; returns a line to print."""
        raise NotImplementedError

    def abandon(self, preempted: bool) -> None:
        """Close a run that failed or, if `preempted`, will be resumed."""
        raise NotImplementedError


def wait_for_lock(path: Path) -> IO[bytes] | None:
    """The locked file; None on a disk without locks. Raises TimeoutError while an earlier client of the run holds it."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock = try_lock(path)
        except LocksUnsupported:
            return None
        if lock is not None:
            return lock
        if time.monotonic() > end:
            raise TimeoutError(f"another client has {path} locked")
        time.sleep(0.1)


class ClientProcess:
    """The client's process, seen from the training; nothing here waits for the client but `receive`."""

    def __init__(self, module: str, variables: dict[str, str]) -> None:
        """Start the process for the `Session` of a module; environment variables of the user win over `variables`."""
        checkout = str(Path(glmtuner.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (checkout, os.environ.get("PYTHONPATH"))))
        self._output = TemporaryFile()  # what the library prints  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from glmtuner.trackers.client import main; main()", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**variables, **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in a terminal does not reach it
        )
        self._calls: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # a client that ended says why in its last reply
            while (call := self._calls.get()) is not None:
                pipe.write(call)
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._replies.put(json.loads(line))
        code = self._process.wait()
        with self._output:
            self._replies.put({"error": f"its process ended with code {code}{self._last_words()}"})

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - LAST_OUTPUT))
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f": {redact_text(lines[-1])}" if lines else ""

    def send(self, call: str, **arguments: Any) -> None:
        """Queue a call; see `serve` for those that are replied to."""
        self._calls.put(json.dumps([call, arguments]).encode() + b"\n")

    def receive(self, timeout_s: float | None) -> Any:
        """The value of the next reply; notes before it are printed.

        Raises ClientFailed if the client failed, and TimeoutError.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                reply = self._replies.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no answer within {timeout_s:g} s") from None
            if "note" in reply:
                say(reply["note"])
            elif "error" in reply:
                raise ClientFailed(reply["error"])
            else:
                return reply["value"]

    def check(self) -> None:
        """Print notes that have arrived; raises ClientFailed if the client failed."""
        with suppress(TimeoutError):
            self.receive(0.0)

    def close(self, timeout_s: float) -> None:
        """Let the process end; one that has not after `timeout_s` is left to itself, to end once it has stored everything."""
        self._calls.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.close(10.0)


def serve(module: str, calls: IO[str], replies: IO[str]) -> int:
    """Serve the calls of a training; returns the exit code.

    `open`, `finish` and `abandon` are replied to with a value, and an error with its text; the session is over then.
    """

    def reply(**content: Any) -> None:
        with suppress(BrokenPipeError, ValueError):  # the training is gone
            replies.write(json.dumps(content) + "\n")
            replies.flush()

    session: ClientSession | None = None
    try:
        for text in calls:
            call, arguments = json.loads(text)
            if call == "open":
                session = import_module(module).Session(
                    Description(**arguments), lambda text: reply(note=redact_text(text))
                )
                ignore_signals()  # again: the library may have set handlers
                assert session is not None
                reply(value=session.address and redact_text(session.address))
                continue
            assert session is not None
            if call == "log":
                session.last_step = arguments["step"]
                session.log(**arguments)
            elif call == "finish":
                line = session.finish(**arguments)
                reply(value=line and redact_text(line))
                return 0
            else:
                session.abandon(**arguments)
                reply(value=None)
                return 0
    except Exception as error:
        reply(error=redact_text(f"{type(error).__name__}: {one_line(error, LONGEST_ERROR)}"))
        import traceback

        traceback.print_exc()
        if session is not None:
            with suppress(Exception):
                session.abandon(preempted=False)
        return 1
    if session is not None:  # the training was killed
        session.abandon(preempted=False)
    return 1


def one_line(error: BaseException, longest: int = 300) -> str:
    """The error's message on one line, truncated."""
    return " ".join(str(error).split())[:longest].rstrip(".")


def ignore_signals() -> None:
    """Ignore what ends a training: the client ends when the training's pipe does."""
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def main() -> None:
    """Serve the training that started this process, by its standard input and output."""
    ignore_signals()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints is no reply
    code = serve(sys.argv[1], sys.stdin, replies)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the libraries' own hooks at exit would close the run once more
