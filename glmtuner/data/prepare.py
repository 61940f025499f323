"""Names in `data.dataset` -> encoded, cached, split and mixed datasets, with their counts and checksums.

The cache is keyed by content: checksums of the files, the entry, the tokenizer, the template, the lengths, and the code
that encodes. The same data is tokenized once, however many runs use it (LLaMA-Factory#3939).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner import ranks
from glmtuner.config.paths import PACKAGE, PACKAGE_DATA
from glmtuner.config.schema import Data
from glmtuner.data import BadLine, DatasetSpec, load, refuse
from glmtuner.data.encode import Counts, Encoder
from glmtuner.data.read import read
from glmtuner.data.records import Example
from glmtuner.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

BATCH = 1000
CODE = (
    "data/encode.py",
    "data/pairs.py",
    "data/feedback.py",
    "data/blocks.py",
    "data/prompts.py",
    "data/prepare.py",
    "data/__init__.py",
    "data/records.py",
    "data/read.py",
    "data/catalog.py",
    "families/template.py",
    "models/tokenization_chatglm.py",
)


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
    """The dataset's rows, from the cache when it has them."""
    from datasets import load_from_disk
    from filelock import FileLock

    options = {
        "dataset_dir": data.dataset_dir, "package_data": PACKAGE_DATA, "split": data.split,
        "cache_dir": hub_cache, "token": token,
    }  # fmt: skip
    files = read(spec, **options).fingerprint()
    folder = cache_root() / "tokenized" / key_of(spec, files, data, encoder)
    if data.overwrite_cache and ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):  # one process encodes; ranks and other jobs wait for it
        if not (folder / "counts.json").is_file():
            loaded = load(spec, max_samples=data.max_samples, **options)
            refuse(loaded.bad, data.max_bad_records)
            _encode_into(folder, loaded.examples, loaded.bad, encoder, data, spec)
    kept = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    bad = [BadLine(**line) for line in kept["bad"]]
    refuse(bad, data.max_bad_records)
    return Prepared(spec, load_from_disk(str(folder)), Counts(**kept["counts"]), files, bad)


def _encode_into(
    folder: Path, examples: list[Example], bad: list[BadLine], encoder: Encoder, data: Data, spec: DatasetSpec
) -> None:
    """Encode and write the rows, to a temporary name first."""
    from datasets import Dataset, concatenate_datasets

    unfit = next((example.kind for example in examples if example.kind not in encoder.takes), None)
    if unfit is not None:
        raise DataError(f"data.dataset={spec.name} holds {unfit}, and {encoder.wanted}")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    counts, parts = Counts(), []
    for rows, found in _encoded(batches, encoder, data.preprocessing_num_workers):
        counts += found
        parts.append(Dataset.from_list(rows, features=_features(rows[0])))
    counts.bad_records = len(bad)
    concatenate_datasets(parts).save_to_disk(str(partial), max_shard_size="500MB")
    (partial / "counts.json").write_text(json.dumps({"counts": asdict(counts), "bad": [asdict(line) for line in bad]}))
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # it is there already, with the same content


def _features(row: dict[str, Any]) -> Any:
    """The types of a row's columns, stated, since a batch of empty lists would have none."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    types = {
        **dict.fromkeys(("prompt", "answer", "rejected"), Value("string")),
        "is_desirable": Value("bool"),
        "earlier": List({"input_ids": ids, "labels": ids}),
    }
    return Features({name: types.get(name, ids) for name in row})


def _encoded(batches: list[list[Example]], encoder: Encoder, workers: int | None) -> Any:
    """Each batch's rows and counts, in order, on several processes when asked for."""
    if not workers or workers == 1 or len(batches) == 1:
        yield from map(encoder.encode, batches)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    with ProcessPoolExecutor(min(workers, len(batches)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(encoder.encode, batches)


def key_of(spec: DatasetSpec, files: dict[str, str], data: Data, encoder: Encoder) -> str:
    """A name for the encoded rows that changes with anything that changes them."""
    about = {
        "files": files,
        "spec": {name: value for name, value in asdict(spec).items() if name not in ("origin", "description", "kind")},
        "split": data.split,
        "max_samples": data.max_samples,
        "encoder": encoder.settings(),
        "template": encoder.template.describe(),
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "code": [digest((PACKAGE / name).read_bytes()) for name in CODE]
        + [digest(path.read_bytes()) for path in sorted((PACKAGE / "data/formats").glob("*.py"))],
    }
    return digest(json.dumps(about, sort_keys=True, ensure_ascii=False).encode())[:32]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of what the tokenizer does: its backend's own description, its file, or its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return digest(backend.to_str().encode())
    file = getattr(tokenizer, "vocab_file", None)
    if file and Path(file).is_file():
        return digest(f"{type(tokenizer).__name__} {tokenizer.special_tokens_map}".encode() + Path(file).read_bytes())
    return digest(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode())


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
    batches = rows.select_columns(["earlier"]).with_format("arrow").iter(BATCH)
    return any(len(batch["earlier"].combine_chunks().flatten()) for batch in batches)


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
        whole = concatenate_datasets(list(parts))
        return whole, [len(part) / max(len(whole), 1) for part in parts]

    def drawn_from(sources: "list[Dataset]") -> "Dataset":
        return interleave_datasets(
            sources, probabilities=list(probabilities), seed=seed, stopping_strategy="first_exhausted"
        )

    # The same draw of bare numbers tells the shares: a column added to the rows would copy all of them.
    numbers = [Dataset.from_dict({"number": [place] * len(part)}) for place, part in enumerate(parts)]
    origins = list(drawn_from(numbers)["number"])
    return drawn_from(list(parts)), [origins.count(place) / max(len(origins), 1) for place in range(len(parts))]
