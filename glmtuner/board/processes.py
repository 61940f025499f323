"""The processes of runs: who holds a run's lock, which one is a sweep's command, and how a child of the board is started."""

import os
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from glmtuner.config.paths import PACKAGE
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.redaction import redact_overrides

TOKEN = "GLMTUNER_BOARD_TOKEN"
LOCKS = Path("/proc/locks")
MODULES = ("glmtuner", "glmtuner.cli.worker")
OPTIONS = ("--config-dir", "-cd", "--config-name", "-cn")  # that take the word behind them


def child_command(*arguments: str) -> list[str]:
    """The command line of `python -m glmtuner …`."""
    return [sys.executable, "-m", "glmtuner", *arguments]


def child_environment() -> dict[str, str]:
    """The environment of a child, without the board's token.

    The current folder is not on its search path, nor on that of its own children: a recorded command names the folder that it is
    run in, and a file torch.py there would be executed. Plugins are found all the same, behind everything else.
    """
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    root = str(PACKAGE.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # a checkout
        known = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*filter(None, known), root]))
    return {**environment, "PYTHONSAFEPATH": "1"}


def holder(lock: Path) -> psutil.Process | None:
    """The process on this machine that holds the lock of a run folder; None if none does, or none that can be seen from here."""
    for pid in _candidates(lock):
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if pid != os.getpid() and _has_open(process, lock):
                return process
    return None


def _candidates(lock: Path) -> list[int]:
    """The processes that may hold the lock: those that the kernel names, or, where it does not tell, all of this user."""
    try:
        inode, lines = str(lock.stat().st_ino), LOCKS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return [process.pid for process in psutil.process_iter() if is_own(process) and is_glmtuner(process)]
    fields = [line.split() for line in lines if " -> " not in line]
    # the kernel's device number is another than stat's on some file systems, so that the open file decides
    return [
        int(each[4])
        for each in fields
        if len(each) > 5 and each[3] == "WRITE" and each[4].isdecimal() and each[5].rpartition(":")[2] == inode
    ]


def _has_open(process: psutil.Process, path: Path) -> bool:
    return any(os.path.samefile(opened.path, path) for opened in process.open_files() if os.path.exists(opened.path))


def is_own(process: psutil.Process) -> bool:
    """Whether the process is this user's."""
    with suppress(psutil.Error):
        return bool(process.uids().real == os.getuid())
    return False


def words_of(process: psutil.Process) -> list[str] | None:
    """What stands behind `python -m glmtuner` in the process' command line; None for another program."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    for index, word in enumerate(line[:8]):
        if word in MODULES and index and line[index - 1] == "-m":
            return line[index + 1 :]
        if index < 2 and Path(word).name == "glmtuner":
            return line[index + 1 :]
    return None


def is_glmtuner(process: psutil.Process) -> bool:
    """Whether the process executes glmtuner."""
    return words_of(process) is not None


def is_sweep(process: psutil.Process) -> bool:
    """Whether the process is the command of a sweep."""
    words = words_of(process) or []
    return any(word in ("-m", "--multirun") or word.replace(" ", "").lower() == "hydra.mode=multirun" for word in words)


def is_in_worker(process: psutil.Process) -> bool:
    """Whether the process runs one job of a sweep in a worker, which ends alone: that of hydra/launcher=joblib."""
    with suppress(psutil.Error):
        return any("glmtuner.cli.worker" in each.cmdline()[:8] for each in (process, *process.parents()))
    return False


def sweep_command_above(process: psutil.Process) -> psutil.Process | None:
    """The command of the sweep that the process is of: itself, or one that started it; None if there is none."""
    with suppress(psutil.Error):
        for each in (process, *process.parents()):
            if is_own(each) and is_sweep(each):
                return each
    return None


def sweep_command(typed: Sequence[str], cwd: str) -> psutil.Process | None:
    """The running command of this user that was typed as one of these lines in that folder."""
    for process in psutil.process_iter():
        words = words_of(process) if is_own(process) else None
        if words is None or not is_sweep(process):
            continue
        with suppress(psutil.Error):
            line = shlex.join(["python", "-m", "glmtuner", "-m", *redact_overrides(without_options(words))])
            if process.cwd() == cwd and any(_same(line, each) for each in typed):
                return process
    return None


def _same(line: str, typed: str) -> bool:
    """Whether the lines have the same overrides."""
    return line == shlex.join(["python", "-m", "glmtuner", "-m", *without_options(shlex.split(typed)[3:])])


def without_options(words: Sequence[str]) -> list[str]:
    """The overrides among the words of a command line."""
    kept, waits = [], False
    for word in words:
        if waits:
            waits = False
        elif word.startswith("-"):
            waits = word in OPTIONS
        elif word.replace(" ", "").lower() != "hydra.mode=multirun":
            kept.append(word)
    return kept


def verified(process: psutil.Process, what: str) -> psutil.Process:
    """The process, which may be signalled; raises CheckpointError if it is another user's, or no glmtuner."""
    if not is_own(process):
        raise CheckpointError(f"{what}: process {process.pid} is another user's, who alone can stop it")
    if not is_glmtuner(process):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())[:120]
            raise CheckpointError(
                f"{what}: process {process.pid} ({line}) holds it, which is not the command of glmtuner; stop it where it was started"
            )
        raise CheckpointError(f"{what}: its process has just ended")
    return process
