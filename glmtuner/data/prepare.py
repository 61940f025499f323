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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import accumulate, chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Data
from glmtuner.config.paths import PACKAGE, PACKAGE_DATA, cache_root
from glmtuner.console import say
from glmtuner.data import DatasetSpec, Loaded, SkippedRecord, check_bad_record_limit, load
from glmtuner.data.columns import description
from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder
from glmtuner.data.formats import format_source
from glmtuner.data.record_hashes import record_hash
from glmtuner.data.records import Example, Message
from glmtuner.data.tokenized import COUNTS, HASHES, ROWS, tokenized_folder
from glmtuner.data.weights import COLUMNS, is_weighted, without_weights
from glmtuner.distributed import ranks
from glmtuner.errors import DataError
from glmtuner.templates.new_tokens import new_tokens_of
from glmtuner.templates.tiktoken_engine import leave_engine, use_engine
from glmtuner.templates.tool_calls import ToolCall

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    import pyarrow
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    Batch = tuple[pyarrow.RecordBatch | None, Counts]  # None: no example of the batch has a row
    EncodeBatch = Callable[[list[Example]], Batch]

THREADS = min(4, os.cpu_count() or 1)  # more would only wait for the GIL
ENGINE_BYTES_PER_TOKEN = 50  # of data per token of the vocabulary; an engine must first read and prove the vocabulary
FIRST = 3  # records that are kept for a look at their rows
PLAIN_TEXT = ("plain text",)  # what an encoder of documents accepts
CODE = ("data/**/*.py", "templates/*.py", "models/tokenization_chatglm.py")  # code that determines a record's tokens


@dataclass(frozen=True)
class Prepared:
    """One dataset, encoded."""

    spec: DatasetSpec
    rows: "Dataset"
    counts: Counts
    files: dict[str, str]  # file or hub id -> sha256 or commit
    bad: list[SkippedRecord]
    columns: list[str]  # those that hold something
    first: list[Example] = field(default_factory=list)  # the first records, for a look at their rows
    hashes: bytes = b""  # `record_hash` of each record that was read, in their order

    def about(self) -> dict[str, Any]:
        """The dataset's entry in provenance.json."""
        skipped = [str(record) for record in self.bad]
        read = description(self.spec, self.columns)
        about = {"origin": self.spec.origin, **self.spec.published(PACKAGE_DATA), "sha256": self.files}
        about |= {"records_sha256": digest(self.hashes), "read": read}
        return {**about, **asdict(self.counts), "skipped": skipped}


def prepare(spec: DatasetSpec, data: Data, encoder: Encoder, *, hub_cache: str | None, token: bool) -> Prepared:
    """The dataset's rows, from the cache if it has them; they are memory-mapped from the cache's files."""
    from datasets import Dataset
    from filelock import FileLock

    loaded = load(
        spec, dataset_dir=data.dataset_dir, package_data=PACKAGE_DATA, split=data.split, max_samples=data.max_samples,
        cache_dir=hub_cache, token=token,
    )  # fmt: skip
    tokenizer_json = serialized(encoder.tokenizer)
    folder = tokenized_folder(key_of(spec, loaded.files, data, encoder, tokenizer_json))
    if data.overwrite_cache and ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / COUNTS).is_file():
        locks = cache_root() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{folder.name}.lock"):  # one process encodes; ranks and other jobs wait for it
            if not (folder / COUNTS).is_file():
                _encode_into(folder, loaded, encoder, data, spec, tokenizer_json)
    cached = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    bad = [SkippedRecord(**record) for record in cached["bad"]]
    check_bad_record_limit(bad, data.max_bad_records)
    say(f"dataset {spec.name!r}: {description(spec, cached['columns'])}")
    rows = Dataset.from_file(str(folder / ROWS))
    first = [example_of(saved) for saved in cached["first"]]
    counts = Counts(**cached["counts"])
    if not counts.weighted:
        rows = without_weights(rows)
    hashes = (folder / HASHES).read_bytes()
    return Prepared(spec, rows, counts, loaded.files, bad, cached["columns"], first, hashes)


