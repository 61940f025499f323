"""The manifest of a folder that `prefetch` fills: size, sha256, source and revision of each of its files."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from glmtuner.config.offline import MANIFEST
from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_object, write_json

MOST_NAMED = 5  # of the files that are wrong
MADE_HERE = (
    "tokenized",
    "datasets",
)  # folders of what is made of downloads; a damaged part of them is made again as a whole


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes, where it is from, and the commit, or the revision that was asked for."""

    sha256: str
    size: int
    source: str
    revision: str


Manifest = dict[str, Entry]  # by the path in the folder, with slashes


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest; raises CheckpointError if it has none, or a damaged one."""
    values = read_object(folder / MANIFEST).get("files")
    try:
        return {str(path): Entry(**entry) for path, entry in values.items()}  # type: ignore[union-attr]
    except (TypeError, AttributeError):
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged (it does not list files); remove it, and type the same prefetch command again"
        ) from None


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    write_json(folder / MANIFEST, {"files": {path: asdict(files[path]) for path in sorted(files)}})


def entry_of(path: Path, source: str, revision: str) -> Entry:
    """The entry of a file as it is now."""
    with path.open("rb") as file:
        return Entry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size, source, revision)


def problem_of(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file, in a few words; None if it is what it was when it was downloaded."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.size:
        return f"{path.stat().st_size:,} bytes instead of {entry.size:,}"
    found = entry_of(path, "", "").sha256
    return None if found == entry.sha256 else f"sha256 {found[:12]}… instead of {entry.sha256[:12]}…"


def verify(folder: Path) -> None:
    """Compare every file with the manifest, and print what was compared; raises CheckpointError for files that are wrong."""
    files = read_manifest(folder)
    wrong = {path: problem for path, entry in files.items() if (problem := problem_of(folder / path, entry))}
    if wrong:
        named = "; ".join(f"{path}: {problem}" for path, problem in [*wrong.items()][:MOST_NAMED])
        more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise CheckpointError(
            f"--verify {folder}: {len(wrong)} of {len(files)} files are not what was downloaded: {named}{more}; type the prefetch command "
            "again that filled the folder, and they are fetched anew"
        )
    size = sum(entry.size for entry in files.values())
    say(f"{folder}: {len(files)} files, {size / 2**20:,.1f} MiB: all of them are what was downloaded")


def remove_damaged(folder: Path, files: Manifest) -> None:
    """Remove the files that differ from the manifest, so that they are fetched again, and say which."""
    for path, entry in files.items():
        problem = problem_of(folder / path, entry)
        if problem is None:
            continue
        if problem != "missing":
            say(f"{folder / path} is damaged ({problem}); it is fetched again")
        parts = Path(path).parts
        if parts[0] in MADE_HERE and len(parts) > 2:
            shutil.rmtree(folder / parts[0] / parts[1], ignore_errors=True)
            continue
        blob = Path(os.path.realpath(folder / path))  # the hub's cache keeps contents apart from names
        (folder / path).unlink(missing_ok=True)
        if blob.is_relative_to(folder.resolve()):
            blob.unlink(missing_ok=True)
