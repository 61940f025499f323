"""hydra/launcher=ray, as far as it needs no Ray; tests/on_ray has the rest."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from glmtuner.cli.main import main
from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.launch.forecast.schedule import launcher_of
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.lost import Lost, add_lost, lost_notes, read_lost
from glmtuner.sweep.folders import RAY_KEYS, job_folders_of, sweep_folder
from glmtuner.sweep.on_ray import cluster, node
from glmtuner.sweep.on_ray.options import GIB, RayOptions

ROOT = Path(__file__).parent.parent.parent.parent
register_presets()
PRESET = yaml.safe_load((ROOT / "conf/hydra/launcher/ray.yaml").read_text(encoding="utf-8"))
VALUES = {name: value for name, value in PRESET.items() if name != "_target_"}
SWEEP = ["-m", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "trainer.seed=1,2", "hydra/launcher=ray"]


# -- keys ---------------------------------------------------------------------------------------------------------------------


def test_the_preset_is_legal_and_no_key_of_it_makes_another_sweep() -> None:
    assert RayOptions.of(OmegaConf.create(VALUES)) == RayOptions(**VALUES)
    assert {*RAY_KEYS} == {*VALUES}
    typed = [f"hydra.launcher.{name}=1" for name in VALUES if name not in ("resources", "runtime_env")]
    more = ["+hydra.launcher.resources.a100=1", "+hydra.launcher.runtime_env.env_vars.A=b", "hydra/launcher=ray"]
    assert sweep_folder(["trainer.seed=1,2", *typed, *more]) == sweep_folder(["trainer.seed=1,2"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("address", "ray://head:10001", "the port of Ray's client (ray://…:10001) is not: type the command on a node"),
        ("address", "head", "hydra.launcher.address=head: legal is null"),
        ("address", "head:port", "such as hydra.launcher.address=10.0.0.1:6379"),
        ("address", 6379, "hydra.launcher.address=6379"),
        ("num_cpus", -1, "hydra.launcher.num_cpus=-1: legal is a number from 0"),
        ("num_gpus", 1.5, "hydra.launcher.num_gpus=1.5: legal is null, a GPU a process"),
        ("num_gpus", True, "hydra.launcher.num_gpus=True"),
        ("memory_gb", 0, "hydra.launcher.memory_gb=0: legal is null, or a number above 0"),
        ("max_parallel", 0, "hydra.launcher.max_parallel=0"),
        ("max_retries", -1, "hydra.launcher.max_retries=-1: legal is a number from 0"),
        ("max_retries", 1.5, "hydra.launcher.max_retries=1.5"),
        ("timeout_min", 0, "hydra.launcher.timeout_min=0: legal is null, or minutes above 0"),
        ("grace_s", 0, "hydra.launcher.grace_s=0: legal is seconds above 0"),
        ("resources", "a100", "hydra.launcher.resources=a100: a mapping; type +hydra.launcher.resources.a100=1"),
        ("resources", {"GPU": 1}, "hydra.launcher.resources.GPU=1: Ray has a key of its own for it; type hydra.launcher.num_gpus"),
        ("resources", {"a100": 0}, "hydra.launcher.resources.a100=0: legal is a number above 0"),
        ("runtime_env", {"env_vars": {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}}, "hydra.launcher.runtime_env holds a secret"),
        ("runtime_env", {"env_vars": {"A": "GLMTUNER_SECRET_0_"}}, "hydra.launcher.runtime_env holds a secret"),
    ],
)  # fmt: skip
def test_an_illegal_value_is_one_paragraph(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RayOptions.of({**VALUES, name: value})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "abcdefgh" not in str(caught.value)


def test_a_launcher_without_its_keys_says_what_to_start_from() -> None:
    with pytest.raises(ConfigError, match=r"hydra.launcher.address is missing; .*/hydra/launcher/ray@_here_"):
        RayOptions.of({"num_cpus": 2})


@pytest.mark.parametrize(
    ("values", "words", "has_gpus", "demand"),
    [
        ({}, [], False, {"CPU": 1}),
        ({}, [], True, {"CPU": 1, "GPU": 1}),
        ({}, ["parallel=ddp", "parallel.processes=2"], True, {"CPU": 1, "GPU": 2}),
        ({}, ["trainer.use_cpu=true"], True, {"CPU": 1}),
        ({"num_gpus": 0}, [], True, {"CPU": 1}),
        ({"num_gpus": 0.5, "num_cpus": 0, "memory_gb": 2}, [], True, {"GPU": 0.5, "memory": 2 * GIB}),
        ({"num_gpus": 4, "resources": {"a100": 1}}, [], False, {"CPU": 1, "GPU": 4, "a100": 1}),
    ],
)
def test_what_a_job_asks_for(
    values: dict[str, Any], words: list[str], has_gpus: bool, demand: dict[str, float]
) -> None:
    run = compose(["model=tiny_glm", *words]).run
    assert RayOptions.of({**VALUES, **values}).demand(run, has_gpus) == demand


NODES = [
    cluster.Node("1", "small", {"CPU": 4.0, "memory": 8.0 * GIB, "node:10.0.0.1": 1.0, "object_store_memory": 1e9}),
    cluster.Node("2", "gpus", {"CPU": 2.0, "GPU": 2.0, "memory": 4.0 * GIB, "accelerator_type:A100": 1.0}),
]


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        ({"CPU": 4}, None),
        ({"CPU": 1, "GPU": 2}, None),
        ({"GPU": 8}, "hydra.launcher.num_gpus=8: a job asks for more than any node has (small: 4 CPU, 8.0 GB of memory; "
                     "gpus: 2 CPU, 2 GPU, 4.0 GB of memory); type hydra.launcher.num_gpus=2 or less, or add a node"),
        ({"CPU": 4, "GPU": 1}, "hydra.launcher.num_cpus=4, hydra.launcher.num_gpus=1: no node has all of it"),
        ({"memory": 9 * GIB}, "hydra.launcher.memory_gb=9.0: a job asks for more than any node has"),
        ({"h100": 1}, "leave hydra.launcher.resources.h100 out, or add a node"),
    ],
)  # fmt: skip
def test_what_no_node_has_is_named(demand: dict[str, float], said: str | None) -> None:
    found = cluster.unplaceable(demand, NODES)
    assert found is None if said is None else said in str(found)


def test_a_cluster_of_no_node() -> None:
    assert "it has no node" in str(cluster.unplaceable({"CPU": 1}, []))


# -- before Ray ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, ModuleSpec("ray", None, is_package=True)], ids=["none", "a folder named ray"])
def test_a_missing_package_is_one_sentence(
    spec: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "ray" else find(name, *more))
    monkeypatch.chdir(tmp_path)
    assert main(SWEEP) == 2
    said = capsys.readouterr().err.strip()
    assert (
        said.startswith("glmtuner: hydra/launcher=ray needs the package ray") and "pip install 'glmtuner[ray]'" in said
    )
    assert "\n" not in said


def test_a_key_of_the_shared_launcher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep has one launcher: jobs that share a base do not go through Ray."""
    assert main([*SWEEP, "hydra.launcher.jobs_at_once=2"]) == 2
    assert "unknown key 'hydra.launcher.jobs_at_once'" in capsys.readouterr().err


