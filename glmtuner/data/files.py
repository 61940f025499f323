"""The files of a dataset: where they are, which split they belong to, whether their checksums are right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.console import say
from glmtuner.data.fetch import digest
from glmtuner.data.pieces import PIECE_BYTES, Count, Piece, Span, grouped, numbers_before, span_records, spans_of
from glmtuner.data.raw import Numbered, Row, Unreadable, reason_of
from glmtuner.data.readers import Columns, file_records, is_data_file, legal_suffixes
from glmtuner.data.records import names_of
from glmtuner.data.streams import check_regular, data_suffix
from glmtuner.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec


# Words in the name of a file that tell its split.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
NOT_RECORDS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # they describe the data beside them
SAVED = "state.json"  # names the files of a dataset that datasets saved to the disk, which may stand beside older ones


@dataclass(frozen=True)
class LocalFiles:
    """The records of files, one file after the other; `paths` are the files by the labels that errors use.

    Of file types in which columns are stored apart, only `columns` are decoded; None is all.
    """

    name: str
    paths: dict[str, Path]
    columns: Columns = None

    def __iter__(self) -> Iterator[Row]:
        is_empty = True
        for label, path in self.paths.items():
            for row in self._rows(label, file_records(path, self.columns)):
                is_empty = False
                yield row
        if is_empty:
            raise self.without_records()

    def _rows(self, label: str, records: Numbered) -> Iterator[Row]:
        try:
            for number, raw in records:
                yield Row(label, number, raw)
        except Unreadable as error:
            raise DataError(f"dataset {self.name!r}: {label} {error}") from error
        except OSError as error:
            raise DataError(f"dataset {self.name!r}: {label} cannot be read: {reason_of(error)}") from error

    def without_records(self) -> DataError:
        """The error for files in which there is no record."""
        return DataError(f"dataset {self.name!r}: no records in {', '.join(self.paths)}")

    def pieces(self, size: int = PIECE_BYTES) -> list[Piece]:
        """The pieces that the files can be read in."""
        return grouped((span for label, path in self.paths.items() for span in spans_of(label, path, size)), size)

    def rows_of(self, span: Span, first: int, count: Count) -> Iterator[Row]:
        """The rows of a span, of which the first has the number `first` + 1; raises DataError."""
        path = self.paths[span.label]
        records = (
            file_records(path, self.columns)
            if span.end is None
            else span_records(path, span, self.columns, first, count)
        )
        for row in self._rows(span.label, records):
            if span.end is None:
                count.number = row.number
            yield row

    def numbers_before(self, piece: Piece) -> dict[str, int]:
        """For each file of a piece, how many numbers its records before the piece take."""
        found: dict[str, int] = {}
        for span in piece:
            if span.label not in found:
                found[span.label] = numbers_before(self.paths[span.label], span) if span.start else 0
        return found

    def size(self) -> int:
        """The size of the files in bytes."""
        return sum(path.stat().st_size for path in self.paths.values())

    def fingerprint(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {label: digest(path, "sha256") for label, path in self.paths.items()}


def local_path(spec: DatasetSpec, dataset_dir: Path, package_data: Path) -> Path | None:
    """The entry's local file or folder, None if it does not exist; only catalogue entries look in the package."""
    if not spec.file_name:
        return None
    folders = [package_data, dataset_dir] if spec.kind == "catalogue" else [dataset_dir]
    candidates = [folder / Path(spec.file_name).expanduser() for folder in folders]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def local_files(spec: DatasetSpec, path: Path, split: str) -> dict[str, Path]:
    """The files to read, by the labels that errors and provenance.json use."""
    label = spec.name if spec.kind == "path" else spec.file_name or path.name
    if path.is_dir():
        root = path / spec.folder if spec.folder else path
        label = f"{label}/{spec.folder}" if spec.folder else label
        return {f"{label}/{name}": root / name for name in of_split(spec, data_files(root), split)}
    if not is_data_file(path):
        raise DataError(f"dataset {spec.name!r}: {label} is not a {legal_suffixes()} file; convert it to one of them")
    try:
        check_regular(path)
    except Unreadable as error:
        raise DataError(f"dataset {spec.name!r}: {label} {error}") from None
    if split != "train" and not spec.split:
        raise DataError(
            f"dataset {spec.name!r}: {label} is one file and has no split {split!r}; type data.split=train, "
            "or give the dataset an entry with its own split"
        )
    verify_checksums(spec, path, label)
    return {label: path}


