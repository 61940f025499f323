"""What is asked of devices, for each type of them: the answers of stand-ins for torch's modules, and that nobody else asks torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmtuner.distributed import accelerator, visible
from glmtuner.training.throughput import peak_flops

PACKAGE = Path(__file__).parent.parent.parent.parent / "glmtuner"
# Modules that name a type of device, and why; all others ask glmtuner/distributed/accelerator.py.
NAMES_A_TYPE = {
    "distributed/accelerator.py": "it is the place",
    "distributed/visible.py": "counts devices before torch is imported",
    "inference/replay.py": "CUDA graphs, reached where `supports` says so",
    "inference/sampling.py": "Metal has no float64",
    "launch/doctor/accelerator.py": "words for what the probe found",
    "launch/doctor/torch_probe.py": "says what torch is built for and why CUDA does not start",
    "launch/memory_check.py": "the GPU of another machine is taken for NVIDIA's",
    "memory/estimate.py": "the measured sizes of a CUDA context",
    "models/quantized_experts.py": "Mamba's kernel is written for CUDA",
}
TYPES = {"cuda", "npu", "xpu", "mps"}
GIB = 2**30
# what accelerator.py calls of a module for GPUs with memory of their own
CALLED = {
    "is_available", "is_initialized", "is_bf16_supported", "get_device_name", "get_device_properties", "mem_get_info",
    "memory_reserved", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache", "synchronize",
    "get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all", "default_generators", "Event", "current_stream",
    "set_device",
}  # fmt: skip


def named_types(path: Path) -> set[str]:
    """The types of devices that a module names: torch.cuda and so on, and strings that are one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.partition(":")[0])
    return found & TYPES


def test_one_module_asks_torch_about_types_of_devices():
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if named_types(path)}
    assert found == NAMES_A_TYPE.keys()
    direct = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "torch.cuda." in path.read_text()
    }
    assert direct == {"inference/replay.py", "launch/doctor/torch_probe.py"}


