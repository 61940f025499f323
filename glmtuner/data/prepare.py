"""Names in `data.dataset` -> encoded, cached, split and mixed datasets, with their counts and checksums.

The cache is keyed by content: checksums of the files, the entry, the tokenizer, the template, the lengths, and the code
that encodes. The same data is tokenized once, however many runs use it (LLaMA-Factory#3939).
"""

import gc
import hashlib
import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate, chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Data
from glmtuner.config.paths import PACKAGE, PACKAGE_DATA
from glmtuner.data import BadLine, DatasetSpec, Loaded, check_bad_record_limit, load
from glmtuner.data.encode import Counts, Encoder
from glmtuner.data.records import Example
from glmtuner.distributed import ranks
from glmtuner.errors import DataError
from glmtuner.templates.tiktoken_engine import leave_engine, use_engine

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    import pyarrow
    from datasets import Dataset

THREADS = min(4, os.cpu_count() or 1)  # more only wait for each other: Python does its part of the work one at a time
WORTH_AN_ENGINE = 50  # bytes of data for each token; a faster encoder has to read and to prove the vocabulary first
ROWS, COUNTS = "rows.arrow", "counts.json"
CODE = ("data/**/*.py", "templates/*.py", "models/tokenization_chatglm.py")  # what decides the tokens of a record


@dataclass(frozen=True)
class Prepared:
    """One dataset, encoded."""

    spec: DatasetSpec
    rows: "Dataset"
    counts: Counts
    files: dict[str, str]  # file or hub id -> sha256 or commit
    bad: list[BadLine]

    def about(self) -> dict[str, Any]:
        """What provenance.json keeps."""
        broken = [str(line) for line in self.bad]
        return {"origin": self.spec.origin, "sha256": self.files, **asdict(self.counts), "skipped": broken}


def cache_root() -> Path:
    """`$GLMTUNER_CACHE`, or ~/.cache/glmtuner."""
    return Path(os.environ.get("GLMTUNER_CACHE") or Path.home() / ".cache" / "glmtuner")


def prepare(spec: DatasetSpec, data: Data, encoder: Encoder, *, hub_cache: str | None, token: bool) -> Prepared:
    """The dataset's rows, from the cache when it has them; they lie in its files, of which memory holds what is read."""
    from datasets import Dataset
    from filelock import FileLock

    loaded = load(
        spec, dataset_dir=data.dataset_dir, package_data=PACKAGE_DATA, split=data.split, max_samples=data.max_samples,
        cache_dir=hub_cache, token=token,
    )  # fmt: skip
    description = description_of(encoder.tokenizer)
    folder = cache_root() / "tokenized" / key_of(spec, loaded.files, data, encoder, description)
    if data.overwrite_cache and ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):  # one process encodes; ranks and other jobs wait for it
        if not (folder / COUNTS).is_file():
            _encode_into(folder, loaded, encoder, data, spec, description)
    kept = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    bad = [BadLine(**line) for line in kept["bad"]]
    check_bad_record_limit(bad, data.max_bad_records)
    return Prepared(spec, Dataset.from_file(str(folder / ROWS)), Counts(**kept["counts"]), loaded.files, bad)


def _encode_into(
    folder: Path, loaded: Loaded, encoder: Encoder, data: Data, spec: DatasetSpec, description: bytes
) -> None:
    """Encode the examples as they are read and write their rows as they come, to a temporary name first."""
    from pyarrow import ipc

    # whoever holds the lock is alone, so what lies there is of a process that was killed
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        counts = Counts()
        with ExitStack() as files:
            if gc.isenabled():  # rows make no circles, and there are many of them to look through again and again
                gc.disable()
                files.callback(gc.enable)
            batches = _batches(loaded, encoder, data, spec)
            much = description if loaded.size > WORTH_AN_ENGINE * len(encoder.tokenizer) else None
            encoded = files.enter_context(closing(_encoded(batches, encoder, data.preprocessing_num_workers, much)))
            writer = None
            for rows, found in encoded:
                if writer is None:
                    file = files.enter_context((partial / ROWS).open("wb"))
                    writer = files.enter_context(ipc.new_stream(file, rows.schema))
                writer.write_batch(rows)
                counts += found
        check_bad_record_limit(loaded.bad, data.max_bad_records)
        counts.bad_records = len(loaded.bad)
        about = {"counts": asdict(counts), "bad": [asdict(line) for line in loaded.bad]}
        (partial / COUNTS).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # what a removal that was cut short has left
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(loaded: Loaded, encoder: Encoder, data: Data, spec: DatasetSpec) -> Iterator[list[Example]]:
    """The examples a batch at a time; after one broken record too many they are only counted."""
    while examples := list(islice(loaded.examples, encoder.batch)):
        if len(loaded.bad) > data.max_bad_records:
            continue
        unfit = next((example.kind for example in examples if example.kind not in encoder.accepts), None)
        if unfit is not None:
            raise DataError(f"data.dataset={spec.name} holds {unfit}, and {encoder.usage_hint}")
        yield examples


