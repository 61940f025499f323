"""A real pseudo-terminal, and what its screen shows after what was written to it."""

import contextlib
import fcntl
import functools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent


class Terminal:
    """A pseudo-terminal of this size; `screen` is what it shows, `written` all bytes that it was sent."""

    def __init__(self, columns: int = 100, rows: int = 60) -> None:
        self.master, self.slave = pty.openpty()
        self.screen = pyte.Screen(columns, rows)
        self.stream, self.written = pyte.ByteStream(self.screen), b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def read(self, seconds: float = 0.1) -> bool:
        """Show what is written within so many seconds; whether there was anything, or more may come."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # the other end is closed
            if part := os.read(self.master, 65536):
                self.written += part
                self.stream.feed(part)
                return True
        return False

    def lines(self) -> list[str]:
        """The lines of the screen up to the last that is not empty; a wide character's second column is left out."""
        end = time.monotonic() + 0.5
        while self.read(0.05) and time.monotonic() < end:
            pass
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def close(self) -> None:
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @contextlib.contextmanager
    def streams(self) -> Iterator[None]:
        """Within it, standard output and error of this process are the terminal."""
        before = sys.stdout, sys.stderr
        with os.fdopen(os.dup(self.slave), "w", buffering=1) as stream:
            sys.stdout = sys.stderr = stream
            try:
                yield
            finally:
                sys.stdout, sys.stderr = before

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        interrupt_at: str = "",
        variables: Mapping[str, str] | None = None,
        watch: Callable[[list[str]], None] | None = None,
        seconds: float = 1200,
        out: int | None = None,
    ) -> int:
        """The exit code of `python -m glmtuner …` in this terminal; Ctrl-C is typed when `interrupt_at` is shown.

        `watch` gets the screen whenever it has changed; `out` takes standard output in place of the terminal.
        """
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8", "GLMTUNER_CACHE": str(folder / "cache"),
               "OMP_NUM_THREADS": "1", **(variables or {})}  # fmt: skip
        child = subprocess.Popen(
            ["env", "--default-signal=INT", "setsid", "--ctty", sys.executable, "-m", "glmtuner", *words],
            cwd=folder, stdin=self.slave, stdout=self.slave if out is None else out, stderr=self.slave, env=env,
        )  # fmt: skip
        end, typed = time.monotonic() + seconds, False
        try:
            while child.poll() is None and time.monotonic() < end:
                if self.read() and watch is not None:
                    watch(list(self.screen.display))
                if interrupt_at and not typed and interrupt_at.encode() in self.written:
                    os.write(self.master, b"\x03")
                    typed = True
            return child.wait(1)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)


def shown(written: bytes) -> str:
    """The text of what was written, without escape codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def on_screen(test: Callable[..., None]) -> Callable[..., None]:
    """The test, which has a fixture `screen`, with its output on that terminal: pytest takes the streams back before each test."""

    @functools.wraps(test)
    def wrapped(screen: Terminal, **fixtures: object) -> None:
        with screen.streams():
            test(screen=screen, **fixtures)

    return wrapped
