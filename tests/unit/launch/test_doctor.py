"""`doctor`: made-up programs, broken packages, servers that do not answer; numbers against other programs."""

import json
import math
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from glmtuner.cli.main import main
from glmtuner.launch.doctor import accelerator, diagnose, findings, packages, resources, services
from glmtuner.launch.doctor.ask import Answer, ask, within
from glmtuner.launch.doctor.findings import MISSING, OK, PROBLEM, Finding

ROOT = Path(__file__).parent.parent.parent.parent
CPU = {"torch": "2.13.0+cpu", "cuda": None, "hip": None, "gpus": [], "problem": ""}
CARD = "NVIDIA H100 80GB HBM3, 81559, 80995, 580.65.06, 9.0"
GPU = {
    "torch": "2.13.0+cu130", "cuda": "13.0", "hip": None, "architectures": ["sm_80", "sm_90", "compute_90"], "problem": "",
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "free": 84e9, "total": 85e9, "capability": "9.0"}],
}  # fmt: skip
NPU = {"name": "Ascend910B2", "free": 60 * 2**30, "total": 64 * 2**30}
SECRET = "hf_" + "Q7rT" * 9


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a program on PATH, which has nothing else: a shell script with this body."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)

    monkeypatch.setenv("PATH", str(folder))
    return put


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package before all others, for this process and its children."""
    folder = tmp_path / "packages"
    folder.mkdir()

    def put(name: str, text: str, version: str = "", metadata: str | None = None) -> Path:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(text)
        if version:
            info = folder / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(metadata if metadata is not None else f"Name: {name}\nVersion: {version}\n")
        return folder

    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    return put


# -- programs that hang or crash ----------------------------------------------------------------------------------------------


def test_a_program_is_asked_for_so_long_only():
    start = time.monotonic()
    assert ask(["/bin/sh", "-c", "echo a; sleep 60 & wait"], 2) == Answer("a\n", "no answer within 2 s")
    assert time.monotonic() - start < 30
    assert ask(["/bin/sh", "-c", "echo out; echo first >&2; echo why >&2; exit 3"], 5) == Answer(
        "out\n", "exit code 3: why"
    )
    assert ask(["/bin/sh", "-c", "kill -11 $$"], 5).problem == "was killed by signal 11"
    assert ask(["no_such_program"], 5).problem == "not found"
    assert ask([str(ROOT)], 5).problem.startswith("cannot be started")
    with pytest.raises(TimeoutError):
        within(0.1, lambda: time.sleep(5))
    with pytest.raises(ZeroDivisionError):
        within(1, lambda: 1 // 0)


def test_what_a_probe_printed_before_it_crashed_counts():
    code = 'import os; print(\'{"torch": "2.13.0"}\\nnoise\\n[1]\', flush=True); os.abort()'
    assert accelerator.probed(ask([sys.executable, "-c", code], 20)) == {
        "torch": "2.13.0",
        "problem": "was killed by signal 6",
    }
    assert accelerator.probed(Answer('{"complete": true}'))["problem"] == ""


# -- GPUs ---------------------------------------------------------------------------------------------------------------------


def test_the_lines_of_nvidia_smi(program):
    program("nvidia-smi", f"echo '{CARD}'; echo 'NVIDIA GB10, Max, [N/A], [N/A], 580.95.05, 12.1'")
    answer, cards = accelerator.ask_driver()
    assert answer.problem == "" and [(card.name, card.driver, card.capability) for card in cards] == [
        ("NVIDIA H100 80GB HBM3", "580.65.06", "9.0"),
        ("NVIDIA GB10, Max", "580.95.05", "12.1"),
    ]
    assert (cards[0].total, cards[0].free) == (81559, 80995) and math.isnan(cards[1].total)


@pytest.mark.parametrize(
    ("probe", "body", "visible", "state", "words", "fix"),
    [
        (GPU, f"echo '{CARD}'", None, OK, ["H100", "78.2 of 79.2 GiB free", "9.0", "driver 580.65.06", "CUDA 13.0"], ""),
        (GPU, f"echo '{CARD}'; echo '{CARD}'", "0", OK, ["CUDA_VISIBLE_DEVICES=0 hides 1 of 2"], ""),
        (GPU | {"gpus": GPU["gpus"] * 8}, f"echo '{CARD}'", None, OK, ["8 x NVIDIA H100"], ""),
        (GPU | {"architectures": ["sm_100"]}, f"echo '{CARD}'", None, PROBLEM, ["no code for compute capability 9.0"], "pip install"),
        (CPU, None, None, MISSING, ["no nvidia-smi"], ""),
        (CPU, "exit 0", None, MISSING, ["lists none"], ""),
        (CPU, f"echo '{CARD}'", None, PROBLEM, ["79.6 GiB", "torch 2.13.0+cpu is built for CPUs"], "'torch>=2.11'"),
        (CPU, "/bin/sleep 60", None, PROBLEM, ["no answer within 0.5 s"], "driver"),
        (CPU, "echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18", None, PROBLEM,
         ["exit code 18: Failed to initialize NVML"], "driver"),
        (GPU | {"gpus": []}, f"echo '{CARD}'", "", PROBLEM, ["hidden by CUDA_VISIBLE_DEVICES=''"], "unset CUDA_VISIBLE_DEVICES"),
        (GPU | {"gpus": [], "cuda_problem": "RuntimeError: driver too old"}, f"echo '{CARD}'", None, PROBLEM, ["driver too old"], "13.0"),
        ({"problem": "no answer within 120 s"}, f"echo '{CARD}'", None, PROBLEM, ["torch does not load"], "pip install"),
        (CPU | {"mps": True}, None, None, OK, ["Apple"], ""),
        (CPU | {"type": "npu", "gpus": [NPU, NPU]}, None, None, OK, ["2 x Ascend910B2, 60.0 of 64.0 GiB free, as npu of torch_npu"], ""),
        (CPU | {"type": "xpu", "gpus": [NPU]}, None, None, OK, ["64.0 GiB free, as xpu of torch 2.13.0"], ""),
        (CPU | {"npu_problem": "an NPU, unused; type pip install torch-npu"}, None, None, PROBLEM, ["an NPU, unused"], "pip install torch-npu"),
    ],
)  # fmt: skip
def test_gpus(program, monkeypatch, probe, body, visible, state, words, fix):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(findings, "PROGRAM_SECONDS", 0.5 if body and "sleep" in body else 10)
    if body is not None:
        program("nvidia-smi", body)
    found = accelerator.check_gpus(probe, accelerator.ask_driver())
    assert found.state == state and not found.stops_runs
    assert all(word in found.text for word in words), found.text
    assert fix in found.fix and bool(fix) == bool(found.fix)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ("9.0", ["sm_80", "sm_90"], True),
        ("8.9", ["sm_80", "sm_86"], True),  # binaries run on later minor versions
        ("8.0", ["sm_86"], False),
        ("7.0", ["sm_75", "sm_80"], False),
        ("12.0", ["sm_90", "compute_90"], True),  # the driver compiles PTX for later GPUs
        ("12.0", ["sm_90a"], False),
        ("10.3", ["sm_100"], True),
        ("9.0", ["gfx90a"], True),
        ("9.0", [], True),
    ],
)
def test_which_gpus_a_build_of_torch_supports(capability, architectures, expected):
    assert accelerator.is_supported(capability, architectures) is expected


def test_precisions():
    whole = {"device": "cuda", "bf16": True, "fp16": True, "tf32": True, "int4": "", "int8": "", "problem": ""}
    found = accelerator.check_precision(whole)
    assert (found.state, found.text) == (OK, "on the GPU: float32, bf16, fp16, tf32, quant=int4, quant=int8")
    found = accelerator.check_precision(
        whole | {"device": "cpu", "bf16": False, "tf32": False, "int8": "OSError: no libcudart"}
    )
    assert found.state == PROBLEM and "quant=int8 does not work (OSError: no libcudart)" in found.text
    assert "no fp16" in found.text and "quant=int4" in found.text and "bitsandbytes" in found.fix
    assert accelerator.check_precision(whole | {"device": "npu"}).text.startswith("on the NPU: float32, bf16, fp16")
    del whole["int4"]
    assert "quant=int4 is not known" in accelerator.check_precision(whole | {"problem": "was killed by signal 11"}).text
    assert accelerator.check_precision({"problem": "no answer within 1 s"}).text == "not known (no answer within 1 s)"


def test_kernels(program, monkeypatch, package):
    found = accelerator.check_kernels({"device": "cuda", "flash": True})
    assert found.state == MISSING and "no C++ compiler" in found.text and "flash attention by torch" in found.text
    assert f"pip install -e '{ROOT}[liger]'" in found.fix and "g++" in found.fix
    assert "kernels=liger needs CUDA" in accelerator.check_kernels({"device": "npu"}).text
    package("liger_kernel", "")
    package("triton", "", "3.9.0")
    program("g++", "exit 0")
    found = accelerator.check_kernels({"device": "cuda"})
    assert found.state == OK and "Liger ?" in found.text and "Triton 3.9.0" in found.text and "g++" in found.text


# -- packages -----------------------------------------------------------------------------------------------------------------


IMPORTED = {"torch": "2.13.0+cpu", "complete": True, "import numpy": "", "problem": ""}


def test_what_is_declared_is_read_from_the_checkout_or_from_the_metadata(monkeypatch, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here = packages.requirements()
    assert {str(each) for each in here if not packages.of_extra(each)} == {
        str(Requirement(line)) for line in project["dependencies"]
    }
    info = tmp_path / "glmtuner-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        'Name: glmtuner\nVersion: 0.1.0\nRequires-Dist: torch>=2.11\nRequires-Dist: vllm; extra == "vllm"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "CHECKOUT", tmp_path)
    assert [(str(each.specifier), packages.of_extra(each)) for each in packages.requirements()] == [
        (">=2.11", ""),
        ("", "vllm"),
    ]
    assert packages.extra_command("vllm") == "pip install 'glmtuner[vllm]'"


def test_packages_that_are_as_declared():
    found = packages.check_packages(IMPORTED)
    assert found.state == OK and not found.stops_runs, found.text
    assert "torch 2.13.0+cpu" in found.text and found.facts["versions"]["psutil"] == psutil.__version__


@pytest.mark.parametrize(
    ("name", "version", "metadata", "words", "stops"),
    [
        ("peft", "0.1.0", None, "peft 0.1.0 is not >=0.21", True),
        ("optuna", "1.0", None, "optuna 1.0 is not >=5", False),
        ("peft", "0.30", "", "peft's metadata is damaged", True),
        ("peft", "0.30", "Name: peft\nVersion: new\n", "peft's metadata is damaged", True),
    ],
)
def test_packages_that_are_not(package, name, version, metadata, words, stops):
    package(name, "", version, metadata)
    found = packages.check_packages(IMPORTED)
    assert found.state == PROBLEM and found.stops_runs is stops
    assert words in found.text and f"pip install --upgrade '{name}>=" in found.fix, found


def test_libraries_that_do_not_load():
    found = packages.check_packages(IMPORTED | {"import hydra": "ImportError: no omegaconf"})
    assert found.stops_runs and "import hydra fails (ImportError: no omegaconf)" in found.text
    assert found.fix == "pip install --force-reinstall hydra-core"
    found = packages.check_packages({"error in build": "OSError: libtorch_cpu.so", "problem": "", "complete": True})
    assert found.stops_runs and "import torch fails (OSError: libtorch_cpu.so)" in found.text
    found = packages.check_packages({"torch": "2.13.0", "problem": "was killed by signal 11"})
    assert found.stops_runs and "was killed by signal 11" in found.text


def test_a_package_that_is_not_installed(monkeypatch):
    wanted = [Requirement("torch>=2.11"), Requirement("no-such-package-of-ours>=1")]
    monkeypatch.setattr(packages, "requirements", lambda: wanted)
    monkeypatch.setattr(packages, "NEEDED", {"no-such-package-of-ours"})
    found = packages.check_packages(IMPORTED)
    assert found.stops_runs and found.fix == "pip install --upgrade 'no-such-package-of-ours>=1'"


def test_extras(monkeypatch, package):
    package("lm_eval", "", "0.4.13")
    package("galore_torch", "")
    found = packages.check_extras()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    absent = set(found.facts["missing"])
    assert found.state == MISSING and absent <= project["optional-dependencies"].keys() and "benchmark" not in absent
    assert "lm_eval 0.4.13" in found.text and "galore-torch" not in found.facts["optimizers"]
    assert "apollo-torch for trainer.optim=apollo_adamw" in found.fix
    folder = package("ray", "", "0.1")
    assert packages.check_extras().state == PROBLEM
    assert str(folder) not in found.fix and f"pip install -e '{ROOT}[" in found.fix


# -- memory, disks, processors ------------------------------------------------------------------------------------------------


def test_memory_and_disks_are_those_of_other_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "cache" / "of" / "mine"))
    found = resources.check_memory()
    disk = found.facts["disks"]["outputs/"]
    shown = subprocess.run(["df", "-B1", "--output=avail,size", tmp_path], capture_output=True, text=True, check=True)
    available, size = map(int, shown.stdout.split()[-2:])
    assert disk["total"] == size and abs(disk["free"] - available) < 2**30
    assert found.facts["ram_total"] == psutil.virtual_memory().total
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert found.facts["ram_total"] == int(meminfo["MemTotal"].split()[0]) * 1024
    assert (
        found.state == OK
        and f"{size / 2**30:.1f} GiB of disk free for outputs/, GLMTUNER_CACHE={tmp_path}" in found.text
    )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "file" / "cache"))
    found = resources.check_memory()
    assert (
        found.stops_runs and f"{tmp_path}/file is not a folder" in found.text and "export GLMTUNER_CACHE=" in found.fix
    )
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/no_such_folder")
    found = resources.check_memory()
    assert found.state == PROBLEM and not found.stops_runs and "hub cache cannot be written" in found.text


def test_disks_that_are_nearly_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "LEAST_DISK", 2**60)
    found = resources.check_memory()
    assert found.state == PROBLEM and "nearly full" in found.text and found.fix.startswith("df -h")


def control_groups(root: Path, text: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)
    for name, value in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def test_limits_of_control_groups(tmp_path):
    second = control_groups(tmp_path / "2", "0::/slurm/job_7/step\n", {
        "slurm/job_7/step/memory.max": "max", "slurm/job_7/memory.max": "8589934592", "slurm/memory.max": "17179869184",
        "slurm/job_7/cpu.max": "150000 100000", "slurm/cpu.max": "max 100000",
    })  # fmt: skip
    assert (resources.memory_limit(second), resources.processor_limit(second)) == (2**33, 1.5)
    first = control_groups(tmp_path / "1", "4:memory:/docker/a\n2:cpu,cpuacct:/\n0::/\n", {
        "memory/docker/a/memory.limit_in_bytes": "4294967296", "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert (resources.memory_limit(first), resources.processor_limit(first)) == (2**32, 4)
    none = control_groups(tmp_path / "0", "0::/\n", {"memory.max": "max", "cpu.max": "max 100000"})
    assert (resources.memory_limit(none), resources.processor_limit(none)) == (None, None)
    assert resources.memory_limit(tmp_path / "not_linux") is None


def test_processors(monkeypatch):
    usable = int(subprocess.run(["nproc"], capture_output=True, text=True, check=True,
                                env={name: value for name, value in os.environ.items() if not name.startswith("OMP_")}).stdout)  # fmt: skip
    monkeypatch.setattr(resources, "processor_limit", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = resources.check_cpu({"threads": 1})
    assert found.state == OK and found.facts["usable"] == usable and "OMP_NUM_THREADS=1" in found.text
    found = resources.check_cpu({"threads": 4 * usable})
    assert found.state == PROBLEM and found.fix == f"export OMP_NUM_THREADS={usable}"
    monkeypatch.setattr(resources, "processor_limit", lambda: 0.5)
    found = resources.check_cpu({"threads": usable + 1})
    assert found.state == PROBLEM and found.fix == "export OMP_NUM_THREADS=1" and "0.5 of them" in found.text
    assert resources.check_cpu({}).state == OK


# -- SLURM, trackers, the hub -------------------------------------------------------------------------------------------------


def test_slurm(program, monkeypatch):
    assert services.check_slurm(services.ask_slurm()).state == MISSING
    program("sbatch", "echo slurm 25.05.1")
    program("squeue", "echo 7; echo 8")
    found = services.check_slurm(services.ask_slurm())
    assert (found.state, found.text) == (OK, "slurm 25.05.1 answers, 2 jobs in the queue")
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    found = services.check_slurm(services.ask_slurm())
    assert found.state == PROBLEM and "squeue: exit code 1: slurm_load_jobs error: Unable to contact" in found.text
    program("squeue", "/bin/sleep 60")
    monkeypatch.setattr(findings, "PROGRAM_SECONDS", 2)
    found = services.check_slurm(services.ask_slurm())
    assert found.state == PROBLEM and "squeue: no answer within 2 s" in found.text


def test_trackers(tmp_path, monkeypatch, package):
    key = "0123456789abcdef" * 2 + "01234567"
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = services.check_trackers(services.ask_wandb())
    assert (found.state, found.text) == (OK, "W&B is offline (WANDB_MODE), tensorboard is installed")
    monkeypatch.delenv("WANDB_MODE")
    found = services.check_trackers(services.ask_wandb())
    assert found.state == MISSING and found.fix.startswith("wandb login"), found
    monkeypatch.setenv("WANDB_API_KEY", key)
    found = services.check_trackers(services.ask_wandb())
    assert found.state == OK and "has a key for https://" in found.text and key not in str(found)
    package("mlflow", "raise OSError('not imported')")
    package("comet_ml", "raise OSError('not imported')")
    found = services.check_trackers(services.ask_wandb())
    assert "; tensorboard is installed, with the clients of MLflow, Comet" in found.text
    assert found.facts["clients"] == ["MLflow", "Comet"]
    package("wandb", "raise OSError('half a file')")
    found = services.check_trackers(services.ask_wandb())
    assert found.state == PROBLEM and "wandb does not load (exit code 1: OSError: half a file)" in found.text


class Server(BaseHTTPRequestHandler):
    status, asked = 200, []

    def do_HEAD(self) -> None:
        Server.asked.append(self.headers.get("Authorization"))
        self.send_response(Server.status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    for name in ("HF_HUB_OFFLINE", "GLMTUNER_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(("status", "state"), [(200, OK), (401, OK), (404, OK), (503, MISSING), (407, MISSING)])
def test_a_hub_that_answers(server, monkeypatch, status, state):
    monkeypatch.setattr(Server, "status", status)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server}/")
    found = services.check_hub()
    assert found.state == state and f"http://{server} " in found.text and found.facts["reachable"] is (state == OK)


def test_no_secret_of_the_hub_is_shown(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{SECRET}@{server}")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = diagnose.redacted(services.check_hub())
    assert found.state == OK and "a token is stored" in found.text and found.facts["token"] is True
    assert SECRET not in str(found) and Server.asked[-1].startswith("Basic ")
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{SECRET}@{server}:x")
    assert SECRET not in str(diagnose.redacted(services.check_hub()))


def test_a_hub_that_does_not_answer(server, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for endpoint, reason, state in (
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "", MISSING),
            ("http://127.0.0.1:1", "refused", MISSING),
            ("huggingface.co", "no address", PROBLEM),
        ):
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            monkeypatch.setattr(findings, "NETWORK_SECONDS", 60 if reason else 0.3)
            start = time.monotonic()
            found = services.check_hub()
            assert found.state == state and reason in found.text and "prefetch" in found.fix and not found.stops_runs
            assert time.monotonic() - start < 30


def test_offline(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline: HF_HUB_OFFLINE is set" in services.check_hub().text
    monkeypatch.setenv("GLMTUNER_OFFLINE", str(tmp_path))
    found = services.check_hub()
    assert found.stops_runs and "no manifest.json" in found.text and f"prefetch --folder {tmp_path}" in found.fix
    (tmp_path / "manifest.json").write_text("{}")
    assert services.check_hub().state == OK


# -- the command --------------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_is_a_line():
    def fails() -> Finding:
        raise KeyError("x")

    found = diagnose.guarded("SLURM", fails)
    assert (found.state, found.text, found.stops_runs) == (PROBLEM, "could not be looked at (KeyError: 'x')", False)
    assert diagnose.guarded("memory", fails).stops_runs


def run_doctor(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """The command, in a child that then says which of these modules it has imported."""
    spy = "import sys; from glmtuner.cli.main import main; c = main(sys.argv[1:]); print('LOADED', *sys.modules); sys.exit(c)"
    return subprocess.run(
        [sys.executable, "-c", spy, "doctor", *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command(tmp_path):
    done = run_doctor(
        tmp_path, "--json", WANDB_MODE="offline", HF_HUB_OFFLINE="1", HF_TOKEN=SECRET, WANDB_API_KEY=SECRET
    )
    told, _, loaded = done.stdout.partition("LOADED")
    found = json.loads(told)
    subjects = [each["subject"] for each in found["findings"]]
    assert subjects == [
        "glmtuner",
        "GPU",
        "precision",
        "kernels",
        "memory",
        "CPU",
        "SLURM",
        "trackers",
        "hub",
        "extras",
    ]
    assert done.returncode == 0 and found["ok"] is True, done.stdout + done.stderr
    by_name = {each["subject"]: each for each in found["findings"]}
    assert by_name["precision"]["facts"]["int4"] == by_name["precision"]["facts"]["int8"] == ""
    assert by_name["CPU"]["facts"]["threads"] == int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    assert SECRET not in done.stdout + done.stderr and done.stderr == ""
    assert not {"torch", "transformers", "rich", "hydra", "wandb"} & {*loaded.split()}
    assert list(tmp_path.iterdir()) == []


def test_the_command_beside_broken_packages(tmp_path, package):
    folder = package("torch", "raise OSError('libtorch_cpu.so: file too short')")
    for name in ("hydra", "omegaconf", "rich", "psutil"):
        package(name, "raise ImportError('damaged')")
    done = run_doctor(tmp_path, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", WANDB_MODE="offline", HF_HUB_OFFLINE="1",
                      GLMTUNER_OFFLINE=str(tmp_path))  # fmt: skip
    lines = done.stdout.partition("LOADED")[0].splitlines()
    assert done.returncode == 1 and len(lines) == 10 and done.stderr == "", done.stdout + done.stderr
    assert (
        "import torch fails (OSError: libtorch_cpu.so: file too short)" in lines[0] and "import hydra fails" in lines[0]
    )
    assert [line.split()[1] for line in lines[:1] + lines[4:5] + lines[8:9]] == [PROBLEM] * 3


def test_it_takes_no_run_and_no_overrides(capsys):
    assert main(["doctor", "trainer.seed=1"]) == 2 and "takes no overrides" in capsys.readouterr().err
    assert main(["doctor", "outputs/run"]) == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_lines_in_a_terminal_are_broken_below_what_was_found(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    line = next(diagnose.lines([Finding("GPU", MISSING, "none " * 30, "x")]))
    wrapped = diagnose.wrapped(line).splitlines()
    assert len(wrapped) > 2 and max(map(len, wrapped)) <= 60 and wrapped[1].startswith(" " * 19 + "none")
