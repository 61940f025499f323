"""Records of Arrow and parquet files. Only the columns that are needed are decoded; a value that Python cannot represent is a
bad value of its record alone. A struct has the keys of all records, null where a record has none: in tools and their calls these
are left out again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.data.raw import Numbered, Unreadable, reason_of
from glmtuner.data.streams import COMPRESSIONS, open_bytes

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 1000
# What Arrow raises for a broken file: nearly all of its own errors derive from these, and a column's name may not be UTF-8.
BROKEN = (ValueError, OSError, LookupError, TypeError, RuntimeError, MemoryError)


# structs of tools and calls, whose keys differ from one to the next
OF_TOOLS = frozenset(("tools", "functions", "function", "tool_calls", "function_call", "arguments", "parameters"))


class Undecodable:
    """A value that Python cannot represent, such as text that is not UTF-8, or a date after the year 9999."""

    def __init__(self, error: Exception) -> None:
        self.reason = reason_of(error)

    def __repr__(self) -> str:
        return f"a value that cannot be decoded: {self.reason}"


class Unread:
    """Stands for a value of a column that is not needed and was not decoded."""

    def __repr__(self) -> str:
        return "a value that was not read"


UNREAD = Unread()


def parquet_records(
    path: Path, columns: Collection[str] | None = None, row_groups: Sequence[int] | None = None
) -> Numbered:
    """The rows of a parquet file, or of some of its row groups, a batch at a time."""
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(_source(path)) as file:
            groups = None if row_groups is None else [*row_groups]
            yield from _numbered(file.iter_batches(batch_size=ROWS_AT_A_TIME, row_groups=groups), columns)
    except BROKEN as error:
        raise Unreadable(f"is not a readable parquet file: {reason_of(error)}") from None


def arrow_records(path: Path, columns: Collection[str] | None = None) -> Numbered:
    """The rows of an Arrow file, in the stream format (as datasets writes) or the file format (feather)."""
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) if path.suffix.lower() not in COMPRESSIONS else _source(path) as file:
            reader: Iterable[pyarrow.RecordBatch]
            try:
                opened = ipc.open_file(file)
                reader = (opened.get_batch(index) for index in range(opened.num_record_batches))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                reader = ipc.open_stream(file)
            yield from _numbered(reader, columns)
    except BROKEN as error:
        raise Unreadable(f"is not a readable Arrow file: {reason_of(error)}") from None


def rows_of_table(table: pyarrow.Table, columns: Collection[str] | None = None) -> Numbered:
    """The rows of a table in memory or memory-mapped."""
    return _numbered(table.to_batches(), columns)


def _source(path: Path) -> Any:
    """What Arrow opens; a compressed file is decompressed in memory, since these formats are not read in order."""
    if path.suffix.lower() not in COMPRESSIONS:
        return str(path)
    import pyarrow

    with open_bytes(path) as file:
        return pyarrow.BufferReader(file.read())


def _numbered(batches: Iterable[pyarrow.RecordBatch], columns: Collection[str] | None) -> Numbered:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            for row in _rows(batch.slice(start, ROWS_AT_A_TIME), columns):
                number += 1
                yield number, row


def _rows(batch: pyarrow.RecordBatch, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    needed, others = [], {}
    for name in dict.fromkeys(batch.schema.names):
        if columns is None or name in columns:
            needed.append(name)
        elif _holds_something(batch.column(batch.schema.names.index(name))):
            others[name] = UNREAD
    if not needed:
        yield from (dict(others) for _ in range(batch.num_rows))
        return
    values = [_column(name, batch.column(batch.schema.names.index(name))) for name in needed]
    for row in zip(*values, strict=True):
        yield dict(zip(needed, row, strict=True), **others)


def _holds_something(array: pyarrow.Array) -> bool:
    """Whether any value is neither null nor empty; nothing is decoded."""
    import pyarrow
    from pyarrow import compute

    if array.null_count == len(array):
        return False
    try:
        kind = array.type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            return bool(compute.max(compute.binary_length(array)).as_py())
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return bool(compute.max(compute.list_value_length(array)).as_py())
    except pyarrow.ArrowException:
        pass
    return True


def _column(name: str, array: pyarrow.Array) -> list[Any]:
    """The Python values of a column."""
    values = _values(array)
    return [_without_nulls(value) for value in values] if _holds_tools(name, array.type) else values


def _holds_tools(name: str, kind: pyarrow.DataType) -> bool:
    """Whether a column of this name and type has structs of tools or calls in it."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_tools(name, kind.value_type)
    if not types.is_struct(kind):
        return False
    return name in OF_TOOLS or any(_holds_tools(field.name, field.type) for field in kind)


def _without_nulls(value: Any) -> Any:
    """The value without the keys of its objects that hold null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _values(array: pyarrow.Array) -> list[Any]:
    """The Python values of an array; where one cannot be decoded, the others still are."""
    try:
        values: list[Any] = array.to_pylist()
        return values
    except Exception:  # UnicodeDecodeError, OverflowError, ArrowException…: it depends on the type
        return [_value(scalar) for scalar in array]


def _value(scalar: pyarrow.Scalar[Any]) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        return Undecodable(error)