def answering(content: bytes) -> int:
    """The port of a server that answers the first connection with these bytes, and closes it."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()

    def serve() -> None:
        connection, _ = server.accept()
        with connection, server:
            connection.recv(1000)
            connection.sendall(content)

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def test_a_grpc_server_is_told_from_others() -> None:
    cluster.check_server(f"127.0.0.1:{answering(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))}")  # an empty SETTINGS frame
    for other in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH-2.0-OpenSSH_9.6\r\n"):
        with pytest.raises(
            ConfigError, match=r"what answers there is no Ray; type hydra.launcher.address=<host>:<port> as"
        ):
            cluster.check_server(f"127.0.0.1:{answering(other)}")


# -- on a node ----------------------------------------------------------------------------------------------------------------


def asked(tmp_path: Path, **more: Any) -> dict[str, Any]:
    marker = tmp_path / ".ray/seen"
    marker.parent.mkdir(exist_ok=True)
    marker.write_text("seen")
    version = subprocess.run(
        [sys.executable, "-c", node.VERSION], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "env": dict(os.environ), "env_vars": {}, "gpus": 0.0, "cwd": str(tmp_path), "version": version, "marker": str(marker),
        "limit_s": None, "grace_s": 30.0, **more,
    }  # fmt: skip


def test_a_node_says_why_it_cannot_run_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "VISIBLE_SECONDS", 0.1)
    assert node.look(asked(tmp_path)) == {"host": socket.gethostname(), "problem": None}
    assert "does not see the sweep's folder" in str(node.problem(asked(tmp_path, marker=str(tmp_path / "x/.ray/no"))))
    assert "in which the command was typed" in str(node.problem(asked(tmp_path, cwd=str(tmp_path / "missing"))))
    assert "and this machine 9.9" in str(node.problem(asked(tmp_path, version="9.9")))
    (tmp_path / "glmtuner.py").write_text("raise ImportError('broken here')")
    found = node.problem(asked(tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert "has no glmtuner (ImportError: broken here)" in str(found)


def test_a_job_has_the_environment_of_the_command_but_for_the_machines_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "CUDA_VISIBLE_DEVICES": "3",
        "RAY_JOB_ID": "1",
        "HOSTNAME": "node",
        "OMP_NUM_THREADS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    typed = {
        "CUDA_VISIBLE_DEVICES": "0",
        "RAY_ADDRESS": "x",
        "HOSTNAME": "login",
        "HF_TOKEN": "t",
        "NCCL_DEBUG": "WARN",
    }
    found = node.environment(asked(tmp_path, env=typed, env_vars={"NCCL_DEBUG": "INFO"}, gpus=1.0))
    expected = {
        "CUDA_VISIBLE_DEVICES": "3",
        "HOSTNAME": "node",
        "OMP_NUM_THREADS": "2",
        "HF_TOKEN": "t",
        "NCCL_DEBUG": "INFO",
    }
    assert {name: found[name] for name in expected} == expected and not [
        name for name in found if name.startswith("RAY_")
    ]
    assert node.environment(asked(tmp_path, gpus=0.0))["CUDA_VISIBLE_DEVICES"] == ""


SAVES = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (print(143), sys.exit(0))); open('up', 'w'); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w'); time.sleep(60)"


@pytest.mark.parametrize(
    ("source", "limit", "cancel", "outcome"),
    [
        ("print(2)", None, False, (2, "")),
        ("import os; os.kill(os.getpid(), 9)", None, False, (-9, "")),
        (SAVES, None, True, (143, "cancelled")),
        (SAVES, 0.1, False, (143, "limit")),
        (STUBBORN, None, True, (-9, "cancelled")),
    ],
)
def test_a_job_is_watched(
    source: str, limit: float | None, cancel: bool, outcome: tuple[int, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    if limit or cancel:
        wait(lambda: (tmp_path / "up").exists())  # it ignores, or handles, the signal from then on
    grace = 0.5 if source == STUBBORN else 30.0
    assert node.watched(process, {"limit_s": limit, "grace_s": grace}, [2] if cancel else []) == outcome


def wait(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_an_attempt_waits_for_the_end_of_the_lost_one(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    hold = (
        "import fcntl, sys; f = open('.lock', 'ab'); fcntl.flock(f, fcntl.LOCK_EX); open('held', 'w'); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, cwd=tmp_path)
    wait(lambda: (tmp_path / "held").exists())
    waited = threading.Thread(target=node.wait_for_lock, args=(lock, []))
    waited.start()
    waited.join(0.5)
    assert waited.is_alive()
    holder.kill()
    holder.wait()
    assert holder.stdin is not None
    holder.stdin.close()
    waited.join(30)
    assert not waited.is_alive()
    node.wait_for_lock(tmp_path / "no_lock", [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal at a parent's death is Linux'")
def test_the_process_of_a_job_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    starts = (
        "import os, subprocess, sys\n"
        "env = {**os.environ, 'GLMTUNER_WORKER_PARENT': str(os.getpid())}\n"
        "child = subprocess.Popen([sys.executable, '-m', 'glmtuner.cli.worker'], stdin=subprocess.PIPE, env=env)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # its request is a line of its input, which its parent never sends
    wait(lambda: b"glmtuner.cli.worker" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait(lambda: not is_alive(child))


def is_alive(pid: int) -> bool:
    """Whether the process executes: a zombie, which nobody has waited for, does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# -- what is said afterwards --------------------------------------------------------------------------------------------------


