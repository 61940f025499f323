"""Batches of examples to batches of Arrow rows, by several threads or processes; a few batches are in memory at a time."""

import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain, islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example
from glmtuner.data.weights import is_weighted
from glmtuner.templates.tiktoken_engine import leave_engine, use_engine

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    import pyarrow

    Batch = tuple[pyarrow.RecordBatch | None, Counts]  # None: no example of the batch has a row
    EncodeBatch = Callable[[list[Example]], Batch]

THREADS = min(4, os.cpu_count() or 1)  # more would only wait for the GIL


def encoded_batches(
    batches: Iterator[list[Example]], encoder: Encoder, workers: int | None, engine_json: bytes | None
) -> "Generator[Batch, None, None]":
    """Each batch's rows and counts, in order, while later batches are encoded; a few batches are in memory at a time.

    By default on threads: tokenizers release the GIL, and most of the time is theirs. More processes help where there are
    many cores, but take seconds to start. `engine_json` is the tokenizer's tokenizer.json where an engine is to be used.
    """
    first = list(islice(batches, 2))
    if len(first) < 2:  # not worth a second tokenizer
        yield from (encode_batch(encoder, examples) for examples in first)
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
            return encode_batch(own, examples)
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
    return encode_batch(_worker_encoder, examples)


def encode_batch(encoder: Encoder, examples: list[Example]) -> "Batch":
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
