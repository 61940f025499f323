"""From a dataset's entry to its raw records, in files or on the hub, and a checksum of what was read.

A local file takes precedence over `url`, `url` over the hub, and the hub over ModelScope.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.data.fetch import download
from glmtuner.data.files import LocalFiles, local_files, local_path, missing_file
from glmtuner.data.formats import format_source
from glmtuner.data.hub_sets import HubSet, hub_set
from glmtuner.data.modelscope_sets import modelscope_set

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec


def columns_of(spec: DatasetSpec) -> frozenset[str] | None:
    """The columns that a dataset's records are read by; None, all of them, for a plugin's format, which may read any."""
    return None if format_source(spec.formatting) else frozenset(spec.columns.values()) or None


def read(
    spec: DatasetSpec,
    *,
    dataset_dir: str | Path,
    package_data: str | Path,
    split: str = "train",
    cache_dir: str | Path | None = None,
    token: bool = False,
) -> LocalFiles | HubSet:
    """The records of a dataset, to iterate over, with the `fingerprint()` of their sources.

    `package_data` is the folder of the files that ship with the package. The entry's own split takes precedence over
    `split`. Raises DataError if the source is missing or cannot be read.
    """
    path = local_path(spec, Path(dataset_dir), Path(package_data))
    if path is None and spec.url:
        path = download(spec, cache_dir)
    if path is not None:
        return LocalFiles(spec.name, local_files(spec, path, split), columns_of(spec))
    if spec.hf_hub_url:
        return hub_set(spec, split, cache_dir, token, columns_of(spec))
    if spec.ms_hub_url:
        return modelscope_set(spec, split, cache_dir, columns_of(spec))
    raise missing_file(spec, Path(dataset_dir))
