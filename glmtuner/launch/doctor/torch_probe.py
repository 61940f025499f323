"""What torch and the libraries of a run can do on this machine: `python -m glmtuner.launch.doctor.torch_probe` prints it.

Every line is a JSON object with a part of it, printed as soon as it is known: a library that crashes, or does not come back, takes
this process with it and leaves the lines before. An `error` says in one line why a part is not known.
"""

import json
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from glmtuner.console import plain
from glmtuner.distributed import accelerator
from glmtuner.launch.doctor.ask import one_line

LIBRARIES = (  # that every run imports, after torch
    "numpy", "hydra", "omegaconf", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "huggingface_hub",
    "rich.console", "psutil",
)  # fmt: skip
QUANTIZED = {"int4": "Linear4bit", "int8": "Linear8bitLt"}


def main() -> None:
    """Print all parts; those of torch first, which the others need."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would compile its kernels for a CPU
    warnings.simplefilter("ignore")
    tell(build)
    tell(gpus)
    tell(precisions)
    for name in QUANTIZED:
        tell(lambda name=name: {name: quantized_problem(name)}, name)  # type: ignore[misc]
    for name in LIBRARIES:
        tell(lambda name=name: {f"import {name}": import_module(name) and ""}, f"import {name}")  # type: ignore[misc]
    tell(lambda: {"complete": True})


def tell(part: Callable[[], dict[str, Any]], name: str = "") -> None:
    """Print what `part` returns, or its error: under the name, if the part has one."""
    try:
        found = part()
    except BaseException as error:
        found = {name or f"error in {part.__name__}": one_line(error)}
    print(plain(json.dumps(found)), flush=True)


def build() -> dict[str, Any]:
    """torch's version, what it is built for (`cuda` and `hip`, null if it is not), and the threads that it computes with."""
    import torch

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "mps": torch.backends.mps.is_available(),
    }


def gpus() -> dict[str, Any]:
    """The GPUs or NPUs that torch computes on, their `type` and memory in bytes; where there is none, why torch does not start CUDA."""
    import torch

    if (kind := accelerator.available_type()) in ("npu", "xpu"):
        devices = [torch.device(kind, index) for index in range(accelerator.backend_of(kind).device_count())]
        found = [
            {
                "name": accelerator.name_of(device),
                "free": accelerator.free_memory(device),
                "total": accelerator.total_memory(device),
            }
            for device in devices
        ]
        return {"gpus": found, "type": kind}
    if kind == "cpu" and (sentence := accelerator.unused_npu()):
        return {"gpus": [], "npu_problem": sentence}
    if not (torch.version.cuda or torch.version.hip):
        return {"gpus": []}
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:
            return {"gpus": [], "cuda_problem": one_line(error)}
        return {"gpus": []}
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append({"name": name, "free": free, "total": total, "capability": f"{major}.{minor}"})
    return {"gpus": found, "architectures": torch.cuda.get_arch_list()}


def precisions() -> dict[str, Any]:
    """Which formats the device computes in by its own instructions, and whether torch's flash attention is usable."""
    import torch

    if (kind := accelerator.available_type()) in ("npu", "xpu"):
        device = torch.device(kind, 0)
        return {"device": kind, "bf16": accelerator.has_bfloat16(device), "fp16": True, "tf32": False}
    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        return {
            "device": "cuda",
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "fp16": True,
            "tf32": major >= 8 and not torch.version.hip,
            "flash": torch.backends.cuda.is_flash_attention_available() and major >= 8,
        }
    cpu: Any = torch.cpu
    native = [name for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if hasattr(cpu, name)]
    return {"device": "cpu", "bf16": any(getattr(cpu, name)() for name in native), "fp16": False, "tf32": False}


def quantized_problem(name: str) -> str:
    """Why a layer of bitsandbytes cannot be trained through on this device, by doing it once; empty if it can."""
    import torch
    from bitsandbytes import nn

    device = kind if (kind := accelerator.available_type()) in accelerator.WITH_MEMORY else "cpu"
    options = {"compute_dtype": torch.float32} if name == "int4" else {"has_fp16_weights": False}
    layer = getattr(nn, QUANTIZED[name])(64, 64, bias=False, **options).to(device)
    dtype = torch.float16 if device != "cpu" and name == "int8" else torch.float32
    x = torch.ones(2, 64, device=device, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    finite = x.grad is not None and bool(torch.isfinite(x.grad).all())
    return "" if finite else "its gradient is not finite"


if __name__ == "__main__":
    main()
