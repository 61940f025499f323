"""The hardware of a run, as provenance.json describes it."""

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import accelerator

if TYPE_CHECKING:
    import torch

CPU_NAMES = re.compile(
    r"^(?:model name|Model|cpu model|Hardware)\s*:\s*(\S.*?)\s*$", re.MULTILINE
)  # of Linux' architectures


def hardware(device: "torch.device", processes: int) -> dict[str, Any]:
    """What the run computes on: `device` (its type, such as cuda or cpu), `name`, `memory_gib` (null where that is the host's), `processes`.

    `cpu` and `cores` are the name of the host's processor, null if the system does not tell it, and the number of its logical
    cores that this process may use; `threads` is the number that torch computes with.
    """
    import torch

    cpu, memory = cpu_name(), accelerator.total_memory(device)
    return {
        "device": device.type,
        "name": accelerator.name_of(device) if memory is not None else cpu,
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "processes": processes,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def with_earlier(machine: dict[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The machines of a resumed run: those of its provenance `before`, and this one, each once."""
    return [*(each for each in before.get("hardware", []) if each != machine), machine]


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The name of the processor; None if the system does not tell it."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    named = CPU_NAMES.search(text)
    return named[1] if named else platform.processor() or None
