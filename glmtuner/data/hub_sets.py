"""Datasets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.offline import advice as offline_advice
from glmtuner.config.offline import offline_folder
from glmtuner.data.arrow_files import ROWS_AT_A_TIME, rows_of_table
from glmtuner.data.pieces import PIECE_BYTES, Count, Piece, Span
from glmtuner.data.raw import Row, reason_of
from glmtuner.data.readers import Columns
from glmtuner.errors import DataError
from glmtuner.families.hub import is_transient, with_retries

if TYPE_CHECKING:
    from datasets import Dataset

    from glmtuner.data.spec import DatasetSpec


COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSet:
    """The records of a split of a hub dataset."""

    name: str
    label: str  # the hub id, with the subset
    dataset: Dataset
    commit: str | None
    columns: Columns = None  # those that are decoded; None is all
    checksum: str | None = None  # of all files, for a source without commits

    def __iter__(self) -> Iterator[Row]:
        if not len(self.dataset):
            raise self.without_records()
        number = 0
        for table in self.dataset.with_format("arrow").iter(ROWS_AT_A_TIME):
            for _, raw in rows_of_table(table, self.columns):
                number += 1
                yield Row(self.label, number, raw)

    def without_records(self) -> DataError:
        """The error for a split in which there is no record."""
        return DataError(f"dataset {self.name!r}: no records in {self.label}")

    def pieces(self, size: int = PIECE_BYTES) -> list[Piece]:
        """The pieces that the records can be read in."""
        rows, total = len(self.dataset), self.size()
        each = max(ROWS_AT_A_TIME, rows * size // max(total, 1))
        starts = range(0, rows, each)
        return [(Span(self.label, start, min(start + each, rows), total * each // rows),) for start in starts]

    def rows_of(self, span: Span, first: int, count: Count) -> Iterator[Row]:
        """The rows of a span, of which the first has the number `first` + 1."""
        part = self.dataset.select(range(span.start, int(span.end or 0)))
        for table in part.with_format("arrow").iter(ROWS_AT_A_TIME):
            for _, raw in rows_of_table(table, self.columns):
                count.number += 1
                yield Row(self.label, first + count.number, raw)

    def numbers_before(self, piece: Piece) -> dict[str, int]:
        """How many records stand before a piece."""
        return {self.label: piece[0].start}

    def size(self) -> int:
        """The size of all records in bytes, as Arrow stores them."""
        num_bytes: int = self.dataset.data.nbytes
        return num_bytes

    def fingerprint(self) -> dict[str, str]:
        """The commit or the checksum of the records, or the fingerprint that datasets computed (it has no public name for it)."""
        if self.checksum:
            return {self.label: f"sha256 {self.checksum}"}
        return {self.label: f"commit {self.commit}" if self.commit else f"fingerprint {self.dataset._fingerprint}"}


def hub_set(
    spec: DatasetSpec, split: str, cache_dir: str | Path | None, token: bool, columns: Columns = None
) -> HubSet:
    """A split of a hub dataset, downloaded to the hub's cache; dataset scripts are never run. Raises DataError."""
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

    def load() -> Dataset:
        loaded: Dataset = datasets.load_dataset(
            str(spec.hf_hub_url), revision=spec.revision, token=token or None, **options
        )
        return loaded

    try:
        try:
            dataset = load()
        except Exception as error:
            copy = downloaded_copy(spec, cache_dir) if isinstance(error, (ConnectionError, ValueError)) else None
            if copy is not None:
                dataset, commit = datasets.load_dataset(str(copy), **options), copy.name
            elif is_transient(error):
                dataset = with_retries(f"dataset {spec.name!r}", load)
            else:
                raise
    except Exception as error:  # the network, the hub and third-party files can raise anything
        raise DataError(f"dataset {spec.name!r} ({spec.origin}): {failure_message(spec, split, error)}") from error
    commit = commit or commit_of(dataset)
    if commit and COMMIT.fullmatch(spec.revision or "") and commit != spec.revision:
        raise DataError(
            f"dataset {spec.name!r} ({spec.origin}): revision {spec.revision} of {label} could not be reached, and the "
            f"cache holds {commit}; check the network, or fix revision in the entry"
        )
    return HubSet(spec.name, label, dataset, commit, columns)


def commit_of(dataset: Dataset) -> str | None:
    """The hub's commit, by which datasets names the folder of its cache; None if the folder has another name."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next((folder for folder in folders if COMMIT.fullmatch(folder)), None)


def downloaded_copy(spec: DatasetSpec, cache_dir: str | Path | None) -> Path | None:
    """The folder of the hub's cache with the dataset's files, named by the commit; None if it may be incomplete.

    Offline, datasets finds what it has prepared only if neither a revision nor files are given. The copy is complete if the
    entry names each file, or if datasets has prepared this commit before.
    """
    import datasets
    from huggingface_hub import snapshot_download

    if offline_folder() is not None:
        return prefetched_copy(spec)
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


def prefetched_copy(spec: DatasetSpec) -> Path | None:
    """The folder in GLMTUNER_OFFLINE with what `prefetch` put there of the dataset: of its files those that the entry means.

    The hub's own client would call it incomplete, since it lacks the others.
    """
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"datasets--{str(spec.hf_hub_url).replace('/', '--')}"
    commit = spec.revision or "main"
    if (repository / "refs" / commit).is_file():
        commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def failure_message(spec: DatasetSpec, split: str, error: Exception) -> str:
    """Why a hub dataset could not be loaded, and what to do about it."""
    return f"the hub dataset {spec.hf_hub_url} could not be loaded: {reason_for_entry(spec, split, error)}"


def reason_for_entry(spec: DatasetSpec, split: str, error: Exception) -> str:
    """What datasets says about the files of an entry, and what to do about it."""
    from datasets.exceptions import DatasetNotFoundError

    reason = reason_of(error)
    if "scripts are no longer supported" in reason:
        advice = "the dataset is a script, which is not run; download the data itself and type its path"
    elif "Unknown split" in reason:
        advice = "fix split in the entry" if spec.split else f"fix data.split={split}, or add split to the entry"
    elif "BuilderConfig" in reason or "Config name" in reason:
        advice = "name one of them as subset in the entry"
    elif offline_folder() is not None:
        advice = offline_advice()
    elif isinstance(error, DatasetNotFoundError):
        advice = "check the id; for a gated or private set run `hf auth login` and type model.use_auth_token=true"
    elif "Couldn't find cache" in reason:  # all that datasets reports if the hub has no such file
        advice = "check subset, folder and data_files of the entry, and the network"
    else:
        advice = "check the network, or download it elsewhere and type its path instead of the name"
    return f"{reason}; {advice}"
