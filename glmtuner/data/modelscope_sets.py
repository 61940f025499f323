"""Datasets of ModelScope."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.data.hub_sets import HubSet, reason_for_entry
from glmtuner.data.readers import Columns, is_data_file
from glmtuner.errors import DataError
from glmtuner.families.modelscope import checksum, snapshot

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

DESCRIPTION = "README.md"  # which names the files of subsets and splits
NO_RECORDS = ("dataset_infos.json", "configuration.json")  # about the dataset


def modelscope_set(spec: DatasetSpec, split: str, cache_dir: str | Path | None, columns: Columns = None) -> HubSet:
    """A split of a ModelScope dataset, whose files are downloaded once; dataset scripts are never run. Raises DataError."""
    import datasets

    label = f"dataset {spec.name!r} ({spec.origin})"
    folder = modelscope_copy(spec, cache_dir)
    try:
        dataset = datasets.load_dataset(
            str(folder), name=spec.subset, data_dir=spec.folder, data_files=spec.data_files, split=spec.split or split,
            cache_dir=str(cache_dir) if cache_dir else None,
        )  # fmt: skip
    except Exception as error:  # third-party files can raise anything
        raise DataError(
            f"{label}: the ModelScope dataset {spec.ms_hub_url} could not be read from {folder}: {reason_for_entry(spec, split, error)}"
        ) from error
    name = f"modelscope {spec.ms_hub_url}" + (f"/{spec.subset}" if spec.subset else "")
    return HubSet(spec.name, name, dataset, None, columns, checksum(folder))


def modelscope_copy(spec: DatasetSpec, cache_dir: str | Path | None) -> Path:
    """The folder with the dataset's files, downloaded if they are not there; raises DataError."""
    label = f"dataset {spec.name!r} ({spec.origin}): ms_hub_url={spec.ms_hub_url}"

    def choose(paths: Iterable[str]) -> Iterator[str]:
        chosen = [path for path in paths if _is_wanted(spec, path)]
        if not any(is_data_file(path) for path in chosen):
            raise DataError(
                f"{label}: the dataset has no file of records that the entry could mean; check folder and data_files of the entry (a "
                "dataset script is code and is not run)"
            )
        yield from chosen

    cache = str(cache_dir) if cache_dir else None
    return snapshot("datasets", str(spec.ms_hub_url), spec.revision, choose, cache_dir=cache, label=label)


def _is_wanted(spec: DatasetSpec, path: str) -> bool:
    if path == DESCRIPTION:
        return True
    inside = path
    if spec.folder:
        if not path.startswith(spec.folder.rstrip("/") + "/"):
            return False
        inside = path[len(spec.folder.rstrip("/")) + 1 :]
    patterns = [spec.data_files] if isinstance(spec.data_files, str) else spec.data_files
    if patterns is not None:
        return any(fnmatch(inside, pattern) for pattern in patterns)
    return is_data_file(path) and path.rpartition("/")[2] not in NO_RECORDS