def _encode_into(
    folder: Path, loaded: Loaded, encoder: Encoder, data: Data, spec: DatasetSpec, tokenizer_json: bytes
) -> None:
    """Encode the examples as they are read and stream their rows to a temporary folder, which is renamed at the end."""
    from pyarrow import ipc

    # only the holder of the lock writes, so partial folders were left by processes that were killed
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        counts, first, hashes = Counts(), list[Example](), bytearray()
        with ExitStack() as files:
            if gc.isenabled():  # rows form no reference cycles, and traversing so many of them again and again is slow
                gc.disable()
                files.callback(gc.enable)
            batches = _batches(loaded, encoder, data, spec, first, hashes)
            large = loaded.size > ENGINE_BYTES_PER_TOKEN * len(encoder.tokenizer)
            engine_json = tokenizer_json if large and data.tiktoken_engine else None
            workers = data.preprocessing_num_workers
            encoded = files.enter_context(closing(_encoded(batches, encoder, workers, engine_json)))
            writer = None
            for rows, batch_counts in encoded:
                counts += batch_counts
                if rows is None:
                    continue
                if writer is None:
                    file = files.enter_context((partial / ROWS).open("wb"))
                    writer = files.enter_context(ipc.new_stream(file, rows.schema))
                writer.write_batch(rows)
        check_bad_record_limit(loaded.bad, data.max_bad_records)
        if counts.unrendered and counts.unrendered + len(loaded.bad) > data.max_bad_records:
            raise DataError(
                f"data.dataset={spec.name}: of the last answers of {counts.unrendered} records the chat template renders nothing, so "
                f"that nothing would be learned, and data.max_bad_records={data.max_bad_records}; choose another template with "
                f"model.template=, mend the records, or type data.max_bad_records={counts.unrendered + len(loaded.bad)}"
            )
        counts.bad_records = len(loaded.bad)
        if writer is None:
            raise DataError(f"data.dataset={spec.name}: nothing is left to learn from: {counts.summary()}")
        bad = [asdict(record) for record in loaded.bad]
        kept = [asdict(example) for example in first]
        cached = {"counts": asdict(counts), "bad": bad, "columns": list(loaded.columns), "first": kept}
        (partial / HASHES).write_bytes(hashes)
        (partial / COUNTS).write_text(json.dumps(cached), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # the remains of an interrupted removal
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(
    loaded: Loaded, encoder: Encoder, data: Data, spec: DatasetSpec, first: list[Example], hashes: bytearray
) -> Iterator[list[Example]]:
    """The examples in batches, the `first` of which are kept, and the `hashes` of all of them.

    Once there are too many broken records, they are only counted.
    """
    while examples := list(islice(loaded.examples, encoder.batch_size)):
        if len(loaded.bad) > data.max_bad_records:
            continue
        check_kinds(examples, encoder, spec)
        for example in examples:
            hashes += record_hash(example)
        if not first and encoder.accepts != PLAIN_TEXT:
            first += examples[:FIRST]
        yield examples


def check_kinds(examples: Sequence[Example], encoder: Encoder, spec: DatasetSpec) -> None:
    """Raise DataError for a record of a kind that the encoder does not encode."""
    unsupported = next((example.kind for example in examples if example.kind not in encoder.accepts), None)
    if unsupported is not None:
        raise DataError(f"data.dataset={spec.name} holds {unsupported}, and {encoder.usage_hint}")


def example_of(saved: dict[str, Any]) -> Example:
    """The example that `asdict` and JSON made this of."""
    turns = [
        Message(role, content, learned, reasoning, tuple(ToolCall(**call) for call in calls), call_id, weight)
        for role, content, learned, reasoning, calls, call_id, weight in saved["messages"]
    ]
    calls = {name: tuple(ToolCall(**call) for call in saved[name]) for name in ("chosen_calls", "rejected_calls")}
    return Example(**{**saved, "messages": turns, "tools": tuple(saved["tools"]), **calls})


def _encoded(
    batches: Iterator[list[Example]], encoder: Encoder, workers: int | None, engine_json: bytes | None
) -> "Generator[Batch, None, None]":
    """Each batch's rows and counts, in order, while later batches are encoded; a few batches are in memory at a time.

    By default on threads: tokenizers release the GIL, and most of the time is theirs. More processes help where there are
    many cores, but take seconds to start. `engine_json` is the tokenizer's tokenizer.json where an engine is to be used.
    """
    first = list(islice(batches, 2))
    if len(first) < 2:  # not worth a second tokenizer
        yield from (_encode(encoder, examples) for examples in first)
        return
    # batches are encoded in parallel; encoding the texts of one batch on several threads costs a fifth more
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool: Executor
    if workers and workers > 1:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_init_worker, initargs=(encoder, engine_json)
        )
    else:
        from concurrent.futures import ThreadPoolExecutor

        workers = None
        pool = ThreadPoolExecutor(THREADS)
    pending: deque[Future[Batch]] = deque()
    try:
        encode = _encode_in_worker if workers else _thread_encoder(pool, encoder, engine_json, first, batches)
        for examples in chain(first, batches):
            pending.append(pool.submit(encode, examples))
            if len(pending) > 2 * (workers or THREADS):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        leave_engine(encoder.tokenizer)


