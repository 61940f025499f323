"""Child processes that compute what takes a second or much memory: scores, intervals, comparisons, rows of training data.

So the board itself stays small and answers at once. A child is started when it is asked for something, and ends a while after its
last answer.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import glmtuner
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import strict_json

IDLE_SECONDS = 120.0
LIMIT_SECONDS = 600.0  # for one answer


class Worker:
    """One child process, which does one thing after another. Several threads may ask."""

    def __init__(self, root: Path, in_background: bool = False) -> None:
        self.root, self.in_background = root, in_background
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._timer: threading.Timer | None = None

    def ask(self, task: str, **arguments: Any) -> Any:
        """What the function of this name in `tasks` returns; raises CheckpointError for its GlmtunerErrors, and if the child dies."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            try:
                process = self._started()
            except OSError as error:
                raise CheckpointError(f"no process can be started to compute {task} ({error.strerror})") from None
            limit = threading.Timer(LIMIT_SECONDS, process.kill)
            limit.start()
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(strict_json({"task": task, "arguments": arguments}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                limit.cancel()
            if not line:
                self._end()
                raise CheckpointError(
                    f"the process that computes {task} has ended without an answer (out of memory, or killed); open the page again"
                )
            self._timer = threading.Timer(IDLE_SECONDS, self._end_if_idle)
            self._timer.daemon = True
            self._timer.start()
        found = json.loads(line)
        if "error" in found:
            raise CheckpointError(found["error"])
        return found["answer"]

    def close(self) -> None:
        """End the child."""
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [*python(), "-m", "glmtuner.board.tasks", str(self.root), "nice" if self.in_background else "now"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                env=environment(), start_new_session=True,
            )  # fmt: skip
        return self._process

    def _end_if_idle(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def python() -> list[str]:
    """The start of a child's command line: this Python, without the current folder among those that modules are imported from."""
    return [sys.executable, "-P"]


def environment() -> dict[str, str]:
    """The child's environment: this one, in which this installation of glmtuner is found."""
    package = str(Path(glmtuner.__file__).parent.parent)
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONIOENCODING": "utf-8"}
