"""Which records of a dataset changed between two runs, from the hashes that both stored, and what they say where their file exists."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path

from glmtuner.compare.loaded import LoadedRun
from glmtuner.config.paths import PACKAGE_DATA, conf_dir
from glmtuner.data import DatasetSpec, Example, find, load
from glmtuner.data.files import local_path
from glmtuner.data.record_hashes import changed_records, record_hash, split_hashes
from glmtuner.errors import GlmtunerError
from glmtuner.report.run import truncated

MAX_NUMBERS, MAX_TEXT = 8, 200


@contextmanager
def inside(folder: Path | None) -> Iterator[None]:
    """In the folder while this lasts, where there is one: relative paths of a run are relative to it."""
    before = Path.cwd()
    try:
        if folder is not None:
            os.chdir(folder)
        yield
    finally:
        os.chdir(before)


def stored_hashes(run: LoadedRun, name: str) -> list[bytes] | None:
    """The hashes of the dataset's records as the run stored them; None where it did not, or where the file is damaged or gone."""
    entry = run.provenance.get("data", {}).get(name, {})
    place = entry.get("hashes")
    if not isinstance(place, str) or Path(place).is_absolute() or ".." in Path(place).parts:
        return None
    try:
        found = split_hashes((run.folder / place).read_bytes())
    except OSError:
        return None
    return found if len({*map(len, found)}) < 2 else None  # cut within a hash


def changes(before: LoadedRun, after: LoadedRun, name: str, labels: Sequence[str]) -> list[str]:
    """Sentences about the records of a dataset that differ between two runs that both read it; empty where none does."""
    hashes = stored_hashes(before, name), stored_hashes(after, name)
    one, other = hashes
    if one is None or other is None:
        lacking = [label for label, each in zip(labels, hashes, strict=True) if each is None]
        return [f"{name}: which records differ is not known: {' and '.join(lacking)} stored no hashes of them"]
    return record_changes(one, other, name, labels, [run_records(before, name, one), run_records(after, name, other)])


def record_changes(
    before: Sequence[bytes], after: Sequence[bytes], name: str, labels: Sequence[str], readers: "Sequence[Reader]"
) -> list[str]:
    """Sentences about the records that differ between two lists of hashes; `readers` find the text of a record."""
    if before == after:
        return []
    gone, new = changed_records(before, after)
    if not gone and not new:
        first = next(index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        return [f"{name}: the same {len(before):,} records in another order, from record {first + 1} on"]
    if gone == new:
        sentences = [f"{name}: {_numbers(gone)} of {len(before):,} changed"]
    else:
        parts = [f"{_numbers(gone)} of {labels[0]} {_verb(gone)} not in {labels[1]}"] if gone else []
        parts += [f"{_numbers(new)} of {labels[1]} {_verb(new)} not in {labels[0]}"] if new else []
        sentences = [f"{name}: {', and '.join(parts)} ({len(before):,} records then {len(after):,})"]
    for label, numbers, reader in zip(labels, (gone, new), readers, strict=True):
        if numbers:
            text = reader.text(numbers[0])
            shown = truncated(text, MAX_TEXT) if text is not None else "its text is no longer there"
            sentences.append(f"{name}: record {numbers[0] + 1} of {label}: {shown}")
    return sentences


def _numbers(indices: Sequence[int]) -> str:
    """`record 3`, `records 3, 4 and 5`, `records 3, 4 … (12 in all)`; numbers from 1, of those that were read."""
    listed = [str(index + 1) for index in indices[:MAX_NUMBERS]]
    if len(indices) == 1:
        return f"record {listed[0]}"
    if len(indices) > MAX_NUMBERS:
        return f"records {', '.join(listed)} … ({len(indices):,} in all)"
    return f"records {', '.join(listed[:-1])} and {listed[-1]}"


def _verb(indices: Sequence[int]) -> str:
    return "is" if len(indices) == 1 else "are"


class Reader:
    """Finds the text of a record of a local dataset, if what stands there still has the hash that the run stored."""

    def __init__(
        self, spec: DatasetSpec | None, hashes: Sequence[bytes], options: dict[str, str], cwd: Path | None
    ) -> None:
        self.spec, self.hashes, self.options, self.cwd = spec, hashes, options, cwd

    def text(self, index: int) -> str | None:
        """The record's text; None where its file is gone, or the record is another one today."""
        if self.spec is None:
            return None
        try:
            with inside(self.cwd), redirect_stdout(io.StringIO()):
                if local_path(self.spec, Path(self.options["dataset_dir"]), PACKAGE_DATA) is None:
                    return None  # nothing is downloaded for this
                loaded = load(self.spec, package_data=PACKAGE_DATA, checksums=False, **self.options)  # type: ignore[arg-type]
                example = next(islice(loaded.examples, index, None), None)
        except (GlmtunerError, OSError, ValueError):
            return None
        return text_of(example) if example is not None and record_hash(example) == self.hashes[index] else None


def run_records(run: LoadedRun, name: str, hashes: Sequence[bytes]) -> Reader:
    """The reader of the records of a run's dataset."""
    data = run.config.get("data", {})
    options = {"dataset_dir": str(data.get("dataset_dir", "data")), "split": str(data.get("split", "train"))}
    spec = None
    if not name.lower().startswith(("http://", "https://")):
        flags = run.provenance.get("flags", [])
        own = [Path(flags[flags.index("--config-dir") + 1])] if "--config-dir" in flags[:-1] else []
        folders = [folder / "dataset" for folder in (*own, conf_dir())]
        try:
            with inside(run.cwd), redirect_stdout(io.StringIO()):
                ignored = [*data.get("ignore_columns", [])]
                spec = find(name, options["dataset_dir"], folders, split=options["split"], ignore_columns=ignored)
        except (GlmtunerError, OSError, ValueError):
            spec = None
    return Reader(spec, hashes, options, run.cwd)


def text_of(example: Example) -> str:
    """The record on one line: its turns with their roles, then the answers of a pair, or its text."""
    turns = [f"{turn.role}: {turn.content}" for turn in example.messages]
    turns += [
        f"{role}: {text}"
        for role, text in (("chosen", example.chosen), ("rejected", example.rejected))
        if text is not None
    ]
    return " | ".join([*turns, *([example.text] if example.text is not None else [])])
