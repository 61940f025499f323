"""What `doctor` finds about GPUs, precisions and kernels."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from glmtuner.launch.doctor import findings, packages
from glmtuner.launch.doctor.ask import Answer, ask, first_line
from glmtuner.launch.doctor.findings import MISSING, OK, PROBLEM, Finding

QUERY = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap",
    "--format=csv,noheader,nounits",
]
GIB = 2**30
PLACES = {"cpu": "on the CPU", "npu": "on the NPU"}


@dataclass(frozen=True)
class Listed:
    """A GPU as the driver lists it; memory in MiB."""

    name: str
    total: float
    free: float
    driver: str
    capability: str


def ask_torch() -> Answer:
    """What torch_probe.py prints."""
    return ask([sys.executable, "-m", "glmtuner.launch.doctor.torch_probe"], findings.PROBE_SECONDS)


def probed(answer: Answer) -> dict[str, Any]:
    """All that the probe of torch printed, and why it ended early as `problem`, empty if it did not."""
    found: dict[str, Any] = {}
    for part in answer.objects():
        found |= part
    return found | {"problem": "" if found.get("complete") else answer.reason}


def ask_driver() -> tuple[Answer, list[Listed]]:
    """What nvidia-smi answers, and the GPUs in it."""
    answer = ask(QUERY, findings.PROGRAM_SECONDS)
    return answer, [] if answer.problem else listed(answer.out)


def listed(text: str) -> list[Listed]:
    """The GPUs of nvidia-smi's lines; a number that it does not know, as of GPUs that share the host's memory, is nan."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 4)]
        if len(cells) == 5:
            total, free = (float(cell) if re.fullmatch(r"[\d.]+", cell) else float("nan") for cell in cells[1:3])
            found.append(Listed(cells[0], total, free, *cells[3:]))
    return found


def check_gpus(probed: Mapping[str, Any], driver: tuple[Answer, list[Listed]]) -> Finding:
    """The GPUs that runs compute on, or why they compute on none."""
    answer, cards = driver
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    version = f", driver {cards[0].driver}" if cards else ""
    gpus = probed.get("gpus") or []
    if gpus and (kind := probed.get("type")) is not None:
        texts = [f"{gpu['name']}, {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free" for gpu in gpus]
        package = f"torch_npu {version_of('torch-npu')}" if kind == "npu" else f"torch {probed.get('torch')}"
        text = f"{'; '.join(counted(texts))}, as {kind} of {package}"
        return Finding("GPU", OK, text, facts={"gpus": gpus})
    if sentence := probed.get("npu_problem"):
        text, _, fix = sentence.partition("; type ")
        return Finding("GPU", PROBLEM, text, fix, facts={"gpus": []})
    if gpus:
        texts = [
            f"{gpu['name']}, {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free, compute capability {gpu['capability']}"
            for gpu in gpus
        ]
        text = f"{'; '.join(counted(texts))}{version}, CUDA {probed.get('cuda') or probed.get('hip')} in torch"
        if len(cards) > len(gpus) and visible is not None:
            text += f"; CUDA_VISIBLE_DEVICES={visible} hides {len(cards) - len(gpus)} of {len(cards)}"
        unsupported = [gpu for gpu in gpus if not is_supported(gpu["capability"], probed.get("architectures") or [])]
        if unsupported:
            text += f"; torch {probed['torch']} has no code for compute capability {unsupported[0]['capability']}"
            return Finding("GPU", PROBLEM, text, install_torch(), facts={"gpus": gpus})
        return Finding("GPU", OK, text, facts={"gpus": gpus})
    if probed.get("mps"):
        return Finding("GPU", OK, "Apple's GPU, by Metal")
    names = "; ".join(counted([f"{card.name}, {card.total / 1024:.1f} GiB" for card in cards])) + version
    facts = {"gpus": [], "listed": [vars(card) for card in cards]}
    if answer.problem == "not found":
        text = "none: there is no nvidia-smi, so no NVIDIA driver; runs compute on the CPU"
        return Finding("GPU", MISSING, text, facts=facts)
    if answer.problem:
        fix = "nvidia-smi, and repair the driver or start the machine again"
        return Finding("GPU", PROBLEM, f"none is used: nvidia-smi: {answer.problem}", fix, facts=facts)
    if not cards:
        return Finding(
            "GPU",
            MISSING,
            f"none: nvidia-smi lists none ({first_line(answer.out) or 'it printed nothing'})",
            facts=facts,
        )
    if "torch" not in probed:
        return Finding("GPU", PROBLEM, f"{names}: not used, since torch does not load", install_torch(), facts=facts)
    if not (probed.get("cuda") or probed.get("hip")):
        text = f"{names}: not used, since torch {probed['torch']} is built for CPUs"
        return Finding("GPU", PROBLEM, text, install_torch(), facts=facts)
    if visible is not None and not [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]:
        return Finding(
            "GPU",
            PROBLEM,
            f"{names}: hidden by CUDA_VISIBLE_DEVICES={visible!r}",
            "unset CUDA_VISIBLE_DEVICES",
            facts=facts,
        )
    reason = probed.get("cuda_problem") or probed.get("error in gpus") or probed.get("problem") or "torch sees no GPU"
    fix = f"a driver for CUDA {probed.get('cuda')}, or {install_torch()} with the index of an older CUDA"
    return Finding("GPU", PROBLEM, f"{names}: torch {probed['torch']} cannot use it ({reason})", fix, facts=facts)


