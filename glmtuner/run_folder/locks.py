"""File locks that the operating system releases when the process that holds them ends, however it ends.

They are filelock's native locks (flock, or LockFileEx on Windows) on a file that stays where it is: a lock file left by an
earlier process means nothing. filelock's `FileLock` is not used because, where flock is missing, it falls back to lock
files whose existence is the lock, and those outlive a killed process on another node of a cluster.
"""

from pathlib import Path
from typing import IO


class LocksUnsupported(OSError):
    """The disk or the platform does not support file locks."""


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock the file, created if missing; returns it open, or None if it is locked through another open file.

    Closing the returned file releases the lock. Raises LocksUnsupported where the lock cannot be requested at all.
    """
    from filelock import lock_descriptor  # the import takes 20 ms

    file = path.open("ab")
    try:
        if lock_descriptor(file.fileno(), blocking=False):
            return file
    except OSError as error:
        file.close()
        raise LocksUnsupported(error.errno, f"the lock of {path} cannot be requested ({error})") from error
    file.close()
    return None


def is_locked(path: Path) -> bool:
    """Whether a process, this one or another, holds the lock of the file; False if it is missing or cannot be locked.

    Where flock exists the check takes a shared lock, which filelock does not offer: two processes that check at the same
    time do not see each other's lock as the holder's, and the file may be read-only, or on NFS, which grants exclusive
    locks only on files opened for writing.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            return not _try_lock_shared(file.fileno())
        except OSError:
            return False


def _try_lock_shared(descriptor: int) -> bool:
    """Lock an open file until it is closed: shared with other readers where the platform has flock, else exclusively."""
    try:
        import fcntl
    except ImportError:
        from filelock import lock_descriptor

        return lock_descriptor(descriptor, blocking=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
