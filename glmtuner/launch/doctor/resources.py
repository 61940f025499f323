"""What `doctor` finds about memory, disks and processors."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmtuner.launch.doctor.ask import one_line
from glmtuner.launch.doctor.findings import OK, PROBLEM, Finding
from glmtuner.launch.hardware import cpu_name

GIB = 2**30
LEAST_DISK = 1 * GIB  # for a checkpoint of a small model
LEAST_RAM = 1 * GIB  # for the libraries alone


def check_memory() -> Finding:
    """The memory of the host and its control group, and the disks of outputs/ and of the caches."""
    import psutil

    host = psutil.virtual_memory()
    limit = memory_limit()
    total, free = host.total, host.available
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB RAM free"
    wrong: list[str] = []
    fixes: list[str] = []
    if limit is not None and limit < total:
        text += f", {limit / GIB:.1f} GiB of it allowed by the control group"
        free = min(free, limit)
    if free < LEAST_RAM:
        wrong.append("a run's libraries alone need 1 GiB")
        fixes.append("free to see what is used, and end other programs")
    needed = False
    disks: dict[int, list[str]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    facts: dict[str, Any] = {"ram_total": host.total, "ram_free": host.available, "limit": limit, "disks": {}}
    for name, path in places().items():
        try:
            parent = existing(path)
            usage = shutil.disk_usage(parent)
            device = parent.stat().st_dev
            facts["disks"][name] = {"path": str(path), "free": usage.free, "total": usage.total}
            disks.setdefault(device, []).append(name)
            sizes[device] = (usage.free, usage.total)
            with tempfile.TemporaryFile(dir=parent) as file:
                file.write(b"\0")
        except OSError as error:
            wrong.append(f"{name} cannot be written ({one_line(error)})")
            fixes.append(f"ls -ld {path}" if name == "outputs/" else f"export {name.split('=')[0].split()[0]}=FOLDER")
            needed |= name != "hub cache"
    for device, names in disks.items():
        text += (
            f"; {sizes[device][0] / GIB:.1f} of {sizes[device][1] / GIB:.1f} GiB of disk free for {', '.join(names)}"
        )
        if sizes[device][0] < LEAST_DISK:
            wrong.append(f"the disk of {names[0]} is nearly full")
            fixes.append("df -h, and free some space")
    return Finding(
        "memory", PROBLEM if wrong else OK, "; ".join([text, *wrong]), ", or ".join(dict.fromkeys(fixes)), needed, facts
    )


def places() -> dict[str, Path]:
    """The folders that runs write, by what they are called."""
    from glmtuner.config.paths import cache_root

    cache = cache_root().expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    named = "GLMTUNER_CACHE" + (f"={cache}" if os.environ.get("GLMTUNER_CACHE") else f" (unset: {cache})")
    return {"outputs/": Path("outputs").absolute(), named: cache, "hub cache": hub}


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists; raises NotADirectoryError if that is a file."""
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path


def memory_limit(root: Path = Path("/")) -> int | None:
    """The memory in bytes that this process' control groups allow, the smallest of them; None without a limit."""
    values = [*group_values("memory", "memory.max", root), *group_values("memory", "memory.limit_in_bytes", root)]
    return min((int(text) for text in values if text.isdigit() and int(text) < 1 << 60), default=None)


def processor_limit(root: Path = Path("/")) -> float | None:
    """The processors that this process' control groups allow, as a number; None without a limit."""
    limits = [
        int(quota) / int(period)
        for text in group_values("cpu", "cpu.max", root)
        for quota, _, period in [text.partition(" ")]
        if quota.isdigit() and period.isdigit()
    ]
    quotas, periods = group_values("cpu", "cpu.cfs_quota_us", root), group_values("cpu", "cpu.cfs_period_us", root)
    limits += [int(quota) / int(period) for quota, period in zip(quotas, periods, strict=False) if quota.isdigit()]
    return min(limits, default=None)


def group_values(controller: str, name: str, root: Path) -> Iterator[str]:
    """What a file of the control groups that this process is in holds, from its own group up; nothing where there is none."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / place.lstrip("/")
        while True:
            with suppress(OSError, ValueError):
                yield (folder / name).read_text(encoding="utf-8").strip()
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def check_cpu(probed: Mapping[str, Any]) -> Finding:
    """The processors that this process may use, and the threads that torch computes with."""
    cores = os.cpu_count() or 1
    usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = processor_limit()
    text = f"{cpu_name() or 'unknown processor'}, {usable} of {cores} logical processors usable"
    if quota is not None and quota < usable:
        text += f", {quota:g} of them by the control group's quota"
        usable = quota
    asked, threads = os.environ.get("OMP_NUM_THREADS"), probed.get("threads")
    text += f"; torch computes with {threads if threads is not None else '?'} threads"
    text += f" (OMP_NUM_THREADS={asked})" if asked else " (OMP_NUM_THREADS is not set)"
    facts = {"logical": cores, "usable": usable, "quota": quota, "threads": threads}
    if isinstance(threads, int) and threads > max(usable, 1):
        text += ": more threads than processors slow each other down"
        return Finding("CPU", PROBLEM, text, f"export OMP_NUM_THREADS={max(int(usable), 1)}", facts=facts)
    return Finding("CPU", OK, text, facts=facts)
