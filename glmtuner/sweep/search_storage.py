"""Where a search keeps its trials: a journal in the sweep's folder, or a database; and which processes take part in it.

A journal has one line for every change. Its writers exclude each other by file locks, which the operating system releases when
a process ends, however it ends; a line that a killed process had not finished is cut off before the next one is written.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.locks import LocksUnsupported, is_locked, try_lock
from glmtuner.run_folder.redaction import redact_text

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL, JOURNAL_SUFFIX = "search.journal", ".journal"
LOCKS = ".{}.locks"  # the folder of the lock files, beside the journal
WAIT_SECONDS = 0.01  # between two tries to lock the journal
HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # of the trials in a database


class Locks:
    """The lock files of a search: one that orders the processes, one for the journal, and one for each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker = f"{os.getpid()}-{uuid4().hex[:12]}"
        self._own: IO[bytes] | None = None
        self._supported = True

    def enter(self) -> None:
        """Hold this process's lock until `leave`, or the end of the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.exclusive("search"), suppress(LocksUnsupported):
            self._own = try_lock(self._file_of(self.worker))

    def leave(self) -> None:
        """Release this process's lock and remove its file."""
        if self._own is not None:
            self._own.close()
            self._file_of(self.worker).unlink(missing_ok=True)
            self._own = None

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Wait until no other process is in this block; on a disk without locks nothing is excluded, which is said once."""
        lock = None
        while self._supported and lock is None:
            try:
                lock = try_lock(self.folder / f"{name}.lock")
            except LocksUnsupported as error:
                self._supported = False
                say(
                    f"{self.folder}: the disk has no file locks ({error}): let only one process at a time take part in the search"
                )
            if lock is None and self._supported:
                time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def is_alive(self, worker: str) -> bool | None:
        """Whether the process of this name still runs; None if its lock file is not here, and so nothing is known."""
        file = self._file_of(worker)
        return is_locked(file) if file.is_file() else None

    def forget_dead(self) -> None:
        """Remove the lock files of processes that have ended; to be called when none of their trials is left."""
        for file in self.folder.glob("worker-*.lock"):
            if not is_locked(file):
                file.unlink(missing_ok=True)

    def _file_of(self, worker: str) -> Path:
        return self.folder / f"worker-{worker}.lock"


class JournalLock:
    """Optuna's interface of a journal's lock, which its writers hold, with the lock of the operating system.

    Whoever gets it cuts off what a writer that was killed meanwhile has left.
    """

    def __init__(self, locks: Locks, path: Path) -> None:
        self._locks, self._path, self._held = locks, path, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(self._locks.exclusive("journal"))
        cut_unfinished_line(self._path)
        return True

    def release(self) -> None:
        self._held.close()


def open_search(storage: str | None, sweep: Path) -> tuple["BaseStorage", Locks]:
    """The storage and the locks of a search in the sweep's folder; `storage` is a URL, a journal's path, or None.

    Raises ConfigError for a storage that cannot be opened, CheckpointError for a damaged journal.
    """
    log_to_console()
    journal = journal_of(storage, sweep)
    if journal is None:
        return open_database(str(storage)), Locks(sweep / LOCKS.format("search"))
    locks = Locks(journal.parent / LOCKS.format(journal.name))
    return _open_journal(journal, locks), locks


def journal_of(storage: str | None, sweep: Path) -> Path | None:
    """The journal's path; None if the storage is a database."""
    if storage is None:
        return sweep / JOURNAL
    return Path(storage) if storage.endswith(JOURNAL_SUFFIX) and "://" not in storage else None


def check_storage(storage: str | None, sweep: Path) -> None:
    """Raise ConfigError or CheckpointError if the storage cannot be opened; a journal that is missing is not created."""
    journal = journal_of(storage, sweep)
    if journal is None:
        open_database(str(storage))
    elif os.path.lexists(journal):
        require_whole(journal)
    elif storage is not None and not journal.parent.is_dir():
        raise _not_opened(storage, f"the folder {journal.parent} does not exist; create it")


def _open_journal(path: Path, locks: Locks) -> "BaseStorage":
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    locks.folder.mkdir(exist_ok=True)
    with locks.exclusive("journal"):
        if os.path.lexists(path):
            require_whole(path)
            cut_unfinished_line(path)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(locks, path)))  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def require_whole(path: Path) -> None:
    """Raise CheckpointError for a journal with a line that is none of Optuna's; an unfinished last one is no damage."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; remove it, or type another hydra.sweeper.storage=….journal")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or "op_code" not in entry or "worker_id" not in entry:
            raise _damaged(path, f"line {number} is not an entry of a journal")


def cut_unfinished_line(path: Path) -> None:
    """Remove the end of the file behind its last line break; the caller holds the journal's lock."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
    say(f"{path}: the last line was not finished when its process ended, and is removed")
    os.truncate(path, whole)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}); move it away and type the same command: the search draws its values again, and takes the "
        "results of the jobs that are finished from their folders"
    )


def open_database(url: str) -> "BaseStorage":
    """Optuna's storage of this URL, a database of SQLAlchemy; raises ConfigError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if url.startswith("redis"):
        raise _not_opened(
            url,
            "Optuna keeps pickles in Redis, and nothing is unpickled here; type a database's URL, or leave the storage out",
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are Optuna's since 2.5
            return optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)
    except ImportError as error:
        cause = error.__cause__ or error
        raise _not_opened(url, f"{cause}; install the database's Python driver") from None
    except (SQLAlchemyError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
        raise _not_opened(
            url,
            f"{reason}; legal: a URL of SQLAlchemy such as sqlite:///study.db, whose folder exists, or the path of a file that ends in "
            f"{JOURNAL_SUFFIX}",
        ) from None


def _not_opened(url: str, reason: str) -> ConfigError:
    return ConfigError(redact_text(f"hydra.sweeper.storage={url}: it cannot be opened: {reason}"))


class ConsoleHandler(logging.Handler):
    """Prints log records as lines of our own."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"optuna: {record.getMessage()}")


def log_to_console() -> None:
    """Let Optuna's messages, from warnings on, be lines on our console, once each."""
    import optuna

    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logger = logging.getLogger("optuna")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
