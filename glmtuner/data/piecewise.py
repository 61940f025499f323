"""A dataset's records to the pieces of its cache entry: what is there already is kept, and what is missing is tokenized.

Files that can be read in pieces are read by several processes, each of which reads, encodes and writes pieces of its own; several
nodes that share the cache take pieces from each other. Other files are read from their beginning by one process.
"""

import gc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.data import Loaded, SkippedRecord, examples_of
from glmtuner.data.encode import Encoder
from glmtuner.data.encoding import encode_batch, encoded_batches
from glmtuner.data.pieces import Piece, PieceRows
from glmtuner.data.record_hashes import record_hash
from glmtuner.data.records import Example
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.tokenized import COUNTS, PieceInfo, PieceWriter, piece_name
from glmtuner.distributed import ranks
from glmtuner.errors import DataError
from glmtuner.templates.tiktoken_engine import leave_engine, use_engine

if TYPE_CHECKING:
    from concurrent.futures import Future
    from multiprocessing.synchronize import Event

    from glmtuner.data.claims import Claims
    from glmtuner.data.files import LocalFiles
    from glmtuner.data.hub_sets import HubSet

FIRST = 3  # records that are kept for a look at their rows
PLAIN_TEXT = ("plain text",)  # what an encoder of documents accepts
STREAMED_RECORDS = 50_000  # of a piece of a file that is read from its beginning; a multiple of all sizes of batches
MOST_PROCESSES = 32  # by default
POLL_SECONDS, SAY_SECONDS = 1.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process needs to make pieces; `engine_json` is the tokenizer's tokenizer.json where an engine is to be used."""

    folder: Path
    spec: DatasetSpec
    encoder: Encoder
    max_bad_records: int
    engine_json: bytes | None
    source: "LocalFiles | HubSet"
    pieces: list[Piece]


class Stopped(Exception):
    """Another process has failed, and its error ends the work."""


def check_kinds(examples: Iterable[Example], encoder: Encoder, spec: DatasetSpec) -> None:
    """Raise DataError for a record of a kind that the encoder does not encode."""
    unsupported = next((example.kind for example in examples if example.kind not in encoder.accepts), None)
    if unsupported is not None:
        raise DataError(f"data.dataset={spec.name} holds {unsupported}, and {encoder.usage_hint}")


@contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection: rows form no reference cycles, and traversing so many of them again and again is slow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- pieces that are read apart -------------------------------------------------------------------------------------------


def make_piece(
    work: Work, index: int, only_count: bool = False, stopped: Callable[[], bool] = lambda: False
) -> PieceInfo:
    """Make a piece, unless it is there and intact; what became of its records.

    A piece with more broken records than may be is not kept, and of one that is `only_count` they are counted alone.
    """
    known = PieceInfo.read(work.folder, index)
    if known is not None:
        if known.is_intact(work.folder):
            return known
        say(f"{work.folder / piece_name(index)}: its rows are damaged, so its records are tokenized again")
    info, bad, columns = PieceInfo(), list[SkippedRecord](), dict[str, None]()
    rows = PieceRows(work.source.rows_of, work.pieces[index])
    examples = examples_of(work.spec, rows, bad, columns)
    with without_gc(), closing(PieceWriter(work.folder, index)) as writer:
        try:
            while batch := list(islice(examples, work.encoder.batch_size)):
                if stopped():
                    raise Stopped
                if only_count or len(bad) > work.max_bad_records:
                    continue
                check_kinds(batch, work.encoder, work.spec)
                for example in batch:
                    writer.hashes += record_hash(example)
                if not info.first and work.encoder.accepts != PLAIN_TEXT:
                    info.first = [asdict(example) for example in batch[:FIRST]]
                encoded, counts = encode_batch(work.encoder, batch)
                info.counts += counts
                writer.write(encoded)
        except DataError:
            # its message names a record by the number in the piece
            before = work.source.numbers_before(work.pieces[index])
            if any(before.values()):
                again = PieceRows(work.source.rows_of, work.pieces[index], before)
                deque(examples_of(work.spec, again, [], {}), maxlen=0)
            raise
        info.bad, info.columns, info.numbers = bad, [*columns], rows.counts
        return info if only_count or len(bad) > work.max_bad_records else writer.finish(info)


_work: Work  # of a process, sent once instead of with each piece
_stopped: "Event"


def _init_process(work: Work, stopped: "Event", parent: int) -> None:
    import signal

    global _work, _stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was interrupted tells the others
    ranks.die_with(parent)
    _work, _stopped = work, stopped
    if work.engine_json:
        use_engine(work.encoder.tokenizer, work.engine_json)


def _make_in_process(index: int, only_count: bool) -> PieceInfo:
    return make_piece(_work, index, only_count, _stopped.is_set)


