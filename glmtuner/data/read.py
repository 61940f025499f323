"""From a dataset's entry to its raw records, whatever they are kept in, and a checksum of what was read.

A file that exists here wins over a download, and a download with a checksum wins over the hub.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from glmtuner.console import say
from glmtuner.data.records import BadRecord, shown
from glmtuner.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

    from glmtuner.data.catalog import DatasetSpec


Raw = dict[str, Any] | BadRecord
Numbered = Iterator[tuple[int, Raw]]

# The words by which a file of a folder says what split it is of.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
NOT_RECORDS = {"dataset_info.json", "dataset_infos.json"}  # they describe the data beside them
DOWNLOAD_TIMEOUT_S = 60.0


class Row(NamedTuple):
    """One record: the file it is in, its number there (from 1; of a jsonl file the line), and what was read."""

    where: str
    number: int
    raw: Raw


class Unreadable(Exception):
    """What is wrong with a whole file; whoever reads it adds its name."""


def read(
    spec: DatasetSpec,
    *,
    dataset_dir: str | Path,
    package_data: str | Path,
    split: str = "train",
    cache_dir: str | Path | None = None,
    token: bool = False,
) -> LocalFiles | HubSet:
    """The records of a dataset, to iterate over, with a `fingerprint()` of where they come from.

    `package_data` is the folder of the files that ship with the package. The entry's own split wins over `split`.
    """
    path = local_path(spec, Path(dataset_dir), Path(package_data))
    if path is None and spec.url:
        path = download(spec, cache_dir)
    if path is not None:
        return LocalFiles(spec.name, local_files(spec, path, split))
    if spec.hf_hub_url:
        return hub_set(spec, split, cache_dir, token)
    raise missing_file(spec, Path(dataset_dir))


# Files


@dataclass(frozen=True)
class LocalFiles:
    """The records of files, one file after the other; `paths` says where the files that errors name lie."""

    name: str
    paths: dict[str, Path]

    def __iter__(self) -> Iterator[Row]:
        found = False
        for label, path in self.paths.items():
            try:
                if not path.stat().st_size:
                    raise Unreadable("is empty")
                for number, raw in READERS[path.suffix.lower()](path):
                    found = True
                    yield Row(label, number, raw)
            except (Unreadable, OSError) as error:
                raise DataError(f"dataset {self.name!r}: {label} {error}") from error
        if not found:
            raise DataError(f"dataset {self.name!r}: no records in {', '.join(self.paths)}")

    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.paths.values())

    def fingerprint(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {label: digest(path, "sha256") for label, path in self.paths.items()}


def local_path(spec: DatasetSpec, dataset_dir: Path, package_data: Path) -> Path | None:
    """The entry's file or folder if it is on this machine; what ships with the package is for the catalogue only."""
    if not spec.file_name:
        return None
    folders = [package_data, dataset_dir] if spec.kind == "catalogue" else [dataset_dir]
    candidates = [folder / Path(spec.file_name).expanduser() for folder in folders]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def local_files(spec: DatasetSpec, path: Path, split: str) -> dict[str, Path]:
    """The files to read, by the names that errors and the run's provenance give them."""
    label = spec.name if spec.kind == "path" else spec.file_name or path.name
    if path.is_dir():
        root = path / spec.folder if spec.folder else path
        label = f"{label}/{spec.folder}" if spec.folder else label
        return {f"{label}/{name}": root / name for name in of_split(spec, data_files(root), split)}
    if path.suffix.lower() not in READERS:
        raise DataError(f"dataset {spec.name!r}: {label} is no {', '.join(READERS)} file; convert it to one of them")
    if split != "train" and not spec.split:
        raise DataError(
            f"dataset {spec.name!r}: {label} is one file and has no split {split!r}; type data.split=train, "
            "or give the dataset an entry with a split of its own"
        )
    check_sums(spec, path, label)
    return {label: path}


