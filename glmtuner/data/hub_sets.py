"""Datasets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.data.raw import Row, reason_of
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from glmtuner.data.spec import DatasetSpec


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