def processes_for(pieces: int, asked: int | None) -> int:
    """How many processes make so many pieces: as many as `data.preprocessing_num_workers` says, else one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(pieces, asked or min(cores, MOST_PROCESSES))


def make_pieces(work: Work, claims: "Claims", asked: int | None) -> list[PieceInfo]:
    """Make all pieces together with the processes of other nodes that share the cache; what became of their records.

    Where another process has completed the entry meanwhile, the list may be incomplete.
    """
    from concurrent.futures import FIRST_COMPLETED, wait

    total, infos = len(work.pieces), dict[int, PieceInfo]()
    unchecked = {index for index in range(total) if (work.folder / piece_name(index)).is_file()}
    if unchecked:
        say(f"dataset {work.spec.name!r}: {len(unchecked)} of {total} pieces are there already and are checked")
    count = processes_for(total, asked)
    started = said = time.monotonic()
    running: dict[Future[PieceInfo], int] = {}
    with ExitStack() as stack:
        submit = _pool(work, count, stack)
        while len(infos) < total:
            bad = sum(len(info.bad) for info in infos.values())
            for index in sorted({*range(total)} - infos.keys() - {*running.values()}):
                if len(running) == count:
                    break
                if index not in unchecked and (info := PieceInfo.read(work.folder, index)):  # made on another node
                    infos[index] = info
                elif claims.take(f"piece-{index:05}"):
                    running[submit(index, bad > work.max_bad_records)] = index
            done, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED) if running else (set(), None)
            for future in done:
                index = running.pop(future)
                infos[index] = future.result()
                claims.release(f"piece-{index:05}")
            if not running and len(infos) < total:  # the other nodes have the rest
                time.sleep(POLL_SECONDS)
                if (work.folder / COUNTS).is_file():
                    break
            if (now := time.monotonic()) - said > SAY_SECONDS:
                said, records = now, sum(info.counts.records for info in infos.values())
                say(
                    f"dataset {work.spec.name!r}: {len(infos)} of {total} pieces, {records:,} records, "
                    f"{records / (now - started):,.0f} a second"
                )
    return [infos[index] for index in sorted(infos)]


def _pool(work: Work, count: int, stack: ExitStack) -> "Callable[[int, bool], Future[PieceInfo]]":
    """The function that has a piece made by one of `count` processes, or by a thread of this one; they end with the stack."""
    if count == 1:
        from concurrent.futures import ThreadPoolExecutor

        if work.engine_json:
            use_engine(work.encoder.tokenizer, work.engine_json)
            stack.callback(leave_engine, work.encoder.tokenizer)
        thread, ended = ThreadPoolExecutor(1), threading.Event()
        stack.callback(thread.shutdown, cancel_futures=True)
        stack.callback(ended.set)
        return lambda index, only_count: thread.submit(make_piece, work, index, only_count, ended.is_set)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process has a core
    context = get_context("spawn")
    stopped = context.Event()
    pool = ProcessPoolExecutor(count, context, initializer=_init_process, initargs=(work, stopped, os.getpid()))
    stack.callback(pool.shutdown, cancel_futures=True)
    stack.callback(stopped.set)
    return lambda index, only_count: pool.submit(_make_in_process, index, only_count)


# -- files that are read from their beginning -----------------------------------------------------------------------------


def make_streamed(work: Work, loaded: Loaded, asked: int | None) -> list[PieceInfo]:
    """Make the pieces of the records that are read one after the other; all broken records are those of `loaded`.

    Pieces that are there are read, and not encoded again. Of the last info are the columns and the first examples.
    """
    infos: list[PieceInfo] = []
    owners: deque[int] = deque()  # the piece of each batch that is being encoded
    hashes: dict[int, bytearray] = {}
    first: list[dict[str, Any]] = []
    batches_of_piece = max(STREAMED_RECORDS // work.encoder.batch_size, 1)
    stored: dict[int, PieceInfo] = {}

    def batches() -> Iterator[list[Example]]:
        """The batches to be encoded; once there are too many broken records, they are only counted."""
        number = 0
        while batch := list(islice(loaded.examples, work.encoder.batch_size)):
            piece, number = number // batches_of_piece, number + 1
            if len(loaded.bad) > work.max_bad_records:
                continue
            check_kinds(batch, work.encoder, work.spec)
            if not first and work.encoder.accepts != PLAIN_TEXT:
                first.extend(asdict(example) for example in batch[:FIRST])
            if piece not in hashes:
                hashes[piece] = bytearray()
                known = PieceInfo.read(work.folder, piece)
                if known is not None and known.is_intact(work.folder):
                    stored[piece] = known
            for example in batch:
                hashes[piece] += record_hash(example)
            if piece not in stored:
                owners.append(piece)
                yield batch

    with without_gc(), ExitStack() as stack:
        writer: PieceWriter | None = None
        info = PieceInfo()

        def finish() -> None:
            if writer is not None and len(loaded.bad) <= work.max_bad_records:
                writer.hashes = hashes[writer.index]
                stored[writer.index] = writer.finish(info)

        encoded = stack.enter_context(closing(encoded_batches(batches(), work.encoder, asked, work.engine_json)))
        for rows, counts in encoded:
            index = owners.popleft()
            if writer is None or writer.index != index:
                finish()
                writer, info = stack.enter_context(closing(PieceWriter(work.folder, index))), PieceInfo()
            info.counts += counts
            writer.write(rows)
        finish()
    infos = [stored[index] for index in sorted(stored)]
    if infos:
        infos[-1].first, infos[-1].columns = first, [*loaded.columns]
    return infos