def _thread_encoder(
    pool: "Executor",
    encoder: Encoder,
    engine_json: bytes | None,
    first: list[list[Example]],
    batches: Iterator[list[Example]],
) -> "EncodeBatch":
    """The function that threads encode batches by; while it prepares an engine, more batches are read to `first`."""
    engine = None
    if engine_json and not encoder.template.calls_tokenizer:  # threads would change the options of one tokenizer
        preparing = pool.submit(use_engine, encoder.tokenizer, engine_json)
        first += islice(batches, THREADS)
        engine = preparing.result()
    encoders: SimpleQueue[Encoder] = SimpleQueue()
    for index in range(THREADS):  # a tokenizer each, since encoding sets its options; an engine is shared by all
        encoders.put(encoder if engine or not index else replace(encoder, tokenizer=deepcopy(encoder.tokenizer)))

    def encode(examples: list[Example]) -> "Batch":
        own = encoders.get()
        try:
            return _encode(own, examples)
        finally:
            encoders.put(own)

    return encode


_worker_encoder: Encoder  # of a process, sent once instead of with each batch


def _init_worker(encoder: Encoder, engine_json: bytes | None) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    if engine_json:
        use_engine(encoder.tokenizer, engine_json)


def _encode_in_worker(examples: list[Example]) -> "Batch":
    return _encode(_worker_encoder, examples)


def _encode(encoder: Encoder, examples: list[Example]) -> "Batch":
    kept = [example for example in examples if example.learned or not encoder.learns]
    rows, counts = encoder.encode(kept) if kept else ([], Counts())
    counts.unlearned += len(examples) - len(kept)
    counts.weighted = sum(map(is_weighted, rows))
    return as_arrow(rows) if rows else None, counts


def as_arrow(rows: Sequence[dict[str, Any]]) -> "pyarrow.RecordBatch":
    """The rows as an Arrow record batch; all of them have the first one's columns."""
    import pyarrow

    schema = _schema(tuple(rows[0]))
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pyarrow.record_batch(columns, schema=schema)


def _column(values: Sequence[Any], kind: "pyarrow.DataType") -> "pyarrow.Array":
    """An Arrow array of a column's values; integers are copied through one buffer, ten times faster than one by one."""
    import numpy
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return pyarrow.StructArray.from_arrays(
            [_column([value[field.name] for value in values], field.type) for field in kind], fields=list(kind)
        )
    if not pyarrow.types.is_list(kind) or pyarrow.types.is_floating(kind.value_type):
        # with several threads Arrow's default allocator (mimalloc) takes ten times as long as everything else here
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
    """The types of a row's columns, given explicitly, since they cannot be inferred from a batch of empty lists."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    types = {
        **dict.fromkeys(("prompt", "answer", "rejected"), pyarrow.string()),
        "is_desirable": pyarrow.bool_(),
        "weight": pyarrow.float32(),
        "weights": pyarrow.list_(pyarrow.float32()),
        "earlier": pyarrow.list_(pyarrow.struct({"input_ids": ids, "labels": ids, "weight": pyarrow.float32()})),
    }
    return pyarrow.schema([(name, types.get(name, ids)) for name in names])


def key_of(spec: DatasetSpec, files: dict[str, str], data: Data, encoder: Encoder, tokenizer_json: bytes) -> str:
    """The cache key of the encoded rows, which changes with everything that changes them."""
    code = [path for pattern in CODE for path in sorted(PACKAGE.glob(pattern))]
    if plugin := format_source(spec.formatting):
        code.append(Path(plugin))
    determinants = {
        "files": files,
        "spec": {name: value for name, value in asdict(spec).items() if name not in ("origin", "description", "kind")},
        "split": data.split,
        "max_samples": data.max_samples,
        "encoder": encoder.settings(),
        "template": encoder.template.describe(),
        "tokenizer": digest(tokenizer_json),
        "code": [digest(path.read_bytes()) for path in code],
    }
    return digest(json.dumps(determinants, sort_keys=True, ensure_ascii=False).encode())[:32]


def digest(content: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def serialized(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """Everything that determines the tokenizer's ids: its tokenizer.json, its vocabulary file, or its vocabulary."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str().encode()
    file = getattr(tokenizer, "vocab_file", None)
    if file and Path(file).is_file():
        named = f"{type(tokenizer).__name__} {tokenizer.special_tokens_map}"
        if new := new_tokens_of(tokenizer):
            named += f" {[*new]}"
        return named.encode() + Path(file).read_bytes()
    return json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()


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
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    if not probabilities:
        whole = concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
        return whole, [len(part) / max(len(whole), 1) for part in parts]

    def draw_from(sources: "list[Dataset]") -> "Dataset":
        return interleave_datasets(
            sources, probabilities=list(probabilities), seed=seed, stopping_strategy="first_exhausted"
        )

    # the same draw from datasets of their index alone gives the shares; a column added to the rows would copy them all
    indices = [Dataset.from_dict({"dataset": [index] * len(part)}) for index, part in enumerate(parts)]
    drawn = list(draw_from(indices)["dataset"])
    return draw_from(list(parts)), [drawn.count(index) / max(len(drawn), 1) for index in range(len(parts))]
