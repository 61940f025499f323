"""Encoded rows in the cache: an entry is a folder of pieces, each of which is there as a whole or not at all.

A piece has `rows-00000.arrow` (none if no record of it has a row), `hashes-00000`, and `piece-00000.json`, which is written last
and names the size and the SHA-256 of both. `counts.json`, written when all pieces are there, makes the entry complete. Files are
written under names of their process, flushed to the disk and renamed, also over NFS: who dies leaves whole pieces.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glmtuner.config.offline import offline_folder
from glmtuner.config.paths import cache_root
from glmtuner.console import say
from glmtuner.data import SkippedRecord
from glmtuner.data.counts import Counts
from glmtuner.data.fetch import digest
from glmtuner.errors import DataError
from glmtuner.run_folder.names import PARTIAL

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

COUNTS = "counts.json"


def tokenized_folder(key: str) -> Path:
    """The cache's folder for the rows with this key; that of GLMTUNER_OFFLINE if it has them, which may be read-only."""
    prefetched = (offline_folder() or cache_root()) / "tokenized" / key
    return prefetched if (prefetched / COUNTS).is_file() else cache_root() / "tokenized" / key


def rows_name(index: int) -> str:
    """The file of a piece's rows."""
    return f"rows-{index:05}.arrow"


def hashes_name(index: int) -> str:
    """The file with the `record_hash` of each record of a piece."""
    return f"hashes-{index:05}"


def piece_name(index: int) -> str:
    """The file that makes a piece complete."""
    return f"piece-{index:05}.json"


@dataclass(kw_only=True)
class PieceInfo:
    """What became of a piece's records; `numbers` are how many numbers they take in each file, `files` name (size, SHA-256)."""

    counts: Counts = field(default_factory=Counts)
    bad: list[SkippedRecord] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, index: int) -> "PieceInfo | None":
        """What is stored of a piece; None if it is not complete, or its file is damaged."""
        try:
            stored = json.loads((folder / piece_name(index)).read_text(encoding="utf-8"))
            counts, bad = Counts(**stored.pop("counts")), [SkippedRecord(**record) for record in stored.pop("bad")]
            files = {name: (int(size), str(sha256)) for name, (size, sha256) in stored.pop("files").items()}
            return cls(counts=counts, bad=bad, files=files, **stored)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_intact(self, folder: Path) -> bool:
        """Whether the piece's files have the content that was written."""
        try:
            for name, (size, sha256) in self.files.items():
                if (folder / name).stat().st_size != size or digest(folder / name, "sha256") != sha256:
                    return False
        except OSError:
            return False
        return True


class PieceWriter:
    """Writes a piece batch by batch; `finish` makes it complete, and without it `close` leaves nothing of it."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index
        self.partial = folder / f".{rows_name(index)}.{own_suffix()}"
        self.hashes = bytearray()
        self.file: BinaryIO | None = None
        self.writer: pyarrow.ipc.RecordBatchStreamWriter | None = None

    def write(self, rows: "pyarrow.RecordBatch | None") -> None:
        """Write a batch of rows."""
        from pyarrow import ipc

        if rows is None:
            return
        if self.writer is None:
            self.file = self.partial.open("wb")
            self.writer = ipc.new_stream(self.file, rows.schema)
        self.writer.write_batch(rows)

    def finish(self, info: PieceInfo) -> PieceInfo:
        """The piece's info with its files, which are on the disk under their names."""
        info.files = {hashes_name(self.index): (len(self.hashes), hashlib.sha256(self.hashes).hexdigest())}
        if self.writer is not None and self.file is not None:
            self.writer.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            info.files[rows_name(self.index)] = (self.partial.stat().st_size, digest(self.partial, "sha256"))
            try:
                self.partial.replace(self.folder / rows_name(self.index))
            except FileNotFoundError:  # another process has completed the entry meanwhile, and tidied up
                if not (self.folder / COUNTS).is_file():
                    raise
        write_alone(self.folder / hashes_name(self.index), bytes(self.hashes))
        write_alone(self.folder / piece_name(self.index), json.dumps(asdict(info)).encode())
        return info

    def close(self) -> None:
        """Leave no file that is not complete."""
        if self.file is not None:
            self.file.close()
            with suppress(OSError):
                self.partial.unlink()


def own_suffix() -> str:
    """What ends the names of files that this process has not finished."""
    return f"{socket.gethostname()}.{os.getpid()}{PARTIAL}"


def write_alone(path: Path, content: bytes) -> None:
    """Write a file under a name of this process, flush it to the disk, and rename it; several may write the same content."""
    partial = path.with_name(f".{path.name}.{own_suffix()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()  # a full disk needs the space
        raise


def remove_partial(folder: Path, *, of_all: bool = False) -> None:
    """Remove what processes of this host that have ended left unfinished, or what all processes did, their claims included."""
    for path in [*folder.glob(".*.claim*"), *folder.glob(".*.alive")] if of_all else []:
        with suppress(OSError):
            path.unlink()
    for path in folder.glob(f".*{PARTIAL}"):
        host, _, process = path.name.removesuffix(PARTIAL).rpartition(".")
        ended = host.endswith(f".{socket.gethostname()}") and process.isdecimal() and not is_alive(int(process))
        if of_all or ended:
            with suppress(OSError):
                path.unlink()


def is_alive(process: int) -> bool:
    """Whether a process of this host has not ended; True where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def complete_entry(folder: Path, infos: Sequence[PieceInfo], known: dict[str, Any]) -> None:
    """Make an entry complete: `known` is what is known of all of its records."""
    sizes = {name: size for info in infos for name, (size, _) in sorted(info.files.items())}
    write_alone(folder / COUNTS, json.dumps({**known, "pieces": len(infos), "sizes": sizes}).encode())
    remove_partial(folder, of_all=True)


def read_entry(folder: Path) -> dict[str, Any] | None:
    """What is known of a complete entry's records; None if it is not complete, or a file was lost or cut.

    A piece that was lost or cut is removed, and a line says so. Raises DataError where that cannot be done.
    """
    try:
        known: dict[str, Any] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        sizes: dict[str, int] = known["sizes"]
    except (OSError, ValueError, KeyError):
        return None
    damaged = [name for name, size in sizes.items() if _size_of(folder / name) != size]
    if not damaged:
        return known
    say(
        f"{folder}: {', '.join(damaged[:3])} {'is' if len(damaged) == 1 else 'are'} damaged, so the records are tokenized again"
    )
    try:
        (folder / COUNTS).unlink()
        for name in damaged:
            (folder / piece_name(int(name.partition(".")[0].rpartition("-")[2]))).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: {damaged[0]} is damaged and cannot be replaced ({error}); remove the folder, or run the prefetch command again"
        ) from error
    return None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def rows_of_entry(folder: Path, known: dict[str, Any]) -> "Dataset":
    """The rows of a complete entry, memory-mapped."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(folder / name)) for name in known["sizes"] if name.endswith(".arrow")]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def hashes_of_entry(folder: Path, known: dict[str, Any]) -> bytes:
    """The `record_hash` of each record of a complete entry, in their order."""
    return b"".join((folder / hashes_name(index)).read_bytes() for index in range(known["pieces"]))


def files_of_entry(folder: Path) -> Iterator[Path]:
    """The files of a complete entry that are needed to read it."""
    known = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    yield from (folder / name for name in known["sizes"])
    yield folder / COUNTS
