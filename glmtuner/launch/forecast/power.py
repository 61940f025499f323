"""The power that the machine says it takes: RAPL's counters of the processor's packages, NVML's of the first GPU."""

import shutil
import subprocess
import time
from pathlib import Path
from threading import Event, Thread
from typing import Self

from glmtuner.distributed.accelerator import WITH_MEMORY

RAPL = Path("/sys/class/powercap")
INTERVAL_S = 0.5  # between two looks at a GPU


class Power:
    """Within it the power is measured; `watts` is then its mean, None where the machine does not tell it."""

    def __init__(self, device: str, rapl: Path = RAPL) -> None:
        # nvidia-smi knows NVIDIA's alone, but the processor's counters do not stand for other devices either
        self.rapl, self.on_gpu = rapl, device in WITH_MEMORY
        self.watts: float | None = None

    def __enter__(self) -> Self:
        self._start, self._energy = time.monotonic(), None if self.on_gpu else package_energy(self.rapl)
        self._ended, self._seen = Event(), list[float]()
        self._thread = Thread(target=self._look, daemon=True)
        if self.on_gpu:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self._start
        if self.on_gpu:
            self._ended.set()
            self._thread.join()
            self.watts = sum(self._seen) / len(self._seen) if self._seen else None
            return
        before, after = self._energy, package_energy(self.rapl)
        if before is not None and after is not None and before.keys() == after.keys() and seconds > 0:
            joules = [after[name] - before[name] for name in before]
            self.watts = sum(joules) / seconds if min(joules) >= 0 else None  # a counter that began again

    def _look(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            watts = gpu_watts()
            if watts is None:
                return
            self._seen.append(watts)


def package_energy(root: Path) -> dict[str, float] | None:
    """The joules that each processor package has taken, by RAPL; None where they cannot be read (often by root alone)."""
    try:
        packages = sorted(root.glob("intel-rapl:[0-9]*"))
        whole = [package for package in packages if package.name.count(":") == 1]  # others are parts of them
        return {package.name: int((package / "energy_uj").read_text()) / 1e6 for package in whole} or None
    except (OSError, ValueError):
        return None


def gpu_watts() -> float | None:
    """The watts of the first visible GPU, by nvidia-smi; None where it does not say."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    try:
        return float(told[0])
    except (IndexError, ValueError):
        return None
