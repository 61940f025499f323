"""From a dataset's name to parsed conversations: `find` its entry, `load` its records, `refuse` too many broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtuner.data.catalog import find
from glmtuner.data.formats import parser
from glmtuner.data.raw import Row
from glmtuner.data.read import read
from glmtuner.data.records import BadRecord, Example, Message
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import DataError

__all__ = [
    "BadLine",
    "BadRecord",
    "DatasetSpec",
    "Example",
    "Loaded",
    "Message",
    "check_bad_record_limit",
    "find",
    "load",
    "read",
]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A record that was left out: where it is, and what is wrong with which of its fields ("" is the whole record)."""

    dataset: str
    where: str
    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        field = f"field {self.field}: " if self.field else ""
        return f"{self.where}: record {self.number}: {field}{self.reason}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A dataset's examples, the records that were left out, a checksum or commit of each source, and the bytes of all.

    `examples` are read as they are asked for, and `bad` grows with them: no more of a dataset is in memory than is asked for.
    """

    examples: Iterator[Example]
    bad: list[BadLine]
    files: dict[str, str]
    size: int


def load(
    spec: DatasetSpec,
    *,
    dataset_dir: str | Path,
    package_data: str | Path,
    split: str = "train",
    max_samples: int | None = None,
    cache_dir: str | Path | None = None,
    token: bool = False,
) -> Loaded:
    """The first `max_samples` (and at most the entry's `num_samples`) good records of a dataset, as examples.

    Reading stops there, so that broken records further on are neither seen nor counted. All of them broken is an error.
    """
    source = read(
        spec, dataset_dir=dataset_dir, package_data=package_data, split=split, cache_dir=cache_dir, token=token
    )
    most = min((limit for limit in (max_samples, spec.num_samples) if limit is not None), default=None)
    bad: list[BadLine] = []
    return Loaded(_examples(spec, source, most, bad), bad, source.fingerprint(), source.size())


def _examples(spec: DatasetSpec, source: Iterable[Row], most: int | None, bad: list[BadLine]) -> Iterator[Example]:
    parse = parser(spec.formatting)
    good = 0
    for where, number, raw in source:
        try:
            if isinstance(raw, BadRecord):
                raise raw
            example = parse(raw, spec)
        except BadRecord as trouble:
            bad.append(BadLine(spec.name, where, number, trouble.field, trouble.reason))
            continue
        yield example
        good += 1
        if good == most:
            return
    if not good:
        raise DataError(
            f"dataset {spec.name!r}: {counted(bad)} and no good one: {first_of(bad)}; they are read as "
            f"formatting={spec.formatting}; mend them, or formatting and columns in {spec.origin}"
        )


def check_bad_record_limit(bad: Sequence[BadLine], max_bad_records: int) -> None:
    """Raise when more records are broken than the run allows, over all its datasets."""
    if len(bad) <= max_bad_records:
        return
    names = list(dict.fromkeys(line.dataset for line in bad))
    datasets = f"dataset{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
    raise DataError(
        f"{datasets}: {counted(bad)} and data.max_bad_records={max_bad_records}: {first_of(bad)}; mend them, or type "
        f"data.max_bad_records={len(bad)}"
    )


def counted(bad: Sequence[BadLine]) -> str:
    """How many records are broken, in words."""
    return f"{len(bad)} broken record{'s' if len(bad) > 1 else ''}"


def first_of(bad: Sequence[BadLine], most: int = 3) -> str:
    """The first broken records, and how many more there are."""
    more = f"; and {len(bad) - most} more" if len(bad) > most else ""
    return "; ".join(map(str, bad[:most])) + more