def data_files(folder: Path) -> list[str]:
    """The data files in a folder and the folders in it, hidden ones left out; a text file there is no data."""
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in READERS.keys() - {".txt"}
        and file.name not in NOT_RECORDS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def of_split(spec: DatasetSpec, files: list[str], split: str) -> list[str]:
    """The files of a folder that belong to a split, by the words in their names.

    When none is said to be for training, those that name no split are.
    """
    wanted = spec.split or split
    words = {file: set(re.split(r"[^a-z]+", file.lower())) for file in files}
    own = [file for file in files if words[file] & SPLIT_WORDS.get(wanted, {wanted})]
    if not own and wanted == "train":
        own = [file for file in files if not words[file] & set().union(*SPLIT_WORDS.values())]
    if not own:
        raise DataError(
            f"dataset {spec.name!r}: no file of its folder is of the split {wanted!r}; "
            f"it holds {listed(files) or 'no ' + ', '.join(READERS)}"
        )
    if len(own) < len(files):
        left_out = [file for file in files if file not in own]
        say(f"dataset {spec.name!r}: the split {wanted} leaves out {listed(left_out)}")
    return own


def missing_file(spec: DatasetSpec, dataset_dir: Path) -> DataError:
    """The error for an entry whose file is not there."""
    path = dataset_dir / str(spec.file_name)
    folder = path.parent
    known = sorted(file.name for file in folder.iterdir() if file.suffix in READERS) if folder.is_dir() else []
    held = f"{folder} holds {listed(known) or 'no data file'}" if folder.is_dir() else f"there is no folder {folder}"
    return DataError(
        f"dataset {spec.name!r} ({spec.origin}): no file {path}{did_you_mean(path.name, known, then=held)}; put the "
        f"file there, mend file_name in {spec.origin}, or type data.dataset_dir=<the folder it is in>"
    )


def check_sums(spec: DatasetSpec, path: Path, label: str) -> None:
    """Compare a file with its entry: a sha256 must agree, a sha1 is only warned about, as it always was."""
    if spec.sha256 and (found := digest(path, "sha256")) != spec.sha256.lower():
        raise DataError(
            f"dataset {spec.name!r}: {label} has sha256 {found} where {spec.origin} says {spec.sha256}; fetch it "
            "again, or remove sha256 from the entry if the change is meant"
        )
    if spec.file_sha1 and (found := digest(path, "sha1")) != spec.file_sha1.lower():
        say(
            f"dataset {spec.name!r}: {label} has sha1 {found} where {spec.origin} says {spec.file_sha1}; it is used as it is"
        )


