"""The device that this process computes on, and what it can do: an NPU (through torch_npu), CUDA or ROCm, an XPU, Metal, the CPU.

Only this module asks torch about devices by their type. torch's module of a type (torch.cuda, torch.npu, torch.xpu, torch.mps) is asked, and
not torch.accelerator: that one knows the type alone that torch was built for, and its memory functions end in an assertion where the backend
has no allocator of torch's own kind. torch is imported when a function is called.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.console import say

if TYPE_CHECKING:
    import torch

# in accelerate's order, which decides where the Trainer computes; ROCm's GPUs are torch's cuda
TYPES = ("npu", "cuda", "xpu", "mps")
# these have memory of their own, streams and collectives; Apple's GPU shares the host's memory
WITH_MEMORY = ("npu", "cuda", "xpu")
COLLECTIVES = {"npu": "hccl", "cuda": "nccl", "xpu": "xccl"}
# What is written for CUDA, or was compared on CUDA alone, and is left out on other devices.
CUDA_ONLY = {
    "graphs": "replayed decoding steps are CUDA graphs",
    "flash": "torch's attention of packed rows is FlashAttention, which torch has for CUDA",
    "triton": "Liger's kernels were compared with transformers' on CUDA, or on a CPU in Triton's interpreter",
    "tf32": "TensorFloat-32 is a mode of NVIDIA's tensor cores",
}


@cache
def torch_npu_problem() -> str:
    """Why torch_npu cannot be imported, which adds torch.npu; empty once it is."""
    if importlib.util.find_spec("torch_npu") is None:
        return "is not installed"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # of the driver's libraries, whatever it raises
        return f"does not load ({' '.join(str(error).split())[:200]})"
    return ""


def unused_npu(devices: Path = Path("/dev")) -> str | None:
    """The sentence about an NPU of this machine that torch does not know; None if there is none."""
    chip = next((path.name for path in sorted(devices.glob("davinci[0-9]*"))), None)
    problem = torch_npu_problem() if chip is not None else ""
    if not problem:
        return None
    return (
        f"this machine has an Ascend NPU (/dev/{chip}), and torch_npu {problem}, so nothing is computed on it; type "
        "pip install torch-npu, in the version that belongs to this torch, and source CANN's set_env.sh"
    )


@cache
def report_unused_npu() -> None:
    """Print `unused_npu`, once."""
    if (sentence := unused_npu()) is not None:
        say(sentence)


def backend_of(kind: str) -> Any:
    """torch's module for devices of this type (torch.cuda and the like)."""
    import torch

    return getattr(torch, kind)


def is_available(kind: str) -> bool:
    """Whether this process can compute on devices of this type."""
    import torch

    if kind == "npu" and torch_npu_problem():
        return False
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu" or bool(backend_of(kind).is_available())


def available_type() -> str:
    """The type of this process's accelerator, or `cpu`."""
    return next((kind for kind in TYPES if is_available(kind)), "cpu")


def own_device() -> "torch.device":
    """The accelerator of this rank, by LOCAL_RANK, or the CPU."""
    import torch

    report_unused_npu()
    kind = available_type()
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind in WITH_MEMORY else torch.device(kind)


def has_memory(device: "torch.device") -> bool:
    """Whether the device is a GPU or NPU with memory of its own."""
    return device.type in WITH_MEMORY


def supports(feature: str, device: "torch.device") -> bool:
    """Whether a feature of CUDA_ONLY exists on the device; FlashAttention and TF32 need compute capability 8."""
    if feature not in CUDA_ONLY:
        raise KeyError(feature)
    if device.type != "cuda":
        return False
    if feature in ("flash", "tf32"):
        return bool(backend_of("cuda").get_device_capability(device) >= (8, 0))
    return True


def has_bfloat16(device: "torch.device") -> bool:
    """Whether the device is a GPU or NPU with bfloat16; one that this machine does not have is assumed to have it.

    Metal is not counted, which emulates it on the first generations.
    """
    if not has_memory(device):
        return False
    return not is_available(device.type) or bool(backend_of(device.type).is_bf16_supported())