def data_files(folder: Path) -> list[str]:
    """The data files in a folder and its subfolders, without hidden ones and text files."""
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if is_data_file(file)
        and data_suffix(file) != ".txt"
        and file.name not in NOT_RECORDS
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and _is_in_saved_dataset(file)
    ]


def _is_in_saved_dataset(file: Path) -> bool:
    """Whether a file is one of those that `save_to_disk` of datasets wrote, where it wrote the folder; else True."""
    state = file.with_name(SAVED)
    if not state.is_file() or not file.with_name("dataset_info.json").is_file():
        return True
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        return file.name in {entry["filename"] for entry in saved["_data_files"]}
    except (ValueError, KeyError, TypeError):
        return file.name != SAVED


def split_files(files: list[str], split: str) -> list[str]:
    """The files of a folder that belong to a split, by a word in their names or by the name of their folder.

    If no name says that its file is for training, the files whose names tell no split are.
    """
    words = {file: {*re.split(r"[^a-z]+", file.lower()), *Path(file).parts, Path(file).stem} for file in files}
    own = [file for file in files if words[file] & SPLIT_WORDS.get(split, {split})]
    if not own and split == "train":
        own = [file for file in files if not words[file] & set().union(*SPLIT_WORDS.values())]
    return own


def of_split(spec: DatasetSpec, files: list[str], split: str) -> list[str]:
    """The files of a folder that belong to a split; raises DataError if there is none, and prints which are left out."""
    split = spec.split or split
    own = split_files(files, split)
    if not own:
        raise DataError(
            f"dataset {spec.name!r}: no file of its folder belongs to the split {split!r}; it holds "
            f"{names_of(files) or 'no ' + legal_suffixes()}{'; type data.split=<its split>' if files else ''}"
        )
    if len(own) < len(files):
        left_out = [file for file in files if file not in own]
        say(f"dataset {spec.name!r}: the split {split} leaves out {names_of(left_out)}")
    return own


def missing_file(spec: DatasetSpec, dataset_dir: Path) -> DataError:
    """The error for an entry whose file does not exist."""
    path = dataset_dir / str(spec.file_name)
    folder = path.parent
    names = sorted(file.name for file in folder.iterdir() if is_data_file(file)) if folder.is_dir() else []
    content = (
        f"{folder} holds {names_of(names) or 'no data file'}" if folder.is_dir() else f"there is no folder {folder}"
    )
    return DataError(
        f"dataset {spec.name!r} ({spec.origin}): no file {path}{did_you_mean(path.name, names, then=content)}; put the "
        f"file there, fix file_name in {spec.origin}, or type data.dataset_dir=<the folder it is in>"
    )


def verify_checksums(spec: DatasetSpec, path: Path, label: str) -> None:
    """Compare a file with its entry: another sha256 is a DataError, another file_sha1 (of LLaMA-Factory's format) a warning."""
    if spec.sha256 and (sha256 := digest(path, "sha256")) != spec.sha256.lower():
        raise DataError(
            f"dataset {spec.name!r}: {label} has sha256 {sha256}, {spec.origin} says {spec.sha256}; download "
            "it again, or remove sha256 from the entry if the change is intended"
        )
    if spec.file_sha1 and (sha1 := digest(path, "sha1")) != spec.file_sha1.lower():
        say(f"dataset {spec.name!r}: {label} has sha1 {sha1}, {spec.origin} says {spec.file_sha1}; it is used as it is")
