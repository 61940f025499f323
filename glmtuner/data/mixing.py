"""Datasets of encoded rows: split, mixed by shares, and spread to a row for each answer. Rows stay in the cache's files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmtuner.data.weights import COLUMNS
from glmtuner.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from numpy import dtype, int64, ndarray

    Indices = ndarray[tuple[int, ...], dtype[int64]]


def held_out(rows: "Dataset", dev_ratio: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Rows to train on, and a share of `dev_ratio` (at least one row) to evaluate on: the same for the same seed."""
    if len(rows) < 2:
        raise DataError(
            f"data.dev_ratio={dev_ratio:g} of {len(rows)} record leaves nothing to train on; add records to data.dataset, or type data.dev_ratio=0"
        )
    count = min(max(round(len(rows) * dev_ratio), 1), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def with_earlier_answers(rows: "Dataset") -> "Dataset":
    """`input_ids`, `labels` and weights to train on: each row preceded by those of its conversation's earlier answers."""
    weights = [name for name in COLUMNS if name in rows.column_names]
    learned = rows.select_columns(["input_ids", "labels", *weights])
    if not _has_earlier_answers(rows):
        return learned
    flattened = rows.with_format("arrow").map(
        _flatten_earlier, batched=True, remove_columns=rows.column_names, features=learned.features
    )
    return flattened.with_format(None)


def _has_earlier_answers(rows: "Dataset") -> bool:
    if "earlier" not in rows.column_names:
        return False
    return any(len(chunk.flatten()) for chunk in rows.data["earlier"].chunks)


def _flatten_earlier(table: "pyarrow.Table") -> "pyarrow.Table":
    """The rows of `earlier`, each followed by its conversation's own; in Arrow, ten times faster than as Python lists."""
    import pyarrow.compute

    earlier = table["earlier"].combine_chunks()
    earlier_rows, order, start = earlier.flatten(), [], 0
    for index, count in enumerate(earlier.value_lengths().to_pylist()):
        order += [*range(start, start + count), len(earlier_rows) + index]
        start += count
    columns = {
        name: pyarrow.concat_arrays([earlier_rows.field(name), table[name].combine_chunks()]).take(pyarrow.array(order))
        for name in ("input_ids", "labels")
    }
    if "weight" in table.column_names:
        own, each = table["weight"].combine_chunks(), table["weights"].combine_chunks()
        owners = own.take(earlier.value_parent_indices())
        factors = [pyarrow.compute.multiply(earlier_rows.field("weight"), owners), own]
        columns["weight"] = pyarrow.concat_arrays(factors).take(pyarrow.array(order))
        unset = pyarrow.nulls(len(earlier_rows), each.type)
        columns["weights"] = pyarrow.concat_arrays([unset, each]).take(pyarrow.array(order))
    return pyarrow.table(columns)


def mixed(parts: "Sequence[Dataset]", probabilities: Sequence[float], seed: int) -> tuple["Dataset", list[float]]:
    """The datasets in one, and the share of its records that comes from each.

    Without probabilities all records, the datasets one after the other (the Trainer shuffles them). With them, records are
    drawn with these probabilities until one dataset is exhausted; none is drawn twice.
    """
    from datasets import concatenate_datasets

    whole = concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
    if not probabilities:
        return whole, [len(part) / max(len(whole), 1) for part in parts]
    indices, counts = drawn([len(part) for part in parts], probabilities, seed)
    return whole.select(indices), [count / max(len(indices), 1) for count in counts]


def drawn(lengths: Sequence[int], probabilities: Sequence[float], seed: int) -> "tuple[Indices, list[int]]":
    """The rows of concatenated datasets of these lengths, drawn in turn until one of them is exhausted, and how many of each.

    They are those of `interleave_datasets` with `stopping_strategy="first_exhausted"`, which makes a Python integer of each row.
    """
    import numpy

    random, taken, parts = numpy.random.default_rng(seed), numpy.zeros(len(lengths), dtype=numpy.int64), []
    starts = numpy.concatenate(([0], numpy.cumsum(lengths)[:-1]))
    while (taken < lengths).all():
        block = random.choice(len(lengths), size=1000, p=probabilities)
        indices = numpy.empty(len(block), dtype=numpy.int64)
        ends = []
        for number, length in enumerate(lengths):
            places = numpy.flatnonzero(block == number)
            indices[places] = starts[number] + taken[number] + numpy.arange(len(places))
            if taken[number] + len(places) >= length:
                ends.append(places[length - taken[number] - 1] + 1)
            taken[number] += len(places)
        parts.append(indices[: min(ends, default=len(block))])
    rows = numpy.concatenate(parts)
    which = numpy.searchsorted(starts, rows, side="right") - 1
    return rows, numpy.bincount(which, minlength=len(lengths)).tolist()
