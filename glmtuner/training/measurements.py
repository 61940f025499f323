"""Metrics of a training: means of an objective's metrics, losses of tokens, peak memory."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from glmtuner.data.segments import Segments
from glmtuner.distributed import accelerator, ranks
from glmtuner.distributed.exchange import sum_over_row
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
            logits_TV[: len(labels_T) - 1].float(), labels_T[1:], ignore_index=IGNORE_INDEX, reduction="none"
        )
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.nn.functional.pad(torch.stack(rows), (1, 0))


def sample_losses(model: torch.nn.Module, batch: dict[str, Any], *, chunked: bool) -> dict[str, torch.Tensor]:
    """Of every sample: the `loss` in nats, summed over its labelled tokens, float32 [B], and their number `tokens` [B].

    In a batch with weights each token's loss is multiplied by its own; `weight` is then the sum of the weights, float32 [B].
    `chunked`: the model computes its loss by glmtuner/kernels/chunked_loss.py.
    """
    labels_BT, weights_BT = batch["labels"], batch.get("weights")
    batch = {name: value for name, value in batch.items() if name != "weights"}
    if chunked:
        losses_BT = model(**batch, each=True).loss
    else:
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        losses_BT = token_losses(model(**unlabelled).logits, labels_BT)
    is_labelled_BT = torch.nn.functional.pad(labels_BT[:, 1:].ne(IGNORE_INDEX), (1, 0))
    summed = {"loss": losses_BT, "tokens": is_labelled_BT}
    if weights_BT is not None:
        summed |= {"loss": losses_BT * weights_BT, "weight": is_labelled_BT * weights_BT}
    if "segments" not in batch:
        return {name: values_BT.sum(1) for name, values_BT in summed.items()}
    segments: Segments = batch["segments"]  # one row [1, T] holds the samples
    if segments.parts:
        return {name: sums_over_parts(values_BT[0], segments) for name, values_BT in summed.items()}
    return {name: segment_sums(values_BT[0], segments.lengths) for name, values_BT in summed.items()}


def sums_over_parts(values_P: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The sum of each segment over the ranks that share the row, of values at the places of this rank's labels."""
    first, end = segments.part(segments.own)
    values_T = values_P.new_zeros(sum(segments.lengths) + 1)
    values_T[first : end + 1] = values_P
    return sum_over_row(segment_sums(values_T[:-1], segments.lengths), len(segments.parts))


def segment_sums(values_T: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The sum of each segment, [number of segments]."""
    return torch.stack([segment.sum() for segment in torch.split(values_T, list(lengths))])


def losses_text(columns: dict[str, torch.Tensor], parts: Mapping[str, slice] = MappingProxyType({})) -> str:
    """The content of losses.jsonl: a line for each record, from the records' values by metric; a NaN is left out.

    `parts` are the words for the datasets, if there are several, and where their records are.
    """
    datasets = {index: {"dataset": label} for label, part in parts.items() for index in range(part.start, part.stop)}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [{name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)} for row in rows]
    numbered = [{"index": index, **datasets.get(index, {}), **line} for index, line in enumerate(lines)]
    return "".join(f"{strict_json(line)}\n" for line in numbered)


def means_of(columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """The means of the metrics, from the records' values by metric; a metric without any value is left out.

    The loss of a record is a sum over its tokens, or over their weights, if there are the columns `tokens` and `weight`; its mean
    is that over all tokens, or over all weights.
    """
    divisor = columns.get("weight", columns.get("tokens"))
    others = {name: column for name, column in columns.items() if name not in ("tokens", "weight", "loss")}
    means = {name: column.nanmean().item() for name, column in others.items() if not column.isnan().all()}
    loss = columns["loss"].nanmean() if divisor is None else columns["loss"].sum() / divisor.sum()
    return {"loss": loss.item(), **means}


def means_of_parts(
    columns: dict[str, torch.Tensor],
    parts: Mapping[str, slice],
    derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {},
) -> dict[str, float]:
    """`means_of` all records and of each part, whose word stands before the metric, with the metrics that are `derived` of each."""
    means = means_of(columns)
    means |= derived(means)
    for label, part in parts.items():
        own = means_of({name: column[part] for name, column in columns.items()})
        means |= {f"{label}_{name}": value for name, value in (own | derived(own)).items()}
    return means


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process in GiB: allocated on the GPU, or the resident set on a CPU, since `forget_peak`.

    Without /proc (Windows, macOS) the resident set's peak is that since the process started.
    """
    if (allocated := accelerator.peak_memory(device)) is not None:
        return allocated / 2**30
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
    accelerator.reset_peak_memory(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
