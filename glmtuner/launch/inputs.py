"""What a run is computed from besides its configuration and its data: weights, tokenizer, machine; each as provenance.json has it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from glmtuner.config.paths import cache_root, model_source
from glmtuner.config.schema import Run
from glmtuner.data.prepare import serialized
from glmtuner.distributed import accelerator, ranks
from glmtuner.families.weight_files import weight_files
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import KEPT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BLOB = re.compile("[0-9a-f]{64}")  # how the hub's cache names a weight file: by its SHA-256
_hashing = Lock()


def weight_hashes(run: Run) -> dict[str, dict[str, str]]:
    """The SHA-256 of every weight file that the run starts from, by the key that names the folder and by the file's name.

    Why a file cannot be read stands in its place: the run did not need it, since loading would have ended it.
    """

    def content_of(path: Path) -> str:
        try:
            return file_hash(path)
        except OSError as error:
            return f"unreadable ({os.strerror(error.errno or 0).lower()})"

    return {key: {path.name: content_of(path) for path in files} for key, files in starting_weights(run)}


def start_hashing(run: Run) -> Thread:
    """A thread that hashes the weight files while they are loaded, so that `weight_hashes` need not."""

    def hash_all() -> None:
        with suppress(Exception):  # weight_hashes raises it again
            weight_hashes(run)

    thread = Thread(target=hash_all, daemon=True)
    thread.start()
    return thread


def starting_weights(run: Run) -> Iterator[tuple[str, list[Path]]]:
    """The weight files that a run starts from, by the key of the configuration that names their folder."""
    model = run.model
    yield "model.model_name_or_path", base_files(model_source(model.model_name_or_path), run)
    for index, checkpoint in enumerate(model.checkpoint_dir):
        yield f"model.checkpoint_dir[{index}]", files_of_checkpoint(Path(checkpoint).expanduser())
    if model.reward_model:
        source = model_source(model.reward_model)
        yield "model.reward_model", files_of_checkpoint(Path(source)) or base_files(source, run)
    resumed = run.trainer.resume_from_checkpoint
    if resumed and Path(resumed).expanduser().is_dir():
        yield "trainer.resume_from_checkpoint", files_of_checkpoint(Path(resumed).expanduser())


def base_files(source: str, run: Run) -> list[Path]:
    """The weight files of a model in a folder, or of one of the hub in its cache; empty where it has none yet."""
    if Path(source).is_dir():
        return weight_files(Path(source))
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name of the hub
        options: dict[str, Any] = {"revision": run.model.model_revision, "cache_dir": run.model.cache_dir}
        config = try_to_load_from_cache(source, "config.json", **options)
        return weight_files(Path(config).parent) if isinstance(config, str) else []
    return []


def files_of_checkpoint(folder: Path) -> list[Path]:
    """The weight files of a run folder, of a checkpoint in one, or of an adapter."""
    if not folder.is_dir():
        return []
    kept = folder / KEPT
    folder = RunFolder(folder).trained() or (kept if kept.is_dir() else folder)
    return weight_files(folder) or sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, which is computed once: a cache knows the file by its size, its times and its place on the disk."""
    real = Path(os.path.realpath(path))  # of a loop of links stat() tells, by an OSError
    if BLOB.fullmatch(real.name) and real.parent.name == "blobs":
        return real.name
    status = real.stat()
    known = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    entry = cache_root() / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    with _hashing:  # of two threads, the second finds what the first one computed
        with suppress(OSError, ValueError, KeyError, TypeError):
            cached = json.loads(entry.read_text(encoding="utf-8"))
            if cached["file"] == known and BLOB.fullmatch(cached["sha256"]):
                return str(cached["sha256"])
        with real.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with suppress(OSError):  # a cache that cannot be written is no reason to fail
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = entry.with_suffix(f".{os.getpid()}")  # jobs of a sweep hash the same file at the same time
            partial.write_text(json.dumps({"path": str(real), "file": known, "sha256": sha256}), encoding="utf-8")
            partial.replace(entry)
    return sha256


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The SHA-256 of everything that determines the tokenizer's ids; how a batch was padded or truncated last does not."""
    content = serialized(tokenizer)
    with suppress(ValueError, TypeError):
        about = json.loads(content)
        if isinstance(about, dict):
            content = json.dumps(about | {"padding": None, "truncation": None}, ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest()


def machine(device: "torch.device") -> dict[str, Any]:
    """The device with its name, the number of ranks, and what decides the order in which a CPU adds up."""
    import torch

    return {
        "device": accelerator.name_of(device),
        "ranks": ranks.world_size(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