def digest(path: Path, algorithm: str) -> str:
    """A file's checksum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(spec: DatasetSpec, cache_dir: str | Path | None) -> Path:
    """The file behind the entry's url, fetched once; it gets its name only when its sha256 is right."""
    from http.client import HTTPException  # imported here, since few runs fetch and a typo is not to wait for it
    from urllib.parse import unquote, urlsplit
    from urllib.request import urlopen

    url, sha256 = str(spec.url), str(spec.sha256).lower()
    home = Path(cache_dir or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    path = home / "glmtuner" / sha256[:16] / (unquote(Path(urlsplit(url).path).name) or "data.json")
    if path.is_file() and digest(path, "sha256") == sha256:
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    found = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                found.update(block)
                file.write(block)
        if found.hexdigest() != sha256:
            raise DataError(
                f"dataset {spec.name!r} ({spec.origin}): {url} has sha256 {found.hexdigest()} in place of {sha256}; "
                "the file has changed or was cut short; try again, or mend sha256 if the change is meant"
            )
        part.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"dataset {spec.name!r} ({spec.origin}): {url} could not be fetched to {path.parent} ({reason_of(error)}); "
            "check the network, or fetch it elsewhere and type its path in place of the name"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


# Readers, one a file type; each yields (number, record)


def json_records(path: Path) -> Numbered:
    """An array of objects, alone or as `data` of one object; objects on lines of their own, named .json, work too.

    The array alone is read as far as its records are asked for; one inside an object is read whole.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if head.startswith(b"["):
            yield from array_records(file)
            return
        if head.startswith(b"{"):
            lines = (line for line in file if line.strip())
            if is_object(next(lines)) and next(lines, None):
                yield from jsonl_records(path)
                return
    text = decoded(path.read_bytes())
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is {'empty' if not text.strip() else broken(error, text)}") from None
    if isinstance(document, dict):
        document = document.get("data", document)
    if not isinstance(document, list):
        raise Unreadable(
            f"holds {kind_of(json.loads(text))} where an array of objects is expected; put it in [ ], or name the file "
            ".jsonl when each line is a record"
        )
    yield from ((number, as_record(value)) for number, value in enumerate(document, start=1))


def array_records(file: BinaryIO) -> Numbered:
    """The objects of the array that a file holds, parsed one by one of a piece of its text at a time."""
    decoder = json.JSONDecoder()
    text = Piece(file)
    text.skip_space()
    text.advance(1)
    number, ended = 0, text.skip_space() == "]"
    while not ended:
        number += 1
        yield number, as_record(text.parsed(decoder, number))
        if text.skip_comma():
            continue
        found = text.skip_space()
        ended = found == "]"
        if found != "," and not ended:
            raise text.broken(json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position), number)
        if not ended:
            text.advance(1)
            text.skip_space()
    text.advance(1)
    if text.skip_space():
        raise text.broken(json.JSONDecodeError("text after the array", text.text, text.position), number)


class Piece:
    """The part of a UTF-8 file's text around a position, which moves on; what lies behind is forgotten."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.text, self.position = "", 0
        self.lines, self.columns = 0, 0  # whole lines before the text, and characters of the last one
        self.whole = False  # is the end of the file in it?

    def more(self) -> bool:
        """Forget what lies behind and read on, twice as far as the text is long; false at the end of the file."""
        if self.whole:
            return False
        behind = self.text[: self.position]
        self.lines += behind.count("\n")
        self.columns = len(behind) - 1 - behind.rfind("\n") + (0 if "\n" in behind else self.columns)
        data = self.file.read(max(PIECE, 2 * (len(self.text) - self.position)))
        before = self.file.tell() - len(data) - len(self.decoder.getstate()[0])
        try:
            self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error, f" at offset {before + error.start}") from None
        self.position, self.whole = 0, not data
        return True

    def skip_space(self) -> str:
        """Go to the next character that is no white space of JSON's; it comes back, empty at the end of the file."""
        while True:
            self.position = after_space(self.text, self.position)
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]

    def skip_comma(self) -> bool:
        """Go behind a comma and the white space around it, if there is one and what follows has been read already."""
        match = COMMA.match(self.text, self.position)
        if match is None or match.end() == len(self.text):
            return False
        self.position = match.end()
        return True

    def advance(self, count: int) -> None:
        self.position += count

    def parsed(self, decoder: json.JSONDecoder, number: int) -> Any:
        """The JSON value here, record `number`; goes behind it."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # more text can only help where the text breaks off: inside a string, or in its last few characters
                breaks_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_ESCAPE
                if breaks_off and self.more():
                    continue
                raise self.broken(error, number) from None
            if end > len(self.text) - LONGEST_ESCAPE and self.more():  # a number may go on, such as 12 as 12.5e+10
                continue
            self.position = end
            return value

    def broken(self, error: json.JSONDecodeError, number: int) -> Unreadable:
        """The error, placed in the file."""
        error.colno += self.columns if error.lineno == 1 else 0
        error.lineno += self.lines
        end = self.text
        if not self.whole:
            self.file.seek(-min(os.fstat(self.file.fileno()).st_size, 4096), os.SEEK_END)
            end = self.file.read().decode(errors="replace")
        return Unreadable(f"is {broken(error, end, number)}")


def jsonl_records(path: Path) -> Numbered:
    """One object a line; a line that is no object is one bad record, and blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, f" of line {number}").strip()
            if not text:
                continue
            try:
                yield number, as_record(json.loads(text))
            except json.JSONDecodeError as error:
                yield number, BadRecord("", f"not JSON: {message_of(error)} at column {error.colno}")


