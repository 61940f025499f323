"""A dataset's entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A dataset's entry, with every default filled in."""

    name: str
    file_name: str | None = None  # a file or folder; in dataset_dir, or shipped with the package
    file_sha1: str | None = None
    url: str | None = None  # of a file, downloaded if file_name does not exist
    sha256: str | None = None
    hf_hub_url: str | None = None  # the id of a Hugging Face dataset
    ms_hub_url: str | None = None  # of a ModelScope dataset: read with data.use_modelscope, or if it is the only source
    revision: str | None = None
    data_files: str | list[str] | None = None  # some of the hub dataset's files instead of all
    subset: str | None = None
    split: str | None = None  # takes precedence over data.split
    folder: str | None = None  # inside the hub dataset, or inside file_name
    num_samples: int | None = None  # the first records only
    formatting: str = "alpaca"
    ranking: bool = False
    columns: dict[str, str] = field(default_factory=dict)  # those that records are read by, and no others
    tags: dict[str, str] = field(default_factory=dict)  # those named in the entry; each format has defaults
    default_columns: bool = False  # has the entry named no columns itself?
    ignore_columns: list[str] = field(default_factory=list)  # columns, and keys of turns, that may stay unread
    input_separator: str = "\n"  # between prompt and query; data.input_separator
    license: str | None = None
    gated: bool = False
    description: str | None = None
    num_records: int | None = None
    kind: str = "path"  # the source of the entry: dataset_info, catalogue or path
    origin: str = ""  # for messages: the file the entry is in

    def published(self, package_data: Path) -> dict[str, str | None]:
        """`source`: the id on the hub, the address, or package://<file> of what ships with glmtuner; and the `license`.

        The source is None for the user's own files.
        """
        is_shipped = self.kind == "catalogue" and self.file_name and (package_data / self.file_name).is_file()
        return {
            "source": self.hf_hub_url or self.url or (f"package://{self.file_name}" if is_shipped else None),
            "license": self.license,
        }
