"""ModelScope: models and datasets by its plain HTTP interface, into a folder that is verified file by file.

`MODELSCOPE_DOMAIN` names another server than modelscope.cn, and `MODELSCOPE_API_TOKEN` an account for private repositories, as for
ModelScope's own client (modelscope/hub/api.py), whose code is not used.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from glmtuner.config.offline import advice, offline_folder
from glmtuner.config.paths import cache_root
from glmtuner.console import say
from glmtuner.errors import ConfigError, DataError
from glmtuner.families.addresses import trusted_origins, url_problem
from glmtuner.families.download import Request, Unreachable, fetch
from glmtuner.run_folder.files import write_json

Kind = Literal["models", "datasets"]
DOMAIN, TOKEN = "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
LISTING = ".modelscope.json"  # the repository's files, and which of them are here
PAGE = 100  # files of a page of a dataset's list
MOST_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository: its path in it, its size in bytes, its sha256 if the server says it, and whether it is here."""

    path: str
    size: int
    sha256: str | None
    is_here: bool = False


def endpoint() -> str:
    """The address of the server, without a slash at its end; raises ConfigError for a MODELSCOPE_DOMAIN that is none."""
    domain = os.environ.get(DOMAIN) or "modelscope.cn"
    address = (domain if "://" in domain else f"https://{domain}").rstrip("/")
    if problem := url_problem(address):
        raise ConfigError(
            f"{DOMAIN}={domain}: {problem}; type a host such as modelscope.cn, or an address such as http://host:port"
        )
    return address


def folder_of(kind: Kind, repository: str, revision: str, cache_dir: str | None) -> Path:
    """Where the repository's files are kept: `modelscope/<kind>/<organisation>/<name>/<revision>` of the cache."""
    root = offline_folder() or (Path(cache_dir).expanduser() if cache_dir else cache_root())
    return root / "modelscope" / kind / repository / revision


def revision_of(revision: str | None) -> str:
    """The revision as ModelScope calls it, where the first branch is master."""
    return "master" if revision in (None, "main") else str(revision)


def snapshot(
    kind: Kind,
    repository: str,
    revision: str | None,
    choose: Callable[[Iterable[str]], Iterable[str]],
    *,
    cache_dir: str | None = None,
    label: str,
) -> Path:
    """The folder with those files of the repository that `choose` returns of its paths; what is missing is downloaded.

    A server that cannot be reached is no error if all of them are here. Raises DataError, which `label` begins.
    """
    from filelock import FileLock

    if not REPOSITORY.fullmatch(repository):
        raise DataError(f"{label}: {repository!r} is not the id of a repository of ModelScope, organisation/name")
    revision = revision_of(revision)
    if not re.fullmatch(r"[\w.][\w./-]*", revision) or ".." in revision:
        raise DataError(f"{label}: {revision!r} is not a revision, such as master or v1.0.0")
    folder = folder_of(kind, repository, revision, cache_dir)
    known = read_listing(folder)
    if offline_folder() is not None:
        return _complete(folder, known, choose, label, advice())
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        known = read_listing(folder)
        try:
            files = listed(kind, repository, revision, label)
        except Unreachable as error:
            with suppress(DataError):
                complete = _complete(folder, known, choose, label, "")
                say(f"{error}; the copy of an earlier download is used ({folder})")
                return complete
            raise
        _download(folder, kind, repository, revision, files, known, {*choose([file.path for file in files])}, label)
    return folder


def listed(kind: Kind, repository: str, revision: str, label: str) -> list[RepoFile]:
    """The files of a repository as the server lists them; raises DataError."""
    base = f"{endpoint()}/api/v1/{kind}/{repository}/repo"
    if kind == "models":
        found = _listed_at(f"{base}/files?Revision={quote(revision)}&Recursive=true", label)
    else:
        by_path: dict[str, dict[str, Any]] = {}
        page, size = 1, PAGE
        while size == PAGE:
            pages = f"&PageNumber={page}&PageSize={PAGE}"
            batch = _listed_at(f"{base}/tree?Revision={quote(revision)}&Root=/&Recursive=true{pages}", label)
            before = len(by_path)
            by_path |= {str(entry.get("Path")): entry for entry in batch}
            # a server that ignores the page repeats the first one
            page, size = page + 1, len(batch) if len(by_path) > before else 0
        found = [*by_path.values()]
    return [_repo_file(entry, label) for entry in found if entry.get("Type") != "tree"]


def _listed_at(url: str, label: str) -> list[dict[str, Any]]:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        fetch(_request(url, label), answer, lambda digest: None)
        if answer.stat().st_size > MOST_LIST_BYTES:
            raise DataError(f"{label}: {url} answers more than {MOST_LIST_BYTES:,} bytes, which is no list of files")
        try:
            value = json.loads(answer.read_bytes())
        except ValueError:
            value = None
    if isinstance(value, dict) and value.get("Code") not in (None, 200):
        raise DataError(
            f"{label}: {url}: the server answers {value.get('Code')} {str(value.get('Message'))[:200]}; check the id"
        )
    data = value.get("Data") if isinstance(value, dict) else None
    files = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        raise DataError(f"{label}: {url} does not answer with a list of files; check {DOMAIN}={os.environ.get(DOMAIN)}")
    return files