def counted(texts: list[str]) -> list[str]:
    """The texts, equal ones once with their number."""
    return [f"{texts.count(each)} x {each}" if texts.count(each) > 1 else each for each in dict.fromkeys(texts)]


def is_supported(capability: str, architectures: list[str]) -> bool:
    """Whether torch has code for the GPU: of the same major version and no later minor one, or PTX that the driver compiles."""
    major, minor = (int(part) for part in capability.split("."))
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", each) for each in architectures]
    if not any(found):  # AMD's names, or none listed
        return True
    return any(
        each and ((int(each[2]) == major and int(each[3]) <= minor) or (each[1] == "compute" and int(each[2]) <= major))
        for each in found
    )


def install_torch() -> str:
    """The command for torch's build for CUDA, of the version that glmtuner declares: that of PyPI on Linux."""
    bound = next((str(each.specifier) for each in packages.requirements() if each.name == "torch"), "")
    return f"pip install --force-reinstall --index-url https://pypi.org/simple 'torch{bound}'"


def check_precision(probed: Mapping[str, Any]) -> Finding:
    """In which formats runs can compute, and whether bitsandbytes' layers can be trained through."""
    if "device" not in probed:
        reason = (
            probed.get("error in precisions")
            or probed.get("error in build")
            or probed.get("problem")
            or "torch told nothing"
        )
        return Finding("precision", PROBLEM, f"not known ({reason})")
    gpu = probed["device"] != "cpu"
    parts = [
        "bf16" if probed["bf16"] else "bf16 without instructions of its own, so slow",
        "fp16" if gpu else "no fp16 (trainer.fp16 needs a GPU)",
        "tf32" if probed["tf32"] else "no tf32",
    ]
    wrong = []
    for name in ("int4", "int8"):
        if name not in probed:
            wrong.append(
                f"quant={name} is not known to work ({probed.get('problem') or 'the probe did not come to it'})"
            )
        elif probed[name]:
            wrong.append(f"quant={name} does not work ({probed[name]})")
        else:
            parts.append(f"quant={name}")
    text = f"{PLACES.get(probed['device'], 'on the GPU')}: float32, {', '.join(parts)}"
    facts = {name: probed.get(name) for name in ("device", "bf16", "fp16", "tf32", "int4", "int8")}
    if wrong:
        lacks = not packages.is_installed("bitsandbytes")
        fix = "pip install bitsandbytes" if lacks else "pip install --force-reinstall --no-deps bitsandbytes"
        return Finding("precision", MISSING if lacks else PROBLEM, f"{text}; {'; '.join(wrong)}", fix, facts=facts)
    return Finding("precision", OK, text, facts=facts)


def check_kernels(probed: Mapping[str, Any]) -> Finding:
    """What kernels=liger and kernels=compile need, and torch's flash attention."""
    gpu = probed.get("device") == "cuda"
    has_liger, has_triton = packages.is_installed("liger_kernel"), packages.is_installed("triton")
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)
    parts = [
        f"Liger {version_of('liger-kernel')}" if has_liger else "no Liger",
        f"Triton {version_of('triton')}" if has_triton else "no Triton",
        f"C++ compiler {compiler}" if compiler else "no C++ compiler",
    ]
    if gpu:
        parts.append("flash attention by torch" if probed.get("flash") else "no flash attention on this GPU")
    facts = {"liger": has_liger, "triton": has_triton, "compiler": compiler, "flash": bool(probed.get("flash"))}
    fixes = []
    if not has_liger and gpu:
        fixes.append(f"{packages.extra_command('liger')} for kernels=liger")
    if not has_triton and gpu:
        fixes.append("pip install triton for kernels=compile")
    if not compiler:
        fixes.append("apt-get install g++ (or dnf install gcc-c++) for kernels=compile")
    if not gpu:
        parts.append(
            "kernels=liger needs a GPU" if probed.get("device") in (None, "cpu") else "kernels=liger needs CUDA"
        )
    return Finding("kernels", MISSING if fixes else OK, ", ".join(parts), ", or ".join(fixes), facts=facts)


def version_of(distribution: str) -> str:
    """The version of an installed distribution; a question mark where its metadata is lost."""
    try:
        return str(metadata.version(distribution))
    except Exception:
        return "?"
