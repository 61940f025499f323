"""A dataset's entry."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset's entry, with every default filled in."""

    name: str
    file_name: str | None = None  # a file or folder; in dataset_dir, or shipped with the package
    file_sha1: str | None = None
    url: str | None = None  # of a file, fetched when it is not here
    sha256: str | None = None
    hf_hub_url: str | None = None  # the id of a Hugging Face dataset
    revision: str | None = None
    data_files: str | list[str] | None = None  # of the hub's, when not all
    subset: str | None = None
    split: str | None = None  # wins over data.split
    folder: str | None = None  # inside the hub's, or inside file_name's
    num_samples: int | None = None  # the first records only
    formatting: str = "alpaca"
    ranking: bool = False
    columns: dict[str, str] = field(default_factory=dict)  # only those that records are read by
    tags: dict[str, str] = field(default_factory=dict)  # only those named; a shape knows its own
    license: str | None = None
    gated: bool = False
    description: str | None = None
    num_records: int | None = None
    kind: str = "path"  # where the entry was found: dataset_info, catalogue or path
    origin: str = ""  # the same for people: the file the entry is in