def csv_records(path: Path) -> Numbered:
    """The rows under a header line; strict quoting, since a stray quote would swallow the rows after it."""
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            header = list(rows.fieldnames or [])
            if len(set(header)) < len(header):
                raise Unreadable(f"names a column twice in its header: {', '.join(header)}")
            for number, row in enumerate(rows, start=1):
                whole = None not in row and None not in row.values()
                yield number, row if whole else BadRecord("", f"the row has not the {len(header)} cells of the header")
        except csv.Error as error:
            raise Unreadable(f"is no CSV at line {rows.reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise not_utf8(error) from None


def parquet_records(path: Path) -> Numbered:
    """The rows of a parquet file, a batch at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise Unreadable(f"is no readable parquet file: {reason_of(error)}") from None


def text_records(path: Path) -> Numbered:
    """The lines of a plain text file as records of one column, `text`; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, f" of line {number}").rstrip("\n")
            if text.strip():
                yield number, {"text": text.rstrip("\r")}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".json": json_records,
    ".jsonl": jsonl_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
    ".txt": text_records,
}


def as_record(value: Any) -> Raw:
    """The value when it is an object, else what is wrong with it."""
    return value if isinstance(value, dict) else BadRecord("", f"an object is expected, got {shown(value)}")


def is_object(line: bytes) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def after_space(text: str, position: int) -> int:
    """The next position that is no white space of JSON's."""
    match = SPACE.match(text, position)
    return match.end() if match else position


SPACE = re.compile(r"[ \t\r\n]*")
COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
PIECE = 1 << 20  # bytes of an array's file read at a time
LONGEST_ESCAPE = 12  # characters: two halves of a surrogate pair


def decoded(data: bytes, of_line: str = "") -> str:
    """The text of UTF-8 bytes, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, f" at offset {error.start}{of_line}") from None


def not_utf8(error: UnicodeDecodeError, where: str = "") -> Unreadable:
    """The error for a file in another encoding."""
    byte = error.object[error.start]
    return Unreadable(f"is not UTF-8: byte 0x{byte:02x}{where}; convert it, such as by `iconv -f GB18030 -t UTF-8`")


def broken(error: json.JSONDecodeError, text: str, number: int = 0) -> str:
    """Where JSON breaks off, by line, column and record; `text` ends as the file does."""
    record = f", record {number}" if number else ""
    cut = "" if text.rstrip().endswith(("]", "}")) else "; the file is cut short, fetch it again"
    return f"not JSON at line {error.lineno}, column {error.colno}{record}: {message_of(error)}{cut}"


def message_of(error: json.JSONDecodeError) -> str:
    """What json found, without the "at" that some of its messages end in."""
    return error.msg.removesuffix(" at")


def kind_of(document: Any) -> str:
    """A JSON document's kind, in JSON's words."""
    return f"one object ({listed(list(document))})" if isinstance(document, dict) else shown(document)


# The hub


COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSet:
    """The records of one split of a hub dataset."""

    name: str
    label: str  # the hub's id, with the subset
    dataset: Dataset
    commit: str | None

    def __iter__(self) -> Iterator[Row]:
        if not len(self.dataset):
            raise DataError(f"dataset {self.name!r}: no records in {self.label}")
        for number, raw in enumerate(self.dataset, start=1):
            yield Row(self.label, number, raw)

    def size(self) -> int:
        """Bytes in memory, were all of them read."""
        return self.dataset.data.nbytes

    def fingerprint(self) -> dict[str, str]:
        """The commit that the records come from, or the fingerprint that datasets gave them."""
        return {self.label: f"commit {self.commit}" if self.commit else f"fingerprint {self.dataset._fingerprint}"}


def hub_set(spec: DatasetSpec, split: str, cache_dir: str | Path | None, token: bool) -> HubSet:
    """One split of a hub dataset, downloaded into the hub's cache; no code of the dataset's is run."""
    import datasets

    label = f"{spec.hf_hub_url}/{spec.subset}" if spec.subset else str(spec.hf_hub_url)
    options: dict[str, Any] = {
        "name": spec.subset,
        "data_dir": spec.folder,
        "data_files": spec.data_files,
        "split": spec.split or split,
        "cache_dir": str(cache_dir) if cache_dir else None,
    }
    commit = None
    try:
        try:
            dataset = datasets.load_dataset(
                str(spec.hf_hub_url), revision=spec.revision, token=token or None, **options
            )
        except (ConnectionError, ValueError):
            copy = downloaded_copy(spec, cache_dir)
            if copy is None:
                raise
            dataset, commit = datasets.load_dataset(str(copy), **options), copy.name
    except Exception as error:  # a network, a hub and other people's files: there is no shorter list
        raise DataError(f"dataset {spec.name!r} ({spec.origin}): {hub_trouble(spec, split, error)}") from error
    commit = commit or commit_of(dataset)
    if commit and COMMIT.fullmatch(spec.revision or "") and commit != spec.revision:
        raise DataError(
            f"dataset {spec.name!r} ({spec.origin}): revision {spec.revision} of {label} could not be reached, and the "
            f"cache holds {commit}; check the network, or mend revision in the entry"
        )
    return HubSet(spec.name, label, dataset, commit)


def commit_of(dataset: Dataset) -> str | None:
    """The hub's commit, after which datasets names the folder of its cache; None when it names it otherwise."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next((folder for folder in folders if COMMIT.fullmatch(folder)), None)