def _repo_file(entry: dict[str, Any], label: str) -> RepoFile:
    path, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
    if (
        not isinstance(path, str)
        or not path
        or ".." in path.split("/")
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
    ):
        raise DataError(
            f"{label}: the server lists a file {path!r}, which is not a path in the repository; nothing is downloaded"
        )
    is_digest = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
    return RepoFile(path, size if isinstance(size, int) else 0, sha256 if is_digest else None)


def file_url(kind: Kind, repository: str, revision: str, path: str) -> str:
    """The address of a file."""
    return f"{endpoint()}/api/v1/{kind}/{repository}/repo?Revision={quote(revision)}&FilePath={quote(path)}"


def _request(url: str, label: str, sha256: str | None = None) -> Request:
    token = os.environ.get(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    elsewhere = "set GLMTUNER_CACHE or model.cache_dir to a folder on another disk"
    return Request(url, label, trusted_origins(endpoint()), headers, sha256, elsewhere)


def _download(
    folder: Path,
    kind: Kind,
    repository: str,
    revision: str,
    files: list[RepoFile],
    known: list[RepoFile],
    wanted: set[str],
    label: str,
) -> None:
    """Download the wanted files that are missing or have changed, and record each once it is verified."""
    before = {file.path: file for file in known if file.is_here}
    now = {
        file.path: replace(
            file,
            is_here=_is_same(folder, file, before.get(file.path)),
            sha256=file.sha256 or _known_digest(before.get(file.path)),
        )
        for file in files
    }
    missing = [file for file in now.values() if file.path in wanted and not file.is_here]
    needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{label}: {len(missing)} files of {needed:,} bytes are to be downloaded, and {folder} has {free:,} bytes of free space; "
            "free some, or set GLMTUNER_CACHE or model.cache_dir to a folder on another disk"
        )
    if missing:
        say(f"{label}: {len(missing)} files of {repository} ({needed / 2**20:,.1f} MiB) from {endpoint()}")
    for file in missing:
        got: list[str] = []

        def verify(digest: str, file: RepoFile = file, got: list[str] = got) -> None:
            if file.sha256 is not None and digest != file.sha256:
                raise DataError(
                    f"{label}: {file.path} of {repository} has sha256 {digest}, and the server lists {file.sha256}; the file was "
                    f"damaged on its way or changed: type the same command again, or another server in {DOMAIN}"
                )
            got.append(digest)

        (folder / file.path).unlink(missing_ok=True)
        fetch(_request(file_url(kind, repository, revision, file.path), label, file.sha256), folder / file.path, verify)
        size = (folder / file.path).stat().st_size
        now[file.path] = replace(file, sha256=got[-1], size=size, is_here=True)
        write_listing(folder, now.values())
    if not missing:
        write_listing(folder, now.values())


def _known_digest(before: RepoFile | None) -> str | None:
    return before.sha256 if before is not None else None


def _is_same(folder: Path, file: RepoFile, before: RepoFile | None) -> bool:
    """Whether the file is here as the server has it: by the sha256 that it was verified by, and its size."""
    if before is None or before.sha256 is None or file.sha256 not in (None, before.sha256):
        return False
    if file.sha256 is None and file.size not in (0, before.size):
        return False
    here = folder / file.path
    return here.is_file() and here.stat().st_size == before.size


def read_listing(folder: Path) -> list[RepoFile]:
    """What is recorded of the repository's files; empty if nothing is, or if the record is damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        entries = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        return [
            RepoFile(path, int(about["size"]), about["sha256"], bool(about["here"])) for path, about in entries.items()
        ]
    return []


def write_listing(folder: Path, files: Iterable[RepoFile]) -> None:
    entries = {file.path: {"size": file.size, "sha256": file.sha256, "here": file.is_here} for file in files}
    write_json(folder / LISTING, entries)


def _complete(
    folder: Path, known: list[RepoFile], choose: Callable[[Iterable[str]], Iterable[str]], label: str, what: str
) -> Path:
    """The folder, if it has every file that is asked for; raises DataError."""
    wanted = {*choose([file.path for file in known])}
    missing = [
        file.path
        for file in known
        if file.path in wanted and not _is_same(folder, file, file if file.is_here else None)
    ]
    if not known or missing:
        lacks = f"it lacks {missing[0]}" if missing else "no files of it are here"
        raise DataError(f"{label}: {folder}: {lacks}; {what}")
    return folder


def checksum(folder: Path) -> str:
    """One sha256 for all files of the repository that are here, whatever folder they are in."""
    import hashlib

    lines = sorted(f"{file.path} {file.sha256}" for file in read_listing(folder) if file.is_here)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
