"""Runs command lines in forks of a process that has imported torch, and kills them where it is told to.

Run as a script it reads one JSON object a line from standard input, a command, and answers each with one, how it ended.
`WarmServer` starts it and talks to it.
"""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Ended(NamedTuple):
    """How a command ended: its exit code (-9 when killed, None when stopped at its time limit), its output, its duration, the changes
    of files that were counted; standard error `apart` if that was asked for, or else in the output."""

    code: int | None
    output: str
    seconds: float
    operations: list[str]
    errors: str


class WarmServer:
    """A process of this environment that answers `run`; close it with `close`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def run(self, *words: str, cwd: Path, timeout: float = 600.0, **more: Any) -> Ended:
        """Run `python -m glmtuner <words>` in the folder; `more` are the arguments of `run` below."""
        command = {"words": list(words), "cwd": str(cwd), "timeout": timeout, **more}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Import what a run needs, then run the commands of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import glmtuner.cli.main
    import glmtuner.training.trainer  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


def run(
    words: list[str],
    cwd: str,
    timeout: float,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
    below: str | None = None,
    kill_at: int | None = None,
    opened: bool = False,
    matching: str = "",
    apart: bool = False,
    kill_at_call: tuple[str, int] | None = None,
    kill_after: float | None = None,
    kill_when: str | None = None,
) -> dict[str, Any]:
    """Run a command in a fork, and kill it by SIGKILL at its `kill_at`-th change of a file in the folder `below`, counted
    from 1, before that change, or after a file is `opened` and nothing is written; only files whose path in the folder has
    something `matching` this regular expression are counted. Or it is killed at the n-th call of a function,
    `kill_at_call=("module:name", n)`; or `kill_after` seconds after its start, or after the file `kill_when` appears, which a
    busy machine sees late."""
    output, errors, listing = (Path(cwd) / name for name in (".output", ".errors", ".operations"))
    errors = errors if apart else output
    for path in (output, errors):
        path.touch()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(
            in_child(words, cwd, env, stdin, output, errors, listing, below, kill_at, opened, matching, kill_at_call)
        )
    code, deadline = None, started + timeout
    counted_from = started if kill_when is None else None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        now = time.monotonic()
        if counted_from is None and os.path.exists(kill_when or ""):
            counted_from = now
        if (kill_after is not None and counted_from is not None and now - counted_from >= kill_after) or now > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -signal.SIGKILL if now <= deadline else None
            break
        time.sleep(0.0005)
    operations = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    told = {path: path.read_text(encoding="utf-8", errors="replace") for path in {output, errors}}
    for path in (output, errors, listing):
        path.unlink(missing_ok=True)
    return {
        "code": code, "output": told[output], "errors": told[errors] if apart else "", "seconds": time.monotonic() - started,
        "operations": operations,
    }  # fmt: skip


def in_child(
    words: list[str], cwd: str, env: dict[str, str] | None, stdin: str | None, output: Path, errors: Path, listing: Path,
    below: str | None, kill_at: int | None, opened: bool, matching: str, kill_at_call: tuple[str, int] | None,
) -> int:  # fmt: skip
    """The exit code of the command."""
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file if errors == output else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        reading, writing = os.pipe()
        os.write(writing, (stdin or "").encode("utf-8", "surrogateescape"))
        os.close(writing)
        os.dup2(reading, 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        os.chdir(cwd)
        os.environ.update(env or {})
        sys.path[0] = cwd  # as `python -m` has it
        if below is not None:
            watch(below, listing, kill_at, opened, matching)
        if kill_at_call is not None:
            count_calls(*kill_at_call)
        from glmtuner.cli.main import main

        code = main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def count_calls(function: str, kill_at: int) -> None:
    """Kill this process at one of the calls of the function."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner, count = import_module(module), 0
    for each in owners:
        owner = getattr(owner, each)
    real = getattr(owner, name)

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(owner, name, counted)


def watch(below: str, listing: Path, kill_at: int | None, opened: bool, matching: str) -> None:
    """Count the changes of files below the folder, list them, and kill this process at one of them."""
    count = 0
    log = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        path = os.fsdecode(arguments[0])
        if event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] not in (-1, None):
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        path = os.path.abspath(path)
        if not (path.startswith(f"{below}/") or path == below) or not re.search(matching, path[len(below) :]):
            return
        count += 1
        os.write(log, f"{event} {path[len(below) :]}\n".encode())
        if count == kill_at:
            if opened and event == "open":
                os.close(os.open(path, arguments[2], 0o644))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
