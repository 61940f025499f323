"""Downloads of single files by plain HTTP, which go on where they were interrupted, and are verified before they get their name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from glmtuner.config.offline import advice, offline_folder
from glmtuner.console import plain, say
from glmtuner.errors import DataError
from glmtuner.families.addresses import AddressRefused
from glmtuner.run_folder.locks import LocksUnsupported, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from glmtuner.families.addresses import Origin
    from glmtuner.families.web import Response

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # before each further attempt after an error that may pass
MAX_RETRY_AFTER_S = 60.0  # that a server may ask us to wait
MAX_BYTES = 200 * 2**30  # of a download: a server may send without an end
BLOCK_BYTES = 1 << 20
RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class Request:
    """A file to download: its URL, whose it is for messages, and the hosts that may have private addresses.

    `sha256` is what the file must have, None if that is not known. `elsewhere` is what to do about a disk without space.
    """

    url: str
    label: str
    trusted: Collection[Origin]
    headers: dict[str, str]
    sha256: str | None = None
    elsewhere: str = "set HF_HOME to a folder on another disk"


class NotModified(Exception):
    """The server's file is the one that was downloaded before."""


class Unreachable(DataError):
    """A server that cannot be reached, or that did not send the file."""


class Lost(ConnectionError):
    """The connection was lost before the file was complete."""


def refused_address(label: str, url: str, error: AddressRefused) -> DataError:
    """The error for a URL that is not opened because of where it leads."""
    what = "download the file and type its path"
    if error.private_url:
        what = f"if you trust it, type it as the dataset (data.dataset={error.private_url}), or {what}"
    return DataError(f"{label}: {url} is not opened: {error}; {what}")


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    line = " ".join(str(error).split())
    return plain(f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}")


def fetch(request: Request, path: Path, verify: Callable[[str], None]) -> str | None:
    """Download to `path` and return the server's ETag; an error that may pass is tried again after each of `RETRY_WAITS_S`.

    What an interrupted download has left, in this process or an earlier one, is completed if the server still has the same
    file. The file gets its name only if it is complete and `verify`, which gets its sha256, does not raise. Raises DataError.
    """
    from glmtuner.families.web import ServerError, is_transient

    if offline_folder() is not None:
        raise Unreachable(f"{request.label}: {request.url} is not downloaded: {advice()}")
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return _attempt(request, path, verify)
        except AddressRefused as error:
            raise refused_address(request.label, request.url, error) from None
        except ServerError as error:
            waiting = error.retry_after_s if error.retry_after_s is not None else wait_s
            if wait_s is None or waiting is None or waiting > MAX_RETRY_AFTER_S or not is_transient(error):
                raise Unreachable(f"{request.label}: {request.url}: {error}; {error.advice}") from None
            wait_s, reason = waiting, str(error)
        except (OSError, ValueError) as error:
            if wait_s is None or not is_transient(error):
                raise Unreachable(
                    f"{request.label}: {request.url} could not be downloaded to {path.parent} ({one_line(error)}); check the "
                    "network, or download it elsewhere and type its path instead of the name"
                ) from error
            reason = one_line(error)
        say(f"{request.label}: {request.url}: {reason}; trying again in {wait_s:g} s")
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _attempt(request: Request, path: Path, verify: Callable[[str], None]) -> str | None:
    """One attempt at the download; raises Lost if it is cut off, and then the next one goes on from there."""
    from glmtuner.families.web import ServerError, connect

    path.parent.mkdir(parents=True, exist_ok=True)
    part = Part.open(path, request)
    try:
        headers = {**request.headers, **part.range_headers()}
        try:
            with connect(request.url, request.trusted, headers) as response:
                if response.status == 304:
                    raise NotModified
                part.receive(response, request)
                part.finish(verify, path)
                return response.etag
        except ServerError as error:
            if error.status != RANGE_NOT_SATISFIABLE or not part.size:
                raise
            part.restart()
            raise Lost("the server's file has become shorter than what was downloaded of it") from None
        except Lost:
            part.keep()
            raise
        except KeyboardInterrupt:
            part.keep()
            raise
    finally:
        part.close()


