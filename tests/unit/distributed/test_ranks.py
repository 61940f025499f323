"""Who a process is among the ranks of a run, how many are started, and what cannot be meant."""

import os
import signal
import subprocess
import sys
import time

import pytest

from glmtuner.config.compose import compose
from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OWN, "SLURM_STEP_NUM_TASKS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.processes=2"], "parallel.processes=2 with parallel=none, which is one process; type parallel=ddp"),
        (["parallel=ddp", "parallel.processes=0"], "parallel.processes=0: 1 or more, or null for one a GPU"),
        (["parallel=fsdp2", "quant=int4"], "parallel=fsdp2 with quant=int4: integer weights .* type parallel=ddp"),
        (["parallel=zero3", "quant=int8"], "parallel=zero3 with quant=int8: integer weights .* type parallel=zero2"),
        (["parallel=fsdp"], "no parallel preset of that name; did you mean 'fsdp2'"),
        (["trainer.fsdp=full_shard"], "trainer.fsdp=full_shard is no key here: type parallel=fsdp2"),
        (["trainer.deepspeed=a.json"], "parallel=zero3; a file of your own is parallel.deepspeed_config=a.json"),
    ],
)
def test_what_cannot_be_meant_is_told(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["model=tiny_glm", *words])


@pytest.mark.parametrize(
    ("word", "gpus", "count"),
    [
        ("parallel=none", "0,1,2", 1),
        ("parallel=ddp", "0,1,2", 3),
        ("parallel=fsdp2", "", 1),
        ("parallel.processes=2", "", 2),
    ],
)
def test_one_process_a_gpu_is_started_unless_typed(monkeypatch: pytest.MonkeyPatch, word, gpus, count) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    words = ["parallel=ddp", word] if word.startswith("parallel.") else [word]
    assert ranks.processes_to_start(compose(["model=tiny_glm", *words]).run.parallel) == count


def test_a_rank_starts_no_more_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.processes_to_start(compose(["parallel=ddp"]).run.parallel) == 1
    assert ranks.processes_to_start(compose(["parallel=ddp", "parallel.processes=4"]).run.parallel) == 1
    with pytest.raises(
        ConfigError, match=r"parallel\.processes=2: whoever started this run started 4 processes; leave"
    ):
        ranks.processes_to_start(compose(["parallel=ddp", "parallel.processes=2"]).run.parallel)


def test_srun_s_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "1", "PROCID": "3", "LOCALID": "3", "JOB_ID": "41007"}
    for name, value in {**slurm, "STEP_NODELIST": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ranks.adopt_slurm_env()
    assert {name: os.environ[name] for name in OWN} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "21007",
    }  # fmt: skip
    assert not ranks.is_main() and ranks.world_size() == 4


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    ranks.adopt_slurm_env()
    assert ranks.world_size() == 1 and "RANK" not in os.environ


def test_the_first_that_fails_ends_the_others() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    failing = (
        "import os, time; time.sleep(0.2); os._exit(3) if os.environ['RANK'] == '1' else None; exec(os.environ['ELSE'])"
    )
    began = time.monotonic()
    os.environ["ELSE"] = stubborn
    try:
        with pytest.raises(ranks.RankFailed, match="rank 1 of 2 ended with exit code 3") as failed:
            ranks.run_ranks([sys.executable, "-c", failing], 2)
    finally:
        del os.environ["ELSE"]
    assert failed.value.code == 3 and failed.value.stopped_by is None and not failed.value.killed
    assert time.monotonic() - began < 30


def test_a_signal_is_handed_on_and_told_from_a_failure() -> None:
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(140))\n"
        "os.environ['RANK'] == '0' and os.kill(os.getppid(), signal.SIGUSR2)\n"
        "time.sleep(20)\n"
    )
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ranks.RankFailed) as failed:
        ranks.run_ranks([sys.executable, "-c", script], 2)
    assert failed.value.stopped_by == signal.SIGUSR2
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    rank = "from glmtuner.distributed import ranks; ranks.die_with_parent(); import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    starter = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], env={{**os.environ, 'GLMTUNER_PARENT': str(os.getpid())}})\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and os.path.exists(f"/proc/{child}"):
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{child}")


def test_deepspeed_is_configured_for_what_its_presets_say(monkeypatch: pytest.MonkeyPatch) -> None:
    two = compose(["parallel=zero2", "parallel.offload_optimizer=true"]).run.parallel
    three = compose(["parallel=zero3", "parallel.offload_parameters=true"]).run.parallel
    assert two.arguments()["deepspeed"]["zero_optimization"]["stage"] == 2
    assert two.arguments()["deepspeed"]["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert three.arguments()["deepspeed"]["zero_optimization"]["stage"] == 3
    assert three.arguments()["deepspeed"]["zero_optimization"]["offload_param"]["device"] == "cpu"
    own = compose(["parallel=zero2", "parallel.deepspeed_config=mine.json"]).run.parallel
    assert own.arguments() == {"deepspeed": "mine.json"}
    monkeypatch.setattr("glmtuner.parallel.zero2.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"parallel=zero3 needs the package deepspeed, .* type pip install deepspeed"):
        three.check_machine()
