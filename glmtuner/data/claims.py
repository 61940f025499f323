"""Which process tokenizes which piece of a cache entry, among the processes of several nodes that share a folder.

A claim is a file that only one process can create (`O_EXCL`, which NFS has since version 3); it names its owner, which writes a
growing number into a file of its own every few seconds. Clocks of nodes are not compared: an owner whose number has not changed for
`DEAD_SECONDS` of the looking process' own clock is dead, and its claims are taken over. If two processes come to own a claim after
all, both write the same bytes, and only time is lost.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from glmtuner.data.tokenized import is_alive

BEAT_SECONDS, DEAD_SECONDS = 5.0, 60.0


class Claims:
    """The claims of this process in a folder, with the beat that keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.beats = 0
        self.seen: dict[str, tuple[bytes, float]] = {}  # of other owners: their last number, and when it was first seen
        self.held: set[str] = set()
        self.ended = threading.Event()

    def __enter__(self) -> "Claims":
        self._beat()
        threading.Thread(target=self._beat_on, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        for name in [*self.held]:
            self.release(name)
        with suppress(OSError):
            self._file_of(self.owner).unlink()

    def _file_of(self, owner: str) -> Path:
        return self.folder / f".{owner}.alive"

    def _beat(self) -> None:
        self.beats += 1
        with suppress(OSError):  # a server that is away for a moment
            self._file_of(self.owner).write_text(str(self.beats))

    def _beat_on(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            self._beat()

    def take(self, name: str) -> bool:
        """Whether this process owns the claim from now on; a dead owner loses it."""
        path = self.folder / f".{name}.claim"
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if not self._is_dead(path):
                    return False
                removed = path.with_name(f"{path.name}.{self.owner}")
                with suppress(OSError):  # another process was faster
                    path.rename(removed)
                    removed.unlink()
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self.owner)
            self.held.add(name)
            return True
        return False

    def release(self, name: str) -> None:
        """Give a claim back."""
        self.held.discard(name)
        with suppress(OSError):
            (self.folder / f".{name}.claim").unlink()

    def _is_dead(self, claim: Path) -> bool:
        try:
            owner = claim.read_text()
        except OSError:  # released meanwhile
            return False
        process = owner.rpartition(".")[0].rpartition(".")[2]
        if owner.startswith(f"{socket.gethostname()}.") and process.isdecimal() and not is_alive(int(process)):
            return True
        try:
            number = self._file_of(owner).read_bytes()
        except OSError:
            number = b""
        now = time.monotonic()
        before, since = self.seen.get(owner, (None, now))
        if number != before:
            self.seen[owner] = (number, now)
            return False
        return now - since > DEAD_SECONDS