@dataclass
class Part:
    """What has been downloaded of a file: `.<name>.part`, locked by the process that writes it, and the server's ETag beside it."""

    path: Path
    about: Path
    file: IO[bytes]
    url: str
    sha256: str | None
    etag: str | None = None
    kept: bool = False

    @classmethod
    def open(cls, target: Path, request: Request) -> Part:
        """The part of an earlier download if it may be completed, else an empty one."""
        path = target.with_name(f".{target.name}.part")
        try:
            file = try_lock(path)
        except LocksUnsupported:
            file = None
        if file is None:  # another process downloads the same file
            path = target.with_name(f".{target.name}.{os.getpid()}.part")
            file = path.open("wb")
        part = cls(path, path.with_name(f"{path.name}.json"), file, request.url, request.sha256)
        if part.size:
            known: object = None
            with suppress(OSError, ValueError):
                known = json.loads(part.about.read_text(encoding="utf-8"))
            is_same = isinstance(known, dict) and known.get("url") == request.url
            if isinstance(known, dict) and is_same and isinstance(known.get("etag"), str):
                part.etag = known["etag"]
            if not is_same or (
                part.etag is None and request.sha256 is None
            ):  # nothing tells whether the rest belongs to it
                part.restart()
        return part

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def range_headers(self) -> dict[str, str]:
        """The headers that ask for the rest only (RFC 9110, 14.2)."""
        if not self.size:
            return {}
        return {"Range": f"bytes={self.size}-"} | ({"If-Range": self.etag} if self.etag else {})

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def keep(self) -> None:
        """Leave what there is for the next attempt."""
        self.kept = bool(self.size) and (self.sha256 is not None or self.etag is not None)

    def receive(self, response: Response, request: Request) -> None:
        """Write the response's body; raises DataError if the disk has no space for it, Lost if it is cut off."""
        if self.size and (response.status != 206 or response.first_byte != self.size):
            self.restart()
            if response.status == 206:
                raise Lost("the server sent another part of the file than the one it was asked for")
        elif self.size:
            say(f"{request.label}: {request.url}: goes on after {self.size:,} bytes")
        strong = response.etag if response.etag and not response.etag.startswith("W/") else None
        if strong != self.etag or not self.size:
            self.etag = strong
            self.about.write_text(json.dumps({"url": self.url, "etag": strong}), encoding="utf-8")
        free = shutil.disk_usage(self.path.parent).free
        if (response.length or 0) > min(free, MAX_BYTES):
            self.keep()
            raise DataError(
                f"{request.label}: {request.url} has {response.length:,} bytes and {self.path.parent} has {free:,} bytes of free "
                f"space; free some, or {request.elsewhere}"
            )
        received = 0
        try:
            while block := response.read(BLOCK_BYTES):
                self.file.write(block)
                received += len(block)
                if received > MAX_BYTES:
                    raise DataError(
                        f"{request.label}: {request.url} sends more than {MAX_BYTES:,} bytes; it is not read"
                    )
        except ConnectionError as error:
            self.file.flush()
            raise Lost(str(error)) from error
        self.file.flush()
        os.fsync(self.file.fileno())
        if response.length is not None and received != response.length:
            raise Lost(f"the connection was lost after {received:,} of {response.length:,} bytes")

    def finish(self, verify: Callable[[str], None], target: Path) -> None:
        """Give the file its name if its sha256 is right."""
        with self.path.open("rb") as file:
            verify(hashlib.file_digest(file, "sha256").hexdigest())
        self.path.replace(target)
        self.about.unlink(missing_ok=True)
        self.kept = True

    def close(self) -> None:
        if not self.kept:
            self.path.unlink(missing_ok=True)
            self.about.unlink(missing_ok=True)
        self.file.close()
