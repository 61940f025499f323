"""What a folder's weight files say about their tensors, without loading any and without importing torch."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from glmtuner.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
AGAIN = "download the model again, or run `git lfs pull` in a folder that git cloned"


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header; raises CheckpointError if that is damaged."""
    return _read_header(path)[0]


def file_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header; raises CheckpointError if that is damaged."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
                raise ValueError(f"{size} bytes, which are no safetensors file")
            header = json.loads(file.read(length))
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"{size} bytes of {end + 8 + length}")
        shapes = {name: tuple(int(extent) for extent in about["shape"]) for name, about in tensors.items()}
        return shapes, dict(header.get("__metadata__") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged ({reason}); {AGAIN}") from None


def shard_files(index: Path) -> list[Path]:
    """The weight files that an index names, sorted; raises CheckpointError for a damaged index and for a file that is missing
    or outside of its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{index} is damaged ({type(error).__name__}: {reason}); download it again with the weights"
        ) from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, which is not a file in its folder; it is not read, download the model again"
        )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{index.parent} is incomplete: {', '.join(missing[:4]) or 'every shard'} of {index.name} is missing; {AGAIN}"
        )
    return shards


@dataclass(frozen=True)
class Contents:
    """How many tensors and values the weight files of a folder can hold at most."""

    tensors: int
    values: int


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load from a folder; empty if it holds none. Raises CheckpointError."""
    for index, single in zip(INDEXES, ("model.safetensors", "pytorch_model.bin"), strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return shard_files(folder / index)
    return []


def contents(folder: Path) -> Contents | None:
    """What the weight files of a folder can hold; None if it holds none. Raises CheckpointError for damaged ones."""
    tensors, values = 0, 0
    files = weight_files(folder)
    for path in files:
        size = path.stat().st_size
        values += size * 2  # two 4-bit numbers a byte
        # of a .bin, each tensor is named in the pickle and in the archive
        tensors += len(tensor_shapes(path)) if path.suffix == ".safetensors" else size // 64 + 1
    return Contents(tensors, values) if files else None
