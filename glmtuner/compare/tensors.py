"""Trained weights of two runs: the same bytes, or how far apart their tensors are."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from glmtuner.compare.loaded import LoadedRun
from glmtuner.config.paths import model_source
from glmtuner.errors import CheckpointError
from glmtuner.families.weight_files import tensor_shapes, weight_files
from glmtuner.launch.inputs import file_hash
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import KEPT

SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Tensors:
    """The comparison of two folders of weights."""

    files: int = 0
    tensors: int = 0  # in both, with the same shape
    differing: int = 0
    largest: float = 0.0  # the largest absolute difference of two values
    relative: float = 0.0  # the norm of the difference over the norm of the values, of the tensor where it is largest
    name: str = ""  # of the tensor with the largest difference
    unlike: list[str] = field(
        default_factory=list
    )  # tensors and files that are only in one, of another shape, or not readable

    other_bytes: int = 0  # files that differ in any byte, be it of their header

    @property
    def same_bytes(self) -> bool:
        return not (self.other_bytes or self.unlike)


def weights_in(folder: RunFolder) -> dict[str, Path]:
    """The files of a run's trained weights, by their names in its folder."""
    trained = folder.trained() or folder / KEPT
    files = sorted(path for path in trained.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(folder.path).as_posix(): path for path in files}


def starting_weights(run: LoadedRun) -> dict[str, Path] | None:
    """The files of the base model that a run started from, by name; None where they are not on this disk as they were."""
    source = Path(model_source(str(run.values.get("model.model_name_or_path"))))
    recorded = run.provenance.get("weights", {}).get("model.model_name_or_path", {})
    if not recorded or not source.is_dir():
        return None
    try:
        files = {path.name: path for path in weight_files(source)}
        return files if {name: file_hash(path) for name, path in files.items()} == recorded else None
    except (CheckpointError, OSError):
        return None


def same_content(one: Path, other: Path, chunk: int = 1 << 20) -> bool:
    """Whether two files hold the same bytes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(chunk):
            if block != second.read(chunk):
                return False
    return True


def compare_tensors(before: dict[str, Path], after: dict[str, Path]) -> Tensors:
    """The differences between files of weights with the same names; torch is imported only where bytes differ."""
    unlike = [f"{name} is only in one" for name in sorted(before.keys() ^ after.keys())]
    count = differing = other_bytes = 0
    worst = (0.0, 0.0, "")
    other_shapes: list[str] = []
    common = sorted(before.keys() & after.keys())
    for name in common:
        if same_content(before[name], after[name]):
            if name.endswith(".safetensors"):
                count += len(tensor_shapes(before[name]))
            continue
        other_bytes += 1
        if not name.endswith(".safetensors"):
            unlike.append(f"{name} has other bytes")
            continue
        try:
            shapes = tensor_shapes(before[name]), tensor_shapes(after[name])
        except CheckpointError as error:
            unlike.append(str(error))
            continue
        unlike += [f"{tensor} is only in one" for tensor in sorted(shapes[0].keys() ^ shapes[1].keys())]
        for tensor in sorted(shapes[0].keys() & shapes[1].keys()):
            if shapes[0][tensor] != shapes[1][tensor]:
                other_shapes.append(f"{tensor}, {list(shapes[0][tensor])} and {list(shapes[1][tensor])}")
                continue
            count += 1
            largest, relative = _distance(before[name], after[name], tensor)
            differing += largest > 0
            worst = max(worst, (largest, relative, tensor))
    if other_shapes:
        have = "tensor has another shape" if len(other_shapes) == 1 else "tensors have other shapes"
        unlike.append(f"{len(other_shapes):,} {have}, such as {other_shapes[0]}")
    return Tensors(len(common), count, differing, *worst, unlike, other_bytes)


def _distance(one: Path, other: Path, name: str) -> tuple[float, float]:
    """The largest absolute difference of two tensors of one shape, and the norm of the difference over that of the first one."""
    import torch
    from safetensors import safe_open

    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        before, after = first.get_tensor(name).double(), second.get_tensor(name).double()
    if torch.equal(before.nan_to_num(), after.nan_to_num()) and torch.equal(before.isnan(), after.isnan()):
        return 0.0, 0.0
    difference = before - after
    if not difference.isfinite().all():
        return math.inf, math.inf
    return difference.abs().max().item(), (difference.norm() / before.norm().clamp_min(1e-30)).item()
