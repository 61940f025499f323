"""Files of a URL, downloaded once and verified.

Nothing of a URL becomes a path: the file is named by its checksum, or by the checksum of the URL that the user typed, and by a
suffix that is one of those that can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.console import say
from glmtuner.data.readers import READERS
from glmtuner.data.streams import COMPRESSIONS
from glmtuner.errors import DataError
from glmtuner.families.addresses import name_in, trusted_origins
from glmtuner.families.download import NotModified, Request, Unreachable, fetch

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec


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

    fetch(Request(url, label, trusted_origins(), {}, sha256), path, verify)
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
    from glmtuner.families.addresses import url_problem

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
        etag = fetch(Request(address, label, trusted_origins(address), headers, wanted or None), path, verify)
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
