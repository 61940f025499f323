"""Data files that are named by their path: found, and read without an entry, by the columns that their records have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from glmtuner.data.columns import Column, infer_format, is_ranked, looks_needed, refuse_needed, survey, unread
from glmtuner.data.files import NOT_RECORDS, LocalFiles, data_files, split_files
from glmtuner.data.formats import parser
from glmtuner.data.raw import Row, Unreadable
from glmtuner.data.readers import is_data_file, legal_suffixes
from glmtuner.data.records import BadRecord, names_of
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.streams import check_regular, data_suffix
from glmtuner.errors import DataError


def existing_path(name: str, dataset_dir: Path) -> Path | None:
    """The data file or folder with this path, relative to the working directory or else to `dataset_dir`.

    What is neither a file nor a folder, such as a named pipe, is returned, too, so that the error can say what it is.
    """
    relative = Path(name).expanduser()
    for path in (relative, dataset_dir / relative) if name.strip() else ():
        try:
            exists, is_folder = path.exists(), path.is_dir()
        except (OSError, ValueError):  # a name that is too long, or that no file can have
            continue
        if exists and (not is_folder or "/" in name or data_files(path)):
            return path.absolute()
    return None


def neighbours(name: str, dataset_dir: Path) -> list[str]:
    """The paths of the data files in the folder of `name`, if it looks like the path of one."""
    path = Path(name).expanduser()
    if "/" not in name and not is_data_file(name):
        return []
    try:
        folders = [folder for folder in (path.parent, dataset_dir / path.parent) if folder.is_dir()]
    except OSError:
        return []
    files = [file for folder in folders for file in folder.iterdir()]
    return [str(path.parent / file.name) for file in files if is_data_file(file) and file.name not in NOT_RECORDS]


def spec_of_path(name: str, path: Path, split: str = "train", ignore_columns: Sequence[str] = ()) -> DatasetSpec:
    """An entry for a file or folder without one, inferred from all of its records. Raises DataError.

    A column that holds text, is not read, and looks like a part of the question is an error unless it is to be ignored.
    """
    if path.is_dir():
        names = data_files(path)
        files = {f"{name.rstrip('/')}/{file}": path / file for file in split_files(names, split) or names}
        problem = "holds no data file"
    else:
        files = {name: path} if is_data_file(path) else {}
        problem = f"ends in {data_suffix(path) or 'nothing'}"
        try:
            check_regular(path)
        except Unreadable as error:
            raise DataError(f"dataset {name!r}: {name} {error}") from None
    if not files:
        raise DataError(f"dataset {name!r} {problem}; {legal_suffixes()} files can be read, convert it to one of them")
    stats = tuple((label, file, file.stat().st_mtime_ns, file.stat().st_size) for label, file in files.items())
    columns, first_error = _columns_of(name, stats)
    if first_error is not None and not columns:
        raise DataError(f"dataset {name!r}: {first_error}")
    columns = {column: found for column, found in columns.items() if column not in ignore_columns}
    formatting, named = infer_format(columns)
    if not formatting:
        raise DataError(
            f"dataset {name!r}: {next(iter(files))}: the records have {names_of(columns) or 'no columns'}, which is not a "
            "known format; legal: instruction and output (alpaca; also input, history, system), conversations (sharegpt), "
            "messages (OpenAI), prompt and completion, instruction with chosen and rejected, or text; name other columns in "
            "an entry of dataset_info.json in data.dataset_dir"
        )
    spec = DatasetSpec(
        name=name, file_name=str(path), formatting=formatting, ranking=is_ranked(columns, named), columns=named,
        origin=name, ignore_columns=list(ignore_columns),
    )  # fmt: skip
    held = [column for column in unread(columns, spec) if columns[column].kinds]
    needed = [column for column in held if looks_needed(column, columns[column])]
    message = refuse_needed(spec, _rows(name, files), needed, parser(formatting)) if needed else None
    if message is not None:
        raise DataError(message)
    return spec


@lru_cache(maxsize=64)
def _columns_of(name: str, stats: tuple[tuple[str, Path, int, int], ...]) -> tuple[dict[str, Column], str | None]:
    """The columns of the files' records, and what is wrong with the first record that is broken."""
    first_error: list[str] = []

    def records() -> Iterator[dict[str, Any]]:
        for row in _rows(name, {label: file for label, file, _, _ in stats}):
            if isinstance(row.raw, BadRecord):
                first_error.append(f"{row.source}: record {row.number}: {row.raw.reason}")
            else:
                yield row.raw

    return survey(records()), first_error[0] if first_error else None


def _rows(name: str, files: dict[str, Path]) -> Iterator[Row]:
    """The rows of the files up to the first that cannot be read; raises DataError if that is the first of all."""
    is_first = True
    try:
        for row in LocalFiles(name, files):
            is_first = False
            yield row
    except DataError:
        if is_first:
            raise  # otherwise it is raised when the records are read up to there
