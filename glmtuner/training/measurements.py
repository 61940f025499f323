"""What is measured in training: the sums of an objective, losses of tokens, peak memory."""

from contextlib import suppress
from pathlib import Path

import torch

from glmtuner.distributed import ranks
from glmtuner.templates.base import IGNORE_INDEX


class Measurements:
    """Sums and counts of what an objective measures in training, on this rank; a checkpoint keeps them."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # name -> sum, count; they stay on the device: no step waits to be told

    def add(self, measured: dict[str, torch.Tensor]) -> None:
        """Values of rows, by name; NaN where a row has none."""
        for name, values in measured.items():
            known = ~values.isnan()
            found = torch.stack([values.double().nansum(), known.sum().double()])
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def told(self) -> dict[str, list[float]]:
        """The sums as numbers."""
        return {name: sums.tolist() for name, sums in self.sums.items()}

    def recall(self, told: dict[str, list[float]], device: torch.device) -> None:
        """Go on with sums that were told before."""
        self.sums = {name: torch.tensor(sums, dtype=torch.double, device=device) for name, sums in told.items()}

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call; a name that counted nothing is left out."""
        everywhere, self.sums = ranks.all_gather(self.told()), {}
        found = {}
        for name in everywhere[0]:
            total, count = (sum(sums[name][place] for sums in everywhere) for place in (0, 1))
            if count:
                found[name] = total / count
        return found


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The loss of every token in nats, float32 [B, T], 0 where none is learned; a row at a time, to spare memory."""
    rows = [
        torch.nn.functional.cross_entropy(
            logits_TV[:-1].float(), labels_T[1:], ignore_index=IGNORE_INDEX, reduction="none"
        )
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.nn.functional.pad(torch.stack(rows), (1, 0))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: the GPU's, or on a CPU the resident set since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def forget_peak(device: torch.device) -> None:
    """Measure the peak from now on: the jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