def _encoded(
    batches: Iterator[list[Example]], encoder: Encoder, workers: int | None, much: bytes | None
) -> "Iterator[tuple[pyarrow.RecordBatch, Counts]]":
    """Each batch's rows and counts, in order, while those behind it are encoded; a few batches are in memory at a time.

    On threads, since tokenizers work without Python's lock and most of the time is theirs. More processes help where there
    are many cores: they take seconds to start. `much`: the tokenizer's description, where there is enough for an engine.
    """
    first = list(islice(batches, 2))
    if len(first) < 2:  # not worth a second tokenizer
        yield from (_encode(encoder, examples) for examples in first)
        return
    # the batches are the parallelism: texts of one batch on several threads cost a fifth more
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if workers and workers > 1:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_keep, initargs=(encoder, much))
        work = _encode_kept
    else:
        from concurrent.futures import ThreadPoolExecutor

        workers, work = THREADS, None
        pool = ThreadPoolExecutor(workers)
    under_way: deque[Future] = deque()
    try:
        work = work or _on_threads(pool, encoder, much, first, batches)
        for examples in chain(first, batches):
            under_way.append(pool.submit(work, examples))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        leave_engine(encoder.tokenizer)


def _on_threads(
    pool: "ThreadPoolExecutor", encoder: Encoder, much: bytes | None, first: list[Any], batches: Iterator[list[Example]]
) -> "Callable[[list[Example]], tuple[pyarrow.RecordBatch, Counts]]":
    """What a thread does with a batch; where an engine is prepared, more batches are read to `first` meanwhile."""
    shared = None
    if much and not encoder.template.asks_tokenizer:  # threads would change its options under each other's hands
        engine = pool.submit(use_engine, encoder.tokenizer, much)
        first += islice(batches, THREADS)
        shared = engine.result()
    encoders = SimpleQueue()
    for place in range(THREADS):  # a tokenizer each, since asking one sets its options; an engine is asked by all
        encoders.put(encoder if shared or not place else replace(encoder, tokenizer=deepcopy(encoder.tokenizer)))

    def work(examples: list[Example]) -> "tuple[pyarrow.RecordBatch, Counts]":
        mine = encoders.get()
        try:
            return _encode(mine, examples)
        finally:
            encoders.put(mine)

    return work


_kept: Encoder  # a process's own, sent once and not with each batch


def _keep(encoder: Encoder, much: bytes | None) -> None:
    global _kept
    _kept = encoder
    if much:
        use_engine(encoder.tokenizer, much)


def _encode_kept(examples: list[Example]) -> "tuple[pyarrow.RecordBatch, Counts]":
    return _encode(_kept, examples)


def _encode(encoder: Encoder, examples: list[Example]) -> "tuple[pyarrow.RecordBatch, Counts]":
    rows, counts = encoder.encode(examples)
    return as_arrow(rows), counts


def as_arrow(rows: Sequence[dict[str, Any]]) -> "pyarrow.RecordBatch":
    """The rows as Arrow keeps them."""
    import pyarrow

    schema = _schema(tuple(rows[0]))
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pyarrow.record_batch(columns, schema=schema)


def _column(values: Sequence[Any], kind: "pyarrow.DataType") -> "pyarrow.Array":
    """An Arrow array of a column's values; numbers go through one buffer, ten times faster than one by one."""
    import numpy
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return pyarrow.StructArray.from_arrays(
            [_column([value[field.name] for value in values], field.type) for field in kind], fields=list(kind)
        )
    if not pyarrow.types.is_list(kind):
        # Arrow's own allocator (mimalloc) takes ten times as long as all else here when threads take turns at it
        return pyarrow.array(values, kind, memory_pool=pyarrow.system_memory_pool())
    ends = numpy.fromiter(accumulate(map(len, values), initial=0), numpy.int32, len(values) + 1)
    if all(isinstance(value, array) for value in values):
        inner = pyarrow.Array.from_buffers(kind.value_type, ends[-1], [None, pyarrow.py_buffer(b"".join(values))])
    elif pyarrow.types.is_int32(kind.value_type):
        inner = pyarrow.array(numpy.fromiter(chain.from_iterable(values), numpy.int32, ends[-1]))
    else:
        inner = _column(list(chain.from_iterable(values)), kind.value_type)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(ends)], children=[inner])