class Backend(SimpleNamespace):
    """A stand-in for torch's module of one type, which keeps what it was told in `calls`."""

    def __init__(self, total: int = 64 * GIB, bf16: bool = True) -> None:
        self.calls: list[Any] = []
        self.states = [torch.tensor([1]), torch.tensor([2])]
        super().__init__(
            is_available=lambda: True,
            is_initialized=lambda: True,
            is_bf16_supported=lambda: bf16,
            device_count=lambda: 2,
            get_device_name=lambda device: f"card {device.index}",
            get_device_properties=lambda device: SimpleNamespace(total_memory=total),
            mem_get_info=lambda device: (10 * GIB, total),
            memory_reserved=lambda device: 5 * GIB,
            memory_allocated=lambda device: 2 * GIB,
            max_memory_allocated=lambda device: 3 * GIB,
            reset_peak_memory_stats=lambda device: self.calls.append(("reset", device.index)),
            empty_cache=lambda: self.calls.append("empty"),
            synchronize=lambda: self.calls.append("synchronize"),
            get_rng_state_all=lambda: list(self.states),
            set_rng_state_all=lambda states: self.calls.append(("states", states)),
            get_rng_state=lambda device=None: self.states[0],
            set_rng_state=lambda state, device=None: self.calls.append(("state", state)),
            get_device_capability=lambda device: (7, 5),
            default_generators=("generator 0", "generator 1"),
            current_stream=lambda device: f"stream {device.index}",
            Event=lambda: SimpleNamespace(record=lambda stream: self.calls.append(("record", stream))),
            set_device=lambda index: self.calls.append(("device", index)),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces torch's module of a type by a Backend, so that this is the type of the machine."""

    def replace(kind: str, **options: Any) -> tuple[Backend, Any]:
        backend = Backend(**options)
        for other in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, other), "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        monkeypatch.setattr(accelerator, "torch_npu_problem", lambda: "" if kind == "npu" else "is not installed")
        monkeypatch.setattr(torch, kind, backend, raising=False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        # torch.device knows `npu` once torch_npu has named it, which the test with a process of its own does
        return backend, SimpleNamespace(type="npu", index=1) if kind == "npu" else torch.device(kind, 1)

    return replace


@pytest.mark.parametrize("kind", ["cuda", "npu", "xpu"])
def test_the_answers_for_devices_with_memory_of_their_own(kind, fake):
    backend, device = fake(kind)
    assert accelerator.available_type() == kind and accelerator.has_memory(device)
    assert accelerator.name_of(device) == "card 1"
    assert accelerator.total_memory(device) == 64 * GIB
    assert accelerator.free_memory(device) == 13 * GIB  # 10 free, and 5 - 2 that torch holds without using
    assert accelerator.peak_memory(device) == 3 * GIB
    accelerator.reset_peak_memory(device)
    accelerator.empty_cache()
    accelerator.synchronize()
    accelerator.set_device()
    accelerator.recorded_event(device)
    accelerator.set_rng_states(accelerator.rng_states())
    assert backend.calls == [
        ("reset", 1), "empty", "synchronize", ("device", 1), ("record", "stream 1"), ("states", backend.states)
    ]  # fmt: skip
    assert accelerator.default_generator(device) == "generator 1"
    assert accelerator.has_bfloat16(device)
    names = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl", "xpu": "cpu:gloo,xpu:xccl"}
    assert accelerator.collective_backends(use_cpu=False) == names[kind]
    assert accelerator.collective_backends(use_cpu=True) == "gloo"
    assert [accelerator.supports(name, device) for name in ("graphs", "triton", "flash", "tf32")] == [
        kind == "cuda", kind == "cuda", False, False  # FlashAttention and TF32 do not exist for capability 7.5
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["cuda", "npu", "xpu"])
def test_a_device_without_bfloat16_and_one_that_is_not_used_yet(kind, fake):
    backend, device = fake(kind, bf16=False)
    assert not accelerator.has_bfloat16(device)
    backend.is_initialized = lambda: False
    accelerator.synchronize()
    assert accelerator.rng_states() == [] and backend.calls == []
    backend.is_available = lambda: False
    assert accelerator.available_type() == "cpu" and accelerator.has_bfloat16(device)  # of another machine


def test_capability_8_has_flash_attention_and_tf32(fake):
    backend, device = fake("cuda")
    backend.get_device_capability = lambda _: (8, 0)
    assert accelerator.supports("flash", device) and accelerator.supports("tf32", device)
    with pytest.raises(KeyError):
        accelerator.supports("grafs", device)


def test_metal_shares_the_memory_of_the_host(fake):
    backend, _ = fake("mps")
    device = torch.device("mps")
    assert accelerator.own_device() == device and accelerator.name_of(device) == "mps"
    assert accelerator.total_memory(device) is accelerator.peak_memory(device) is None
    assert accelerator.free_memory(device) > 0 and not accelerator.has_bfloat16(device)
    assert accelerator.collective_backends(use_cpu=False) == "gloo"
    accelerator.set_device()
    accelerator.set_rng_states(accelerator.rng_states())
    with accelerator.fork_rng(device):
        torch.rand(3)
    assert backend.calls == [("state", backend.states[0])] * 2
    accelerator.empty_cache()
    accelerator.synchronize()
    assert backend.calls[2:] == ["empty", "synchronize"]


def test_a_cpu_has_none_of_it(monkeypatch):
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    device = torch.device("cpu")
    assert accelerator.available_type() == "cpu" and accelerator.own_device() == device
    assert accelerator.name_of(device) == "cpu" and accelerator.free_memory(device) > 0
    assert accelerator.total_memory(device) is accelerator.peak_memory(device) is None
    assert accelerator.rng_states() == [] and accelerator.default_generator(device) is torch.default_generator
    assert not any(accelerator.supports(name, device) for name in accelerator.CUDA_ONLY)
    assert accelerator.collective_backends(use_cpu=False) == "gloo"
    accelerator.empty_cache()
    accelerator.synchronize()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with accelerator.fork_rng(device):
        torch.rand(7)
    assert torch.equal(torch.rand(2), expected)


def test_fork_rng_is_given_the_device_and_its_type(fake, monkeypatch):
    backend, device = fake("xpu")
    with accelerator.fork_rng(device):
        backend.states = [torch.tensor([9])]
    assert backend.calls == [("state", torch.tensor([1]))]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_stand_ins_have_what_torchs_own_modules_have(kind):
    """torch_npu's names are those of torch.cuda; of it, nothing can be imported here."""
    assert {name for name in CALLED if not hasattr(getattr(torch, kind), name)} == set()
    used = {
        node.attr
        for node in ast.walk(ast.parse((PACKAGE / "distributed/accelerator.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("backend")
    }
    assert used <= {*CALLED, "get_device_capability", "total_memory"} and used >= {"mem_get_info", "default_generators"}


def test_a_group_of_the_accelerator_shards_there(fake, monkeypatch):
    fake("xpu")
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "xccl")
    assert accelerator.mesh_type() == "xpu"
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    assert accelerator.mesh_type() == "cpu"


# -- torch_npu --------------------------------------------------------------------------------------------------------------------

TORCH_NPU = """\
import types
import torch
print("torch_npu is imported")
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", types.SimpleNamespace(
    is_available=lambda: True, is_bf16_supported=lambda: True, is_initialized=lambda: True, device_count=lambda: 2,
    get_device_name=lambda device: f"Ascend910B2 {device.index}",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=64 * 2**30),
    mem_get_info=lambda device: (60 * 2**30, 64 * 2**30), memory_reserved=lambda device: 0, memory_allocated=lambda device: 0,
))
"""
ASKED = """\
from glmtuner.config.compose import compose
from glmtuner.distributed import accelerator, visible
from glmtuner.launch.device import compute_dtype, device_of
from glmtuner.launch.hardware import hardware
from glmtuner.launch.register import register_presets
from glmtuner.launch.doctor import torch_probe
register_presets()
run = compose(["model=tiny_glm"]).run
device = device_of(run)
facts = hardware(device, 2)
print(repr(device), compute_dtype(run, device), facts["name"], facts["memory_gib"])
print(device_of(compose(["model=tiny_glm", "trainer.use_cpu=true"]).run), accelerator.collective_backends(use_cpu=False))
print(torch_probe.gpus(), torch_probe.precisions())
"""


def child(folder: Path, code: str) -> str:
    """What a process with torch_npu's stand-in in `folder` prints."""
    path = os.pathsep.join([str(folder), str(PACKAGE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_run_computes_on_the_npu_that_torch_npu_adds(tmp_path):
    (tmp_path / "torch_npu.py").write_text(TORCH_NPU, encoding="utf-8")
    lines = child(tmp_path, ASKED).splitlines()
    assert lines[0] == "torch_npu is imported"
    assert lines[1] == "device(type='npu', index=1) torch.bfloat16 Ascend910B2 1 64.0"
    assert peak_flops("Ascend910B2 1") is None  # so no utilization is written
    assert lines[2] == "cpu cpu:gloo,npu:hccl"
    card = {"free": 60 * GIB, "total": 64 * GIB}
    expected = {"gpus": [{"name": f"Ascend910B2 {index}", **card} for index in range(2)], "type": "npu"}
    assert lines[3] == f"{expected} { ({'device': 'npu', 'bf16': True, 'fp16': True, 'tf32': False}) }"
    assert len(lines) == 4


def test_an_npu_without_torch_npu_is_told(tmp_path):
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci_manager").touch()
    sentence = accelerator.unused_npu(tmp_path)
    assert sentence is not None and "/dev/davinci0), and torch_npu is not installed" in sentence
    assert "type pip install torch-npu" in sentence
    (tmp_path / "davinci0").unlink()
    assert accelerator.unused_npu(tmp_path) is None


def test_a_torch_npu_that_does_not_load_is_told_why(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open\\nshared object file')")
    (tmp_path / "davinci0").touch()
    code = (
        "from pathlib import Path; from glmtuner.distributed import accelerator as a; "
        f"print(a.unused_npu(Path({str(tmp_path)!r})), a.available_type())"
    )
    told = child(tmp_path, code)
    assert "torch_npu does not load (libhccl.so: cannot open shared object file), so nothing is computed on it" in told


# -- before torch is imported -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root folder of a machine with two Ascend chips and three GPUs, two of them Intel's; no variable is set, no library is there."""
    for variable in visible.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("davinci1", "davinci0", "davinci_manager"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    for number, vendor in enumerate(("0x8086", "0x10de", "0x8086")):
        folder = tmp_path / f"sys/class/drm/renderD{128 + number}/device"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
    return tmp_path


def has(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    if library == "torch_npu":
        monkeypatch.setattr(visible.importlib.util, "find_spec", lambda name: object())
    else:
        monkeypatch.setattr(visible.metadata, "version", lambda name: "2.13.0+xpu")


@pytest.mark.parametrize(
    ("library", "kind", "names", "one"),
    [("torch_npu", "npu", ["0", "1"], "1"), ("torch+xpu", "xpu", ["0", "1"], "0")],
)
def test_devices_are_counted_where_their_library_is_installed(bare, monkeypatch, library, kind, names, one):
    assert visible.of_this_machine(bare) == ("cuda", [])
    has(monkeypatch, library)
    assert visible.of_this_machine(bare) == (kind, names)
    monkeypatch.setenv(visible.VARIABLES[kind], one)
    assert visible.of_this_machine(bare) == (kind, [one])
    monkeypatch.setenv(visible.VARIABLES[kind], "")
    assert visible.of_this_machine(bare) == ("cuda", [])


def test_nvidias_gpus_are_counted_as_before(bare, monkeypatch):
    program = bare / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100'\necho 'GPU 1: H100'\necho\n")
    program.chmod(0o755)
    assert visible.of_this_machine(bare) == ("cuda", ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f,3")
    assert visible.of_this_machine(bare) == ("cuda", ["GPU-8f", "3"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible.of_this_machine(bare) == ("cuda", [])


def test_a_job_is_given_one_device_by_the_variable_of_its_type(bare, monkeypatch):
    for kind, variable in visible.VARIABLES.items():
        monkeypatch.setattr(visible, "of_this_machine", lambda kind=kind: (kind, ["0", "1"]))
        assert visible.only("1") == {variable: "1"}


def test_counting_imports_no_torch():
    code = "import sys; from glmtuner.distributed import visible; visible.visible_gpus(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
