"""Files of a URL, downloaded once and verified.

Nothing of a URL becomes a path: the file is named by its checksum, or by the checksum of the URL that the user typed, and by a
suffix that is one of those that can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.console import say
from glmtuner.data.addresses import AddressRefused, name_in, trusted_origins
from glmtuner.data.raw import reason_of
from glmtuner.data.readers import READERS
from glmtuner.data.streams import COMPRESSIONS
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from glmtuner.data.addresses import Origin
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.web import Response


RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # before each further attempt after an error that may pass
MAX_RETRY_AFTER_S = 60.0  # that a server may ask us to wait
MAX_BYTES = 200 * 2**30  # of a download: a server may send without an end
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """A file to download: its URL, whose it is for messages, and the hosts that may have private addresses."""

    url: str
    label: str
    trusted: Collection[Origin]
    headers: dict[str, str]


class NotModified(Exception):
    """The server's file is the one that was downloaded before."""


def digest(path: Path, algorithm: str) -> str:
    """A file's checksum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(spec: DatasetSpec, cache_dir: str | Path | None) -> Path:
    """The file of the entry's url, downloaded once; it gets its final name only if its sha256 is right. Raises DataError."""
    url, sha256 = str(spec.url), str(spec.sha256).lower()
    label = f"dataset {spec.name!r} ({spec.origin})"
    suffix = readable_suffix(url, spec.file_name)
    if not suffix:
        raise DataError(f"{label}: url={url}: {SUFFIX_RULE}")
    folder = cache_home(cache_dir) / sha256[:16]
    path = folder / f"data{suffix}"
    names = [path, *(sorted(folder.iterdir()) if folder.is_dir() else [])]  # earlier versions named it as the URL does
    for known in dict.fromkeys(names):
        if known.name.lower().endswith(suffix) and known.is_file() and digest(known, "sha256") == sha256:
            return known

    def verify(downloaded: str) -> None:
        if downloaded != sha256:
            raise DataError(
                f"{label}: {url} has sha256 {downloaded} instead of {sha256}: the file has changed; try again, or update sha256 if "
                "the change is intended"
            )

    fetch(Request(url, label, trusted_origins(), {}), path, verify)
    return path


SUFFIX_RULE = (
    f"its path does not end in {', '.join(READERS)}, the files that can be read; name the file in the URL, or download it and "
    "type its path"
)


def readable_suffix(url: str, file_name: str | None = None) -> str:
    """The suffix of the URL's file, such as .jsonl or .jsonl.gz, or of `file_name` if the URL has none; empty if none is read."""
    name = name_in(url) or (Path(file_name).name.lower() if file_name else "data.json")
    if "." not in name and file_name:
        name = Path(file_name).name.lower()
    parts = [f".{part}" for part in name.split(".")[1:]]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    return f"{parts[-1]}{compression}" if parts and parts[-1] in READERS else ""


def download_typed(url: str, cache_dir: str | Path | None = None) -> Path:
    """The file of a URL that the user typed as a dataset; `#sha256=…` behind it is verified. Raises DataError.

    A copy of an earlier download is used if the server says that the file is still the same, or cannot be reached, which is
    printed.
    """
    from glmtuner.data.addresses import url_problem

    address, _, fragment = url.partition("#")
    wanted = fragment.removeprefix("sha256=").lower()
    label = f"data.dataset={url}"
    if problem := url_problem(address):
        raise DataError(f"{label}: {problem}")
    if fragment and not is_sha256(wanted):
        raise DataError(f"{label}: behind '#' only sha256=<64 hexadecimal digits> is legal")
    if not (suffix := readable_suffix(address)):
        raise DataError(f"{label}: {SUFFIX_RULE}")
    folder = cache_home(cache_dir) / "urls" / hashlib.sha256(address.encode()).hexdigest()[:32]
    path, about = folder / f"data{suffix}", folder / "about.json"
    if wanted and path.is_file() and digest(path, "sha256") == wanted:
        return path
    headers: dict[str, str] = {}
    if path.is_file() and not wanted:
        with suppress(OSError, ValueError):
            if etag := json.loads(about.read_text(encoding="utf-8")).get("etag"):
                headers = {"If-None-Match": str(etag)}

    def verify(downloaded: str) -> None:
        if wanted and downloaded != wanted:
            raise DataError(f"{label}: the file has sha256 {downloaded}; check the URL, or the sha256 that you typed")

    try:
        etag = fetch(Request(address, label, trusted_origins(address), headers), path, verify)
    except NotModified:
        return path
    except Unreachable as error:
        if not path.is_file() or wanted:
            raise
        say(f"{error}; the copy of an earlier download is used ({path})")
        return path
    about.write_text(json.dumps({"etag": etag}), encoding="utf-8")
    return path


def is_sha256(text: str) -> bool:
    """Whether the text is a SHA-256 in hexadecimal."""
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text.lower())


def cache_home(cache_dir: str | Path | None) -> Path:
    """The folder of downloaded files, beside the hub's."""
    home = Path(cache_dir or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    return home / "glmtuner"


def refused_address(label: str, url: str, error: AddressRefused) -> DataError:
    """The error for a URL that is not opened because of where it leads."""
    advice = "download the file and type its path"
    if error.private_url:
        advice = f"if you trust it, type it as the dataset (data.dataset={error.private_url}), or {advice}"
    return DataError(f"{label}: {url} is not opened: {error}; {advice}")


class Unreachable(DataError):
    """A server that cannot be reached, or that did not send the file."""


def fetch(request: Request, path: Path, verify: Callable[[str], None]) -> str | None:
    """Download to `path` and return the server's ETag; an error that may pass is tried again after each of `RETRY_WAITS_S`.

    The file gets its name only if it is complete and `verify`, which gets its sha256, does not raise. Raises DataError.
    """
    from glmtuner.data.web import ServerError, connect, is_transient

    for wait_s in (*RETRY_WAITS_S, None):
        try:
            with connect(request.url, request.trusted, request.headers) as response:
                if response.status == 304:
                    raise NotModified
                _write(response, request, path, verify)
                return response.etag
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
                    f"{request.label}: {request.url} could not be downloaded to {path.parent} ({reason_of(error)}); check the "
                    "network, or download it elsewhere and type its path instead of the name"
                ) from error
            reason = reason_of(error)
        say(f"{request.label}: {request.url}: {reason}; trying again in {wait_s:g} s")
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _write(response: Response, request: Request, path: Path, verify: Callable[[str], None]) -> None:
    """Write the response's body to `path`, by a temporary name until it is verified; raises ConnectionError if it is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if (response.length or 0) > min(free, MAX_BYTES):
        raise DataError(
            f"{request.label}: {request.url} has {response.length:,} bytes and {path.parent} has {free:,} bytes of free space; free "
            "some, or set HF_HOME to a folder on another disk"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    checksum, received = hashlib.sha256(), 0
    try:
        with part.open("wb") as file:
            while block := response.read(BLOCK_BYTES):
                checksum.update(block)
                file.write(block)
                received += len(block)
                if received > MAX_BYTES:
                    raise DataError(
                        f"{request.label}: {request.url} sends more than {MAX_BYTES:,} bytes; it is not read"
                    )
            file.flush()
            os.fsync(file.fileno())
        if response.length is not None and received != response.length:
            raise ConnectionError(f"the connection was lost after {received:,} of {response.length:,} bytes")
        verify(checksum.hexdigest())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
