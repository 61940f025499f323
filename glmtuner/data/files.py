"""The files of a dataset: where they lie, which split they are of, whether they are the right ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.console import say
from glmtuner.data.fetch import digest
from glmtuner.data.raw import Row, Unreadable, listed
from glmtuner.data.readers import READERS
from glmtuner.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec


# The words by which a file of a folder says what split it is of.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
NOT_RECORDS = {"dataset_info.json", "dataset_infos.json"}  # they describe the data beside them


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
