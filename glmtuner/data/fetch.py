"""Files of a URL, downloaded once and verified."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.data.raw import reason_of
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec


DOWNLOAD_TIMEOUT_S = 60.0


def digest(path: Path, algorithm: str) -> str:
    """A file's checksum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(spec: DatasetSpec, cache_dir: str | Path | None) -> Path:
    """The file of the entry's url, downloaded once; it gets its final name only if its sha256 is right. Raises DataError."""
    from http.client import (
        HTTPException,
    )  # imported here, since few runs download and an error of the user is reported sooner
    from urllib.parse import unquote, urlsplit
    from urllib.request import urlopen

    url, sha256 = str(spec.url), str(spec.sha256).lower()
    home = Path(cache_dir or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    path = home / "glmtuner" / sha256[:16] / (unquote(Path(urlsplit(url).path).name) or "data.json")
    if path.is_file() and digest(path, "sha256") == sha256:
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    downloaded = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                downloaded.update(block)
                file.write(block)
        if downloaded.hexdigest() != sha256:
            raise DataError(
                f"dataset {spec.name!r} ({spec.origin}): {url} has sha256 {downloaded.hexdigest()} instead of {sha256}: "
                "the file has changed, or the download is incomplete; try again, or update sha256 if the change is intended"
            )
        part.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"dataset {spec.name!r} ({spec.origin}): {url} could not be downloaded to {path.parent} ({reason_of(error)}); "
            "check the network, or download it elsewhere and type its path instead of the name"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path