def downloaded_copy(spec: DatasetSpec, cache_dir: str | Path | None) -> Path | None:
    """The folder of the hub's cache with a dataset's files, when all of them are there; it is named after the commit.

    Without a network datasets finds what it prepared only when neither a revision nor files are named. All are there
    when the entry names each file, or when datasets has once prepared this commit.
    """
    import datasets
    from huggingface_hub import snapshot_download

    try:
        copy = snapshot_download(
            str(spec.hf_hub_url), repo_type="dataset", revision=spec.revision, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    folder = Path(copy)
    files = [spec.data_files] if isinstance(spec.data_files, str) else spec.data_files or []
    if files and all((folder / file).is_file() for file in files):
        return folder
    prepared = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    return folder if any(prepared.glob(f"*/{spec.subset or 'default'}*/*/{folder.name}")) else None


def hub_trouble(spec: DatasetSpec, split: str, error: Exception) -> str:
    """What kept a hub dataset from loading, and what to type about it."""
    from datasets.exceptions import DatasetNotFoundError

    reason = reason_of(error)
    advice = "check the network, or fetch it elsewhere and type its path in place of the name"
    if isinstance(error, DatasetNotFoundError):
        advice = "check the id; for a gated or private set run `hf auth login` and type model.use_auth_token=true"
    elif "scripts are no longer supported" in reason:
        advice = "it is kept as code, which is not run; fetch the data itself and type its path"
    elif "Couldn't find cache" in reason:  # datasets looks there when the hub has no such file, and tells of that alone
        advice = "check subset, folder and data_files of the entry, and the network"
    elif "Unknown split" in reason:
        advice = "mend split in the entry" if spec.split else f"mend data.split={split}, or add split to the entry"
    elif "BuilderConfig" in reason or "Config name" in reason:
        advice = "name one of them as subset in the entry"
    return f"the hub set {spec.hf_hub_url} could not be loaded: {reason}; {advice}"


def reason_of(error: BaseException) -> str:
    """An error in one line of bearable length."""
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}"


def listed(names: list[str], most: int = 10) -> str:
    """Names with commas, long lists cut."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