def name_of(device: "torch.device") -> str:
    """The name that the driver gives a device; `mps` and `cpu` are called so."""
    return str(backend_of(device.type).get_device_name(device)) if has_memory(device) else device.type


def total_memory(device: "torch.device") -> int | None:
    """All bytes of the device; None where it shares the host's memory."""
    return int(backend_of(device.type).get_device_properties(device).total_memory) if has_memory(device) else None


def free_memory(device: "torch.device") -> int:
    """The bytes that tensors of this process can still take: free ones, and those that torch has reserved and does not use."""
    if has_memory(device):
        backend = backend_of(device.type)
        unused = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + unused)
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory(device: "torch.device") -> int | None:
    """The most bytes that tensors took on the device since `reset_peak_memory`; None where it shares the host's memory."""
    return int(backend_of(device.type).max_memory_allocated(device)) if has_memory(device) else None


def reset_peak_memory(device: "torch.device") -> None:
    """Count the device's peak from now on; nothing where it shares the host's memory."""
    if has_memory(device):
        backend_of(device.type).reset_peak_memory_stats(device)


def initialized_type() -> str | None:
    """The type of the accelerator that this process has already used; None if it has used none. torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or (kind := available_type()) == "cpu":
        return None
    return kind if kind == "mps" or backend_of(kind).is_initialized() else None


def empty_cache() -> None:
    """Give the accelerator's unused memory back to the system, which other processes and libraries can then take."""
    torch = sys.modules.get("torch")
    if torch is not None and (kind := available_type()) != "cpu":
        backend_of(kind).empty_cache()


def synchronize() -> None:
    """Wait until the accelerator has done what this process asked of it."""
    if (kind := initialized_type()) is not None:
        backend_of(kind).synchronize()


def rng_states() -> "list[torch.Tensor]":
    """The random states of all accelerators that this process uses; empty if it uses none."""
    kind = initialized_type()
    if kind is None:
        return []
    backend = backend_of(kind)
    return [backend.get_rng_state()] if kind == "mps" else list(backend.get_rng_state_all())


def set_rng_states(states: "list[torch.Tensor]") -> None:
    """Set what `rng_states` returned."""
    if not states:
        return
    kind = available_type()
    if kind == "mps":
        backend_of(kind).set_rng_state(states[0])
    else:
        backend_of(kind).set_rng_state_all(states)


@contextmanager
def fork_rng(device: "torch.device") -> Iterator[None]:
    """After this context, the random states of the CPU and of the device are as before it."""
    import torch

    if has_memory(device):
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield
        return
    state = backend_of("mps").get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if state is not None:
            backend_of("mps").set_rng_state(state)


def default_generator(device: "torch.device") -> "torch.Generator":
    """The generator that operations on the device draw from."""
    import torch

    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    generator: torch.Generator = backend_of(device.type).default_generators[device.index or 0]
    return generator


def recorded_event(device: "torch.device") -> Any:
    """An event after all that was asked of the device so far; `query` says whether that is done, `synchronize` waits for it."""
    backend = backend_of(device.type)
    event = backend.Event()
    event.record(backend.current_stream(device))
    return event


def set_device() -> None:
    """Let this rank compute on the accelerator of its LOCAL_RANK, where each rank has one of its own."""
    if (kind := available_type()) in WITH_MEMORY:
        backend_of(kind).set_device(int(os.environ["LOCAL_RANK"]))


def collective_backends(*, use_cpu: bool) -> str:
    """What init_process_group is given: the accelerator's collectives beside gloo, or gloo alone on CPUs and Metal."""
    kind = "cpu" if use_cpu else available_type()
    return f"cpu:gloo,{kind}:{COLLECTIVES[kind]}" if kind in COLLECTIVES else "gloo"


def mesh_type() -> str:
    """The type of the devices that the process group's ranks hold their shards on."""
    import torch

    return available_type() if torch.distributed.get_backend() != "gloo" else "cpu"
