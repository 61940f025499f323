"""The GPUs and NPUs that processes of this machine can have, before torch is imported."""

import importlib.util
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

VARIABLES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
INTEL = "0x8086"


def visible_gpus() -> list[str]:
    """The GPUs or NPUs that a child process would see, by the names that its environment variable gives them."""
    return of_this_machine()[1]


def only(gpu: str) -> dict[str, str]:
    """The environment variable that lets a child process see this one of `visible_gpus` alone."""
    return {VARIABLES[of_this_machine()[0]]: gpu}


def of_this_machine(root: Path = Path("/")) -> tuple[str, list[str]]:
    """The type of the accelerators that torch would compute on, and their names; of several types, the first that accelerate takes."""
    for kind, found in (("npu", npus), ("cuda", cuda_gpus), ("xpu", xpus)):
        if names := found(root):
            return kind, names
    return "cuda", []


def named(kind: str) -> list[str] | None:
    """The names in the type's environment variable; None if that is not set."""
    visible = os.environ.get(VARIABLES[kind])
    return None if visible is None else [name for name in visible.split(",") if name.strip()]


def cuda_gpus(_: Path) -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists."""
    if (names := named("cuda")) is not None:
        return names
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def npus(root: Path) -> list[str]:
    """The Ascend chips of ASCEND_RT_VISIBLE_DEVICES, or all of /dev/davinci*; none without torch_npu, which computes on them."""
    if importlib.util.find_spec("torch_npu") is None:
        return []
    chips = sorted(int(found[1]) for path in (root / "dev").glob("davinci*") if (found := CHIP.fullmatch(path.name)))
    names = named("npu")
    return names if names is not None and chips else [str(chip) for chip in chips]


CHIP = re.compile(r"davinci(\d+)")


def xpus(root: Path) -> list[str]:
    """The GPUs of ZE_AFFINITY_MASK, or Intel's among the system's; none unless torch is built for them."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return []
    if not version.endswith("+xpu"):
        return []
    vendors = (root / "sys/class/drm").glob("renderD*/device/vendor")
    count = sum(path.read_text(encoding="ascii").strip() == INTEL for path in vendors)
    names = named("xpu")
    return names if names is not None and count else [str(number) for number in range(count)]
