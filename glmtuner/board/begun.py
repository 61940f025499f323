"""What a board has begun: children with their output, and work in threads with what it says. It is forgotten with the board."""

import secrets
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtuner.board.processes import child_environment
from glmtuner.console import plain
from glmtuner.errors import CheckpointError, GlmtunerError

MOST_TASKS, MOST_LINES, MOST_BYTES = 200, 500, 2**18
Say = Callable[[str], None]


@dataclass
class Task:
    """One thing that was begun, `what`, about the run or sweep `about`; `code` is None until it has ended."""

    id: str
    what: str
    about: str | None
    began: float
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    start: int = 0  # of its output in the log
    said: list[str] = field(default_factory=list)
    code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def lines(self) -> list[str]:
        """The last lines of its output, as a terminal would show them."""
        return [*read_tail(self.log, self.start), *self.said][-MOST_LINES:]

    def record(self) -> dict[str, Any]:
        """What the page knows of it, without its lines."""
        state = "running" if self.code is None else "ended"
        return {
            "task": self.id,
            "what": self.what,
            "id": self.about,
            "began": self.began,
            "state": state,
            "code": self.code,
        }


def read_tail(log: Path | None, start: int) -> list[str]:
    """The last lines of the file from that byte on; of what a progress bar wrote over itself, the last state."""
    if log is None:
        return []
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - MOST_BYTES))
            text = file.read(MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.removesuffix("\n").split("\n") if text else []
    return [plain(line.rstrip("\r").rpartition("\r")[2]) for line in lines[-MOST_LINES:]]


class Tasks:
    """All of them, by their ids; the oldest that have ended are forgotten first."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="glmtuner-board-")
        self.known: dict[str, Task] = {}
        self.lock = threading.Lock()

    def child(
        self,
        what: str,
        command: Sequence[str],
        cwd: Path,
        *,
        about: str | None = None,
        log: Path | None = None,
        at_end: Callable[[Task], None] = lambda task: None,
    ) -> Task:
        """Start a command in a session of its own, so that it outlives the board; `at_end` is called once it has ended.

        Its output is added to `log`, which is no link, else to a file that lasts as long as the board.
        """
        task = self._added(what, about)
        task.log = log or Path(self.folder.name) / task.id
        with task.log.open("ab") as file:
            task.start = file.tell()
            task.process = subprocess.Popen(
                [*command], cwd=cwd, env=child_environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

        def wait() -> None:
            assert task.process is not None
            code = task.process.wait()
            try:
                at_end(task)
            finally:
                task.code = code
                task.ended.set()

        threading.Thread(target=wait, name=f"board-{what}", daemon=True).start()
        return task

    def thread(self, what: str, work: Callable[[Say], int], *, about: str | None = None) -> Task:
        """Do `work`, whose result is the task's code, in a thread; it is given a function that adds a line."""
        task = self._added(what, about)

        def run() -> None:
            code = 1
            try:
                code = work(lambda line: task.said.append(plain(line)))
            except GlmtunerError as error:
                task.said.append(plain(str(error)))
                code = 2
            except Exception:
                traceback.print_exc(file=sys.stderr)
                task.said.append("the board failed at this; its output says why")
            finally:
                task.code = code
                task.ended.set()

        threading.Thread(target=run, name=f"board-{what}", daemon=True).start()
        return task

    def get(self, task_id: str) -> Task:
        """The task with this id; raises CheckpointError for one that is not known, or not any more."""
        with self.lock:
            if task_id in self.known:
                return self.known[task_id]
        raise CheckpointError(
            f"this board has not begun {plain(task_id[:40])!r}; what an earlier board began is in its run's log"
        )

    def running(self, about: str) -> list[Task]:
        """What has been begun about this run or sweep, and has not ended."""
        with self.lock:
            return [task for task in self.known.values() if task.about == about and task.code is None]

    def listed(self) -> list[dict[str, Any]]:
        """All of them, the latest first."""
        with self.lock:
            return [task.record() for task in reversed(self.known.values())]

    def close(self) -> None:
        """Forget everything; forecasts are ended, since nobody would read them, and runs and exports go on."""
        for task in self.known.values():
            if task.what == "check" and task.process is not None and task.code is None:
                task.process.terminate()
        self.folder.cleanup()

    def _added(self, what: str, about: str | None) -> Task:
        task = Task(secrets.token_urlsafe(12), what, about, time.time())
        with self.lock:
            over = max(len(self.known) - MOST_TASKS, 0)
            for old in [each for each in self.known.values() if each.code is not None][:over]:
                del self.known[old.id]
            self.known[task.id] = task
        return task
