"""Data files as streams of bytes: regular files only, decompressed, and in UTF-8 whatever Unicode encoding they are in."""

from __future__ import annotations

import io
import json
import stat
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE, getincrementaldecoder
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from glmtuner.data.raw import Unreadable, reason_of
from glmtuner.data.records import names_of

if TYPE_CHECKING:
    from collections.abc import Callable

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
BOMS = {BOM_UTF32_LE: "utf-32", BOM_UTF32_BE: "utf-32", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}  # longest first
KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a named pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a character device": stat.S_ISCHR,
    "a block device": stat.S_ISBLK,
}


def data_suffix(path: str | Path) -> str:
    """The suffix that tells how a file is read, in lower case and without that of a compression: .jsonl of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    return suffixes[0] if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1] if suffixes else ""


def check_regular(path: Path) -> None:
    """Raise Unreadable for what is not a regular file with content, such as a named pipe, which nobody may ever write to."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for kind, is_kind in KINDS.items() if is_kind(status.st_mode)), "no regular file")
        raise Unreadable(f"is {kind}; save the records to a file, since data is read more than once")
    if not status.st_size:
        raise Unreadable("is empty")


def open_bytes(path: Path) -> BinaryIO:
    """The decompressed content of a file. Raises Unreadable here, and what `READ_ERRORS` names while it is read."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast(BinaryIO, gzip.open(path))
    if suffix == ".bz2":
        import bz2

        return cast(BinaryIO, bz2.open(path))
    if suffix == ".xz":
        import lzma

        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":
        import pyarrow

        # an Arrow stream decodes several frames one after the other, as zstd itself does
        return io.BufferedReader(cast(io.RawIOBase, pyarrow.input_stream(str(path), compression="zstd")))
    return _only_member(path) if suffix == ".zip" else path.open("rb")


def _only_member(path: Path) -> BinaryIO:
    """The one file in a zip archive."""
    from zipfile import BadZipFile, ZipFile

    try:
        archive = ZipFile(path)
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if len(names) != 1:
            raise Unreadable(f"holds {names_of(names, 5) or 'no file'}; unpack it, and name one file or the folder")
        return cast(BinaryIO, archive.open(names[0]))
    except (BadZipFile, NotImplementedError, RuntimeError) as error:  # RuntimeError: it is encrypted
        raise Unreadable(f"is not a readable zip archive: {reason_of(error)}") from None


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a broken compressed file raises, beside OSError."""
    import zlib
    from lzma import LZMAError
    from zipfile import BadZipFile

    return (EOFError, zlib.error, LZMAError, BadZipFile)


def open_utf8(path: Path, *, is_json: bool = False) -> BinaryIO:
    """The decompressed content of a text file, in UTF-8: UTF-16 and UTF-32 are recoded; in JSON they need no byte order mark."""
    file = open_bytes(path)
    buffered = cast(io.BufferedReader, file if hasattr(file, "peek") else io.BufferedReader(cast(io.RawIOBase, file)))
    head = buffered.peek(4)[:4]
    encoding = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if encoding is None and is_json and len(head) == 4 and b"\x00" in head and not head.startswith(BOM_UTF8):
        guess = json.detect_encoding(head)
        encoding = guess if guess.startswith(("utf-16", "utf-32")) else None
    return io.BufferedReader(_Recoded(buffered, encoding)) if encoding else buffered


class _Recoded(io.RawIOBase):
    """A stream in another encoding, in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.encoding = file, encoding
        self.decoder = getincrementaldecoder(encoding)()
        self.pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            data = self.file.read(1 << 16)
            try:
                self.pending = self.decoder.decode(data, final=not data).encode()
            except UnicodeDecodeError as error:
                raise Unreadable(f"is not {self.encoding.upper()}: {error.reason}; save it as UTF-8") from None
            if not data:
                break
        count = min(len(buffer), len(self.pending))
        buffer[:count], self.pending = self.pending[:count], self.pending[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
