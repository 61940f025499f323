"""Names in `data.dataset` -> encoded, cached, split and mixed datasets, with their counts and checksums.

The cache is keyed by content: checksums of the files, the entry, the tokenizer, the template, the lengths, and the code
that encodes. The same data is tokenized once, however many runs use it (LLaMA-Factory#3939).
"""

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Data
from glmtuner.config.paths import PACKAGE, PACKAGE_DATA, cache_root
from glmtuner.console import say
from glmtuner.data import DatasetSpec, Loaded, SkippedRecord, check_bad_record_limit, load, without_good_records
from glmtuner.data.claims import Claims
from glmtuner.data.columns import description
from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder
from glmtuner.data.formats import format_source
from glmtuner.data.piecewise import POLL_SECONDS, Work, make_pieces, make_streamed
from glmtuner.data.records import Example, Message
from glmtuner.data.tokenized import (
    PieceInfo,
    complete_entry,
    hashes_of_entry,
    read_entry,
    remove_partial,
    rows_of_entry,
    tokenized_folder,
)
from glmtuner.data.weights import without_weights
from glmtuner.distributed import ranks
from glmtuner.errors import DataError
from glmtuner.templates.new_tokens import new_tokens_of
from glmtuner.templates.tool_calls import ToolCall

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ENGINE_BYTES_PER_TOKEN = 50  # of data per token of the vocabulary; an engine must first read and prove the vocabulary
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
    folder: Path  # the cache's entry
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
    from filelock import FileLock

    loaded = load(
        spec, dataset_dir=data.dataset_dir, package_data=PACKAGE_DATA, split=data.split, max_samples=data.max_samples,
        cache_dir=hub_cache, token=token,
    )  # fmt: skip
    tokenizer_json = serialized(encoder.tokenizer)
    folder = tokenized_folder(key_of(spec, loaded.files, data, encoder, tokenizer_json))
    if data.overwrite_cache and ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    if (cached := read_entry(folder)) is None:
        locks = cache_root() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        # one process of each host encodes; the host's other ranks and jobs wait for it
        with FileLock(locks / f"{folder.name}.{socket.gethostname()}.lock"):
            if (cached := read_entry(folder)) is None:
                cached = _encode_into(folder, loaded, encoder, data, spec, tokenizer_json)
    bad = [SkippedRecord(**record) for record in cached["bad"]]
    check_bad_record_limit(bad, data.max_bad_records)
    say(f"dataset {spec.name!r}: {description(spec, cached['columns'])}")
    rows = rows_of_entry(folder, cached)
    first = [example_of(saved) for saved in cached["first"]]
    counts = Counts(**cached["counts"])
    if not counts.weighted:
        rows = without_weights(rows)
    hashes = hashes_of_entry(folder, cached)
    return Prepared(spec, rows, counts, loaded.files, bad, cached["columns"], folder, first, hashes)


def _encode_into(
    folder: Path, loaded: Loaded, encoder: Encoder, data: Data, spec: DatasetSpec, tokenizer_json: bytes
) -> dict[str, Any]:
    """Encode what is missing of the entry, alone or together with other nodes, and complete it; what is known of its records."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        remove_partial(folder)
        large = loaded.size > ENGINE_BYTES_PER_TOKEN * len(encoder.tokenizer)
        pieces = loaded.source.pieces() if loaded.max_examples is None else []
        work = Work(
            folder=folder, spec=spec, encoder=encoder, max_bad_records=data.max_bad_records, source=loaded.source, pieces=pieces,
            engine_json=tokenizer_json if large and data.tiktoken_engine else None,
        )  # fmt: skip
        asked = data.preprocessing_num_workers
        with Claims(folder) as claims:
            if len(pieces) > 1:
                infos = make_pieces(work, claims, asked)
            else:
                while not claims.take("all"):  # another node reads the records
                    time.sleep(POLL_SECONDS)
                    if (cached := read_entry(folder)) is not None:
                        return cached
                infos = make_streamed(work, loaded, asked)
            if (cached := read_entry(folder)) is not None:  # another node was faster
                return cached
            known = _known_of(infos, loaded, data, spec, in_pieces=len(pieces) > 1)
            complete_entry(folder, infos, known)
    except BrokenExecutor:
        raise DataError(
            f"data.dataset={spec.name}: a process that tokenizes was killed, perhaps for lack of memory; the finished pieces are kept: "
            f"type the same command again, or with fewer processes, such as data.preprocessing_num_workers=1"
        ) from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # nothing of it was finished
    remaining = read_entry(folder)
    if remaining is None:
        raise DataError(f"{folder}: files of it were removed while they were written; type the same command again")
    return remaining


def _known_of(
    infos: Sequence[PieceInfo], loaded: Loaded, data: Data, spec: DatasetSpec, *, in_pieces: bool
) -> dict[str, Any]:
    """What is known of the records of all pieces. Raises DataError if too many are broken, or nothing is left to learn."""
    counts = sum((info.counts for info in infos), Counts())
    bad, columns = loaded.bad, [*loaded.columns]
    if in_pieces:
        bad, columns = _numbered(infos), list(dict.fromkeys(column for info in infos for column in info.columns))
    check_bad_record_limit(bad, data.max_bad_records)
    if in_pieces and not sum(len(info.first) + info.counts.records for info in infos) and not columns:
        raise without_good_records(spec, bad) if bad else loaded.source.without_records()
    if counts.unrendered and counts.unrendered + len(bad) > data.max_bad_records:
        raise DataError(
            f"data.dataset={spec.name}: of the last answers of {counts.unrendered} records the chat template renders nothing, so "
            f"that nothing would be learned, and data.max_bad_records={data.max_bad_records}; choose another template with "
            f"model.template=, mend the records, or type data.max_bad_records={counts.unrendered + len(bad)}"
        )
    counts.bad_records = len(bad)
    if not any(name.endswith(".arrow") for info in infos for name in info.files):
        raise DataError(f"data.dataset={spec.name}: nothing is left to learn from: {counts.summary()}")
    first = next((info.first for info in infos if info.first), [])
    return {
        "counts": asdict(counts), "bad": [asdict(record) for record in bad], "columns": columns, "first": first,
    }  # fmt: skip


def _numbered(infos: Sequence[PieceInfo]) -> list[SkippedRecord]:
    """The broken records of all pieces, with their numbers in their files."""
    before: dict[str, int] = {}
    found = []
    for info in infos:
        found += [replace(record, number=record.number + before.get(record.source, 0)) for record in info.bad]
        for label, count in info.numbers.items():
            before[label] = before.get(label, 0) + count
    return found


def example_of(saved: dict[str, Any]) -> Example:
    """The example that `asdict` and JSON made this of."""
    turns = [
        Message(role, content, learned, reasoning, tuple(ToolCall(**call) for call in calls), call_id, weight)
        for role, content, learned, reasoning, calls, call_id, weight in saved["messages"]
    ]
    calls = {name: tuple(ToolCall(**call) for call in saved[name]) for name in ("chosen_calls", "rejected_calls")}
    return Example(**{**saved, "messages": turns, "tools": tuple(saved["tools"]), **calls})


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
