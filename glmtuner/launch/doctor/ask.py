"""Questions to programs and functions that may hang or crash: each has a limit of time, and an answer in any case."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
KILL_SECONDS = 1.0  # that a killed program may take to end; one that waits for a driver does not end
MOST_BYTES = 1 << 20  # of a program's output


@dataclass(frozen=True)
class Answer:
    """What a program printed, and why it is no answer: `not found`, `no answer within 10 s`, its error; empty if it is one."""

    out: str
    problem: str = ""

    @property
    def reason(self) -> str:
        return self.problem or "it printed nothing that can be read"

    def objects(self) -> list[dict[str, Any]]:
        """The lines that are JSON objects."""
        found = []
        for line in self.out.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return [each for each in found if isinstance(each, dict)]

    def last_object(self) -> dict[str, Any]:
        """The last line that is a JSON object; empty if there is none."""
        return (self.objects() or [{}])[-1]


def ask(command: Sequence[str], seconds: float) -> Answer:
    """What the program prints within so many seconds; it, and what it started, is killed after them, and not waited for."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
            )
        except FileNotFoundError:
            return Answer("", "not found")
        except OSError as error:
            return Answer("", f"cannot be started ({error.strerror})")
        problem = ""
        try:
            code = process.wait(seconds)
            if code:
                how = f"was killed by signal {-code}" if code < 0 else f"exit code {code}"
                problem = f"{how}: {last_words(read(errors))}".rstrip(": ")
        except subprocess.TimeoutExpired:
            problem = f"no answer within {seconds:g} s"
            with suppress(OSError):
                if os.name == "nt":
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
        return Answer(read(out), problem)


def read(file: Any) -> str:
    """The text of a file that a program has written."""
    file.seek(0)
    return str(file.read(MOST_BYTES).decode(errors="replace"))


def last_words(text: str) -> str:
    """The last line of an error, shortened."""
    return first_line("\n".join(reversed(text.strip().splitlines())))[:300]


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def one_line(error: BaseException) -> str:
    """The error on one line, its class in front."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def in_background(call: Callable[[], T]) -> Callable[[], T]:
    """Begin the call in a thread; the function that is returned waits for its result, and raises what it raised."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result(seconds: float | None = None) -> T:
        thread.join(seconds)
        if errors:
            raise errors[0]
        if not results:
            raise TimeoutError
        return results[0]

    return result


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result; raises TimeoutError if it takes longer, and leaves it behind."""
    deadline = time.monotonic() + seconds
    result: Any = in_background(call)
    found: T = result(deadline - time.monotonic())
    return found
