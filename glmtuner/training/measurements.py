"""Metrics of a training: means of an objective's metrics, losses of tokens, peak memory."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from glmtuner.distributed import ranks
from glmtuner.run_folder.files import strict_json
from glmtuner.templates.base import IGNORE_INDEX


class Measurements:
    """Running sums and counts of an objective's metrics on this rank; checkpoints keep them."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # metric -> [sum, count] on the device, so that no step waits for it

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add a batch: metric -> its value for each row, NaN where a row has none."""
        for name, values in metrics.items():
            has_value = ~values.isnan()
            batch_sums = torch.stack([values.double().nansum(), has_value.sum().double()])
            self.sums[name] = self.sums[name] + batch_sums if name in self.sums else batch_sums

    def state_dict(self) -> dict[str, list[float]]:
        """Metric -> [sum, count]."""
        return {name: sums.tolist() for name, sums in self.sums.items()}

    def load_state_dict(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Continue from the sums that `state_dict` returned."""
        self.sums = {name: torch.tensor(sums, dtype=torch.double, device=device) for name, sums in state.items()}

    def reduce_and_reset(self) -> dict[str, float]:
        """The means over all ranks since the last call; a metric without a value is left out."""
        sums_by_rank, self.sums = ranks.all_gather(self.state_dict()), {}
        means = {}
        for name in sums_by_rank[0]:
            total, count = (sum(sums[name][index] for sums in sums_by_rank) for index in (0, 1))
            if count:
                means[name] = total / count
        return means


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The loss of every token in nats, float32 [B, T], 0 where the label is masked; computed row by row to save memory."""
    rows = [
        torch.nn.functional.cross_entropy(
            logits_TV[:-1].float(), labels_T[1:], ignore_index=IGNORE_INDEX, reduction="none"
        )
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.nn.functional.pad(torch.stack(rows), (1, 0))


def sample_losses(model: torch.nn.Module, batch: dict[str, Any], *, chunked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every sample: the loss in nats, summed over its labelled tokens, float32 [B], and their number [B].

    `chunked`: the model computes its loss by glmtuner/kernels/chunked_loss.py.
    """
    labels_BT = batch["labels"]
    if chunked:
        losses_BT = model(**batch, each=True).loss
    else:
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        losses_BT = token_losses(model(**unlabelled).logits, labels_BT)
    is_labelled_BT = torch.nn.functional.pad(labels_BT[:, 1:].ne(IGNORE_INDEX), (1, 0))
    if "segments" not in batch:
        return losses_BT.sum(1), is_labelled_BT.sum(1)
    lengths = batch["segments"].lengths  # one row [1, T] holds the samples
    return segment_sums(losses_BT[0], lengths), segment_sums(is_labelled_BT[0], lengths)


def segment_sums(values_T: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The sum of each segment, [number of segments]."""
    return torch.stack([segment.sum() for segment in torch.split(values_T, list(lengths))])


def losses_text(columns: dict[str, torch.Tensor]) -> str:
    """The content of losses.jsonl: a line for each record, from the records' values by metric; a NaN is left out."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [
        {"index": index, **{name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)}}
        for index, row in enumerate(rows)
    ]
    return "".join(f"{strict_json(line)}\n" for line in lines)


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process in GiB: allocated on the GPU, or the resident set on a CPU, since `forget_peak`.

    Without /proc (Windows, macOS) the resident set's peak is that since the process started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows, in bytes
    if peak is not None:
        return float(peak) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS, in bytes


def forget_peak(device: torch.device) -> None:
    """Measure the peak from now on: the jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