@cache
def _schema(names: tuple[str, ...]) -> "pyarrow.Schema":
    """The types of a row's columns, stated, since a batch of empty lists would have none."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    types = {
        **dict.fromkeys(("prompt", "answer", "rejected"), pyarrow.string()),
        "is_desirable": pyarrow.bool_(),
        "earlier": pyarrow.list_(pyarrow.struct({"input_ids": ids, "labels": ids})),
    }
    return pyarrow.schema([(name, types.get(name, ids)) for name in names])


def key_of(spec: DatasetSpec, files: dict[str, str], data: Data, encoder: Encoder, description: bytes) -> str:
    """A name for the encoded rows that changes with anything that changes them."""
    about = {
        "files": files,
        "spec": {name: value for name, value in asdict(spec).items() if name not in ("origin", "description", "kind")},
        "split": data.split,
        "max_samples": data.max_samples,
        "encoder": encoder.settings(),
        "template": encoder.template.describe(),
        "tokenizer": digest(description),
        "code": [digest(path.read_bytes()) for part in CODE for path in sorted(PACKAGE.glob(part))],
    }
    return digest(json.dumps(about, sort_keys=True, ensure_ascii=False).encode())[:32]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def description_of(tokenizer: Any) -> bytes:
    """All that the tokenizer does: its backend's own description, its file, or its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str().encode()
    file = getattr(tokenizer, "vocab_file", None)
    if file and Path(file).is_file():
        return f"{type(tokenizer).__name__} {tokenizer.special_tokens_map}".encode() + Path(file).read_bytes()
    return json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()


def held_out(rows: "Dataset", dev_ratio: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Rows to train on, and a `dev_ratio` of them (at least one) to evaluate on: the same for the same seed."""
    if len(rows) < 2:
        raise DataError(
            f"data.dev_ratio={dev_ratio:g} of {len(rows)} record leaves nothing to train on; name more data"
        )
    count = min(max(round(len(rows) * dev_ratio), 1), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def with_earlier_answers(rows: "Dataset") -> "Dataset":
    """`input_ids` and `labels` to train on: each row behind those of its conversation's earlier answers."""
    learned = rows.select_columns(["input_ids", "labels"])
    if not _has_earlier_answers(rows):
        return learned
    spread = rows.with_format("arrow").map(
        _spread, batched=True, remove_columns=rows.column_names, features=learned.features
    )
    return spread.with_format(None)


def _has_earlier_answers(rows: "Dataset") -> bool:
    if "earlier" not in rows.column_names:
        return False
    return any(len(chunk.flatten()) for chunk in rows.data["earlier"].chunks)


def _spread(table: "pyarrow.Table") -> "pyarrow.Table":
    """The rows of `earlier`, each conversation's in front of its own; in Arrow, since lists of numbers are ten times slower."""
    import pyarrow

    earlier = table["earlier"].combine_chunks()
    parts, order, taken = earlier.flatten(), [], 0
    for place, count in enumerate(earlier.value_lengths().to_pylist()):
        order += [*range(taken, taken + count), len(parts) + place]
        taken += count
    columns = {
        name: pyarrow.concat_arrays([parts.field(name), table[name].combine_chunks()]).take(pyarrow.array(order))
        for name in ("input_ids", "labels")
    }
    return pyarrow.table(columns)


def mixed(parts: Sequence["Dataset"], probabilities: Sequence[float], seed: int) -> tuple["Dataset", list[float]]:
    """The datasets as one, and the share of each that was reached.

    Without probabilities all records, one dataset behind the other (the Trainer shuffles them). With them, records are
    drawn in these shares until one dataset is used up: none is seen twice.
    """
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    if not probabilities:
        whole = concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
        return whole, [len(part) / max(len(whole), 1) for part in parts]

    def drawn_from(sources: "list[Dataset]") -> "Dataset":
        return interleave_datasets(
            sources, probabilities=list(probabilities), seed=seed, stopping_strategy="first_exhausted"
        )

    # The same draw of bare numbers tells the shares: a column added to the rows would copy all of them.
    numbers = [Dataset.from_dict({"number": [place] * len(part)}) for place, part in enumerate(parts)]
    origins = list(drawn_from(numbers)["number"])
    return drawn_from(list(parts)), [origins.count(place) / max(len(origins), 1) for place in range(len(parts))]
