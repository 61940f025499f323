"""The trash of a board: runs and sweeps are moved into FOLDER/.trash/<time>/ and back. Only a person empties it, by hand."""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from glmtuner.board.root import Root
from glmtuner.board.starts import sweep_of
from glmtuner.errors import CheckpointError, FolderBusy
from glmtuner.run_folder.folder import LOCK_ATTEMPTS, LOCK_SECONDS, RunFolder, job_folders
from glmtuner.run_folder.locks import LocksUnsupported, try_lock
from glmtuner.run_folder.names import LOCK

TRASH, STAMP = ".trash", re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
MOST_AT_ONCE = 1000


class Trash:
    """Moves folders out of sight; `busy` says why a run or a sweep must stay where it is, None if nothing speaks against it."""

    def __init__(self, root: Root, busy: Callable[[str, Path], str | None]) -> None:
        self.root, self.busy = root, busy
        self.path = root.path / TRASH

    def delete(self, names: Sequence[str]) -> str:
        """Move these runs and sweeps into the trash; the name of the folder there. Nothing is moved if one of them must stay."""
        if not names or len(names) > MOST_AT_ONCE:
            raise CheckpointError(f"ids: {len(names)} runs; legal are 1 to {MOST_AT_ONCE} at once")
        folders = {name: self._folder(name) for name in dict.fromkeys(names)}
        for name, folder in folders.items():
            if inner := [other for other in folders if other.startswith(f"{name}/")]:
                raise CheckpointError(f"{inner[0]} is inside of {name}; delete one of them")
            if reason := self.busy(name, folder):
                raise FolderBusy(f"{name} cannot be deleted: {reason}")
        with ExitStack() as locks:
            for name, folder in folders.items():
                locks.enter_context(locked(name, folder))
            stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            if self.path.is_symlink():
                raise CheckpointError(f"{self.path} is a link, and nothing is moved through it; remove it")
            self.path.mkdir(exist_ok=True)
            (self.path / stamp).mkdir()
            for name, folder in folders.items():
                move(folder, self.path / stamp / name)
        return stamp

    def restore(self, stamp: str) -> list[str]:
        """Move what was deleted together back to where it was; the ids. Nothing is moved if a place is taken."""
        place = self.path / stamp
        if not STAMP.fullmatch(stamp) or self.path.is_symlink() or place.is_symlink() or not place.is_dir():
            raise CheckpointError(f"{stamp[:60]!r} is nothing in the trash ({self.path})")
        names = [path.relative_to(place).as_posix() for path in _deleted(place)]
        for name in names:
            target = self.root.path / name
            parent = next(path for path in target.parents if path.exists())
            if os.path.lexists(target) or not parent.resolve().is_relative_to(self.root.path):
                raise CheckpointError(f"{name} exists again; rename that folder, or move {place / name} back by hand")
        for name in names:
            move(place / name, self.root.path / name)
        for folder in sorted((path for path in place.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        if not any(place.iterdir()):
            place.rmdir()
        return names

    def listed(self) -> list[dict[str, Any]]:
        """What is in the trash, the latest first: `trash`, `ids`, `time`."""
        if self.path.is_symlink() or not self.path.is_dir():
            return []
        found = []
        for place in self.path.iterdir():
            if STAMP.fullmatch(place.name) and place.is_dir() and not place.is_symlink():
                ids = [path.relative_to(place).as_posix() for path in _deleted(place)]
                found.append(
                    {
                        "trash": place.name,
                        "ids": ids,
                        "time": time.mktime(time.strptime(place.name[:15], "%Y%m%d-%H%M%S")),
                    }
                )
        return sorted(found, key=lambda each: str(each["trash"]), reverse=True)

    def _folder(self, name: str) -> Path:
        """The folder of a run or a sweep with this id; raises CheckpointError if a part of its path is a link."""
        folder = sweep_of(self.root, name) or self.root.run(name).path
        if folder == self.root.path:
            raise CheckpointError(f"{name} is the board's own folder; delete it by hand")
        if folder != self.root.path / name:
            raise CheckpointError(
                f"{name} is a link to {folder}, or is reached by one; delete what it leads to, or remove the link by hand"
            )
        return folder


def _deleted(place: Path) -> Iterator[Path]:
    """The runs and sweeps in a folder of the trash, without their insides."""
    for entry in sorted(place.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            continue
        run = RunFolder(entry)
        if run.is_run or (entry / "failed.json").is_file() or (entry / "sweep.json").is_file():
            yield entry
        else:
            yield from _deleted(entry)


def move(source: Path, target: Path) -> None:
    """Rename a folder; raises CheckpointError where the disk does not let it, and nothing is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be moved to {target} ({(error.strerror or '').lower()}); move it by hand"
        ) from None


@contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """Within it, this process has the lock of the run, or of each job of the sweep; raises FolderBusy if another has one."""
    runs = [each for each in (RunFolder(folder), *job_folders(folder)) if (each / LOCK).is_file()]
    with ExitStack() as stack:
        for run in runs:
            try:
                lock = try_lock(run / LOCK)
                for _ in range(LOCK_ATTEMPTS):  # whoever looks whether a folder is locked holds its lock for an instant
                    if lock is not None:
                        break
                    time.sleep(LOCK_SECONDS)
                    lock = try_lock(run / LOCK)
            except LocksUnsupported:
                continue
            if lock is None:
                raise FolderBusy(f"{name} cannot be deleted: {run.path.name} is running; stop it first")
            stack.enter_context(lock)
        yield