def test_lost_attempts_are_kept_and_reported(tmp_path: Path) -> None:
    assert lost_notes(tmp_path) == []
    for step in (10, 20):
        (tmp_path / ".ray").mkdir(exist_ok=True)
        add_lost(tmp_path, "job_a", Lost("host1", "2026-01-01T00:00:00+00:00", "NodeDiedError", step))
    add_lost(tmp_path, "job_b", Lost("host2", "2026-01-02T00:00:00+00:00", "NodeDiedError", 0))
    first, second = lost_notes(tmp_path)
    assert first.startswith("job_a was started again 2 times, after its node on Ray was lost: host1 at 2026-01-01")
    assert "then from step 10; " in first and first.endswith("then from step 20.")
    assert "job_b was started again once" in second and [len(each) for each in read_lost(tmp_path).values()] == [2, 1]
    (tmp_path / ".ray/lost.json").write_text(json.dumps({"job_a": [{"where": 1}]}))
    assert "is damaged" in lost_notes(tmp_path)[0]


def test_a_key_that_is_typed_twice_names_the_folders_that_hydra_uses(tmp_path: Path) -> None:
    words = ["trainer.seed=1,2", "trainer.seed=1"]
    assert job_folders_of(tmp_path, words, None) == job_folders_of(tmp_path, ["trainer.seed=1,1"], None)


def test_a_sweep_whose_jobs_have_not_begun_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glmtuner.sweep.job.run_job", lambda config: None)
    words = [word for word in SWEEP if not word.startswith("hydra/launcher")]
    assert main([*words, "name=none"]) == 1
    assert "glmtuner: 2 of 2 jobs have not begun, such as seed-1_" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_parallel": 1}, (1, False, None, 0)),
        ({"address": "auto", "max_parallel": 6, "num_gpus": 2}, (6, True, 2, 0)),
        ({"address": "auto"}, (1, True, None, 1)),
    ],
)
def test_a_forecast_knows_the_keys(values: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = launcher_of(OmegaConf.create({"launcher": {**PRESET, **values}}))
    assert (found.at_once, found.remote, found.gpus, len(found.notes)) == expected and not found.shares_process
