"""From a dataset's name to its examples: `find` its entry, `load` its records, limit the number of broken ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from glmtuner.data.catalog import find
from glmtuner.data.columns import adds_something, looks_needed, needed_message, turn_keys
from glmtuner.data.files import LocalFiles
from glmtuner.data.formats import parser
from glmtuner.data.hub_sets import HubSet
from glmtuner.data.raw import Row
from glmtuner.data.read import read
from glmtuner.data.records import BadRecord, Example, Message, is_empty, mark_of
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.tools import with_tools
from glmtuner.errors import DataError

__all__ = [
    "BadRecord",
    "DatasetSpec",
    "Example",
    "Loaded",
    "Message",
    "SkippedRecord",
    "check_bad_record_limit",
    "find",
    "load",
    "read",
]


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A broken record that was left out: the file or hub dataset it is in, its number, and what is wrong with it.

    `field` is the field that is wrong; "" is the whole record.
    """

    dataset: str
    source: str
    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        field = f"field {self.field}: " if self.field else ""
        return f"{self.source}: record {self.number}: {field}{self.reason}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A dataset's examples, and what is known of its sources.

    `examples` is lazy, and `bad` and `columns` grow as it is consumed, so that a dataset is never in memory as a whole.
    """

    source: LocalFiles | HubSet
    max_examples: int | None
    examples: Iterator[Example]
    bad: list[SkippedRecord]
    files: dict[str, str]  # file or hub id -> sha256 or commit
    size: int  # bytes
    columns: dict[str, None] = field(default_factory=dict)  # those that hold something, of turns as <column>.<key>


def load(
    spec: DatasetSpec,
    *,
    dataset_dir: str | Path,
    package_data: str | Path,
    split: str = "train",
    max_samples: int | None = None,
    cache_dir: str | Path | None = None,
    token: bool = False,
    checksums: bool = True,
) -> Loaded:
    """The first `max_samples` (and at most the entry's `num_samples`) good records of a dataset, as examples.

    Reading stops there: broken records further on are neither read nor counted. Raises DataError if all are broken. Without
    `checksums`, for which each file is read once more, `files` is empty.
    """
    source = read(
        spec, dataset_dir=dataset_dir, package_data=package_data, split=split, cache_dir=cache_dir, token=token
    )
    max_examples = min((limit for limit in (max_samples, spec.num_samples) if limit is not None), default=None)
    bad: list[SkippedRecord] = []
    columns: dict[str, None] = {}
    examples = _some_examples(spec, source, max_examples, bad, columns)
    return Loaded(
        source, max_examples, examples, bad, source.fingerprint() if checksums else {}, source.size(), columns
    )


def _some_examples(
    spec: DatasetSpec,
    source: Iterable[Row],
    max_examples: int | None,
    bad: list[SkippedRecord],
    columns: dict[str, None],
) -> Iterator[Example]:
    """The examples; raises DataError at the end if there was none."""
    is_empty = True
    for example in islice(examples_of(spec, source, bad, columns), max_examples):
        is_empty = False
        yield example
    if is_empty:
        raise without_good_records(spec, bad)


def without_good_records(spec: DatasetSpec, bad: Sequence[SkippedRecord]) -> DataError:
    """The error for a dataset whose records are all broken."""
    return DataError(
        f"dataset {spec.name!r}: {_count_text(bad)} and no good one: {_first_reasons(bad)}; they are read as "
        f"formatting={spec.formatting}; fix them, or formatting and columns in {spec.origin}"
    )


def examples_of(
    spec: DatasetSpec,
    source: Iterable[Row],
    bad: list[SkippedRecord],
    columns: dict[str, None],
) -> Iterator[Example]:
    """The examples of the good records of a source; `bad` takes the broken ones, `columns` the columns that hold something."""
    parse, mark = parser(spec.formatting), spec.columns.get("weight", "")
    has_turns = spec.formatting in ("sharegpt", "messages")
    # an entry that names its columns has chosen what to leave out, and a path was looked through before
    allowed = {*spec.columns.values(), *spec.ignore_columns} if spec.default_columns else None
    for label, number, raw in source:
        try:
            if isinstance(raw, BadRecord):
                raise raw
            example = with_tools(parse(raw, spec), raw, spec)
            if mark and (weight := mark_of(raw.get(mark), mark, takes_numbers=True)) is not None:
                example = replace(example, learned=weight > 0, weight=weight or 1.0)
        except BadRecord as error:
            bad.append(SkippedRecord(spec.name, label, number, error.field, error.reason))
            continue
        for name, value in raw.items():
            if name not in columns and value != "" and not is_empty(value):
                columns[name] = None
        if has_turns:
            columns.update(dict.fromkeys(turn_keys(raw, spec)))
        if allowed is not None and (others := raw.keys() - allowed):
            needed = [name for name in others if looks_needed(name) and not is_empty(raw[name])]
            if needed := [name for name in needed if adds_something(name, raw[name], example)]:
                raise DataError(needed_message(spec, label, number, sorted(needed)))
        yield example


def check_bad_record_limit(bad: Sequence[SkippedRecord], max_bad_records: int) -> None:
    """Raise DataError if more records are broken than `data.max_bad_records` allows, over all datasets given."""
    if len(bad) <= max_bad_records:
        return
    names = list(dict.fromkeys(record.dataset for record in bad))
    datasets = f"dataset{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
    raise DataError(
        f"{datasets}: {_count_text(bad)} and data.max_bad_records={max_bad_records}: {_first_reasons(bad)}; fix them, or type "
        f"data.max_bad_records={len(bad)}"
    )


def _count_text(bad: Sequence[SkippedRecord]) -> str:
    return f"{len(bad)} broken record{'s' if len(bad) > 1 else ''}"


def _first_reasons(bad: Sequence[SkippedRecord], limit: int = 3) -> str:
    """What is wrong with the first broken records, and how many more there are."""
    more = f"; and {len(bad) - limit} more" if len(bad) > limit else ""
    return "; ".join(map(str, bad[:limit])) + more
