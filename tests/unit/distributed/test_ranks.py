"""The ranks of a run: their environment, how many are started, how they end, and illegal combinations of keys."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.utils import launch as launch_environment

from glmtuner.config.compose import compose
from glmtuner.config.overrides import bracket_lists, parse
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
    ("overrides", "facts"),
    [
        (["parallel.processes=2"], r"parallel\.processes=2 .*parallel=none.* type parallel=ddp"),
        (["parallel=ddp", "parallel.processes=0"], r"parallel\.processes=0: .*null"),
        (["parallel=ddp", "parallel.sequence=0"], r"parallel\.sequence=0: 1 or more"),
        (
            ["parallel=ddp", "parallel.sequence=4", "parallel.processes=6"],
            r"parallel\.sequence=4 with parallel\.processes=6: .* type parallel\.processes=8",
        ),
        (
            ["parallel=ddp", "parallel.sequence=2", "stage=dpo", "data.dataset=preference_sample"],
            r"parallel\.sequence=2 with stage=dpo: only .* stage=sft and stage=pt",
        ),
        (
            ["parallel=fsdp2", "parallel.sequence=2", "data.padding_free=false"],
            r"parallel\.sequence=2 with data\.padding_free=false: .* type data\.padding_free=true",
        ),
        (
            ["parallel=ddp", "parallel.sequence=2", "data.ignore_pad_token_for_loss=false"],
            r"parallel\.sequence=2 with data\.ignore_pad_token_for_loss=false",
        ),
        (
            ["parallel=ddp", "parallel.sequence=2", "trainer.neftune_noise_alpha=5"],
            r"parallel\.sequence=2 with trainer\.neftune_noise_alpha=5",
        ),
        (
            ["parallel=ddp", "parallel.sequence=2", "trainer.average_tokens_across_devices=false"],
            r"parallel\.sequence=2 with trainer\.average_tokens_across_devices=false",
        ),
        (
            ["parallel=ddp", "parallel.sequence=2", "trainer.accelerator_config={split_batches: true}"],
            r"parallel\.sequence=2 with trainer\.accelerator_config",
        ),
        (["parallel=fsdp"], r"parallel=fsdp.*did you mean 'fsdp2'"),
        (["trainer.fsdp=full_shard"], r"trainer\.fsdp=full_shard .*type parallel=fsdp2"),
    ],
)
def test_illegal_combinations_are_refused(overrides: list[str], facts: str) -> None:
    with pytest.raises(ConfigError, match=facts):
        compose(["model=tiny_glm", *overrides])


@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp", "megatron_lm", "parallelism_config"])
def test_a_strategy_of_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """accelerate's own parser has the option that is named, and its launcher sets the variable that is read."""
    from accelerate.commands import launch

    assert f"--use_{strategy}" in launch.launch_command_parser()._option_string_actions
    name = f"ACCELERATE_USE_{strategy.upper()}"
    assert any(
        f'"{name}"' in Path(module.__file__).read_text(encoding="utf-8") for module in (launch, launch_environment)
    )
    run = compose(["model=tiny_glm"]).run
    monkeypatch.setenv(name, "false")
    assert ranks.processes_to_start(run.parallel) == 1
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name}=true.*--use_{strategy}` .*type parallel=fsdp2"):
        ranks.processes_to_start(run.parallel)


def test_processes_that_are_no_groups_are_refused_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose(["model=tiny_glm", "parallel=ddp", "parallel.sequence=2"]).run
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2: .* this run has 3; .*parallel\.processes=4"):
        ranks.processes_to_start(run.parallel)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert ranks.processes_to_start(run.parallel) == 4
    monkeypatch.setenv("WORLD_SIZE", "5")  # as torchrun starts them
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2: .* this run has 5"):
        ranks.processes_to_start(run.parallel)


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


def test_work_is_divided_so_that_every_rank_does_as_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.turns(3) == [0, 1, 2] and ranks.turns(0) == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for count, wanted in ((5, [[0, 4], [1, None], [2, None], [3, None]]), (3, [[0], [1], [2], [None]])):
        for rank, own in enumerate(wanted):
            monkeypatch.setenv("RANK", str(rank))
            assert ranks.turns(count) == own


def test_a_rank_starts_no_more_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.processes_to_start(compose(["parallel=ddp"]).run.parallel) == 1
    assert ranks.processes_to_start(compose(["parallel=ddp", "parallel.processes=4"]).run.parallel) == 1
    with pytest.raises(
        ConfigError, match=r"parallel\.processes=2: .* 4 processes; .*without torchrun, accelerate or srun"
    ):
        ranks.processes_to_start(compose(["parallel=ddp", "parallel.processes=2"]).run.parallel)


def test_the_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "1", "PROCID": "3", "LOCALID": "3", "JOB_ID": "41007"}
    for name, value in {**slurm, "STEP_NODELIST": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ranks.adopt_slurm_env()
    assert {name: os.environ[name] for name in OWN} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "21007",
    }  # fmt: skip
    assert not ranks.is_main() and ranks.world_size() == 4


SCONTROL = """#!/bin/sh
test "$1 $2 $3" = "show node gpu01.invalid" && echo "   NodeAddr=192.0.2.7 NodeHostName=gpu01"
"""


@pytest.mark.skipif(os.name == "nt", reason="a script of sh")
def test_tasks_of_several_nodes_meet_at_the_first_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm = {"STEP_NUM_TASKS": "6", "STEP_NUM_NODES": "3", "PROCID": "5", "LOCALID": "1", "JOB_ID": "7"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    met = []
    for nodes in ("localhost,b", "gpu0[1-2,7].invalid"):
        for name in OWN:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
        ranks.adopt_slurm_env()
        met.append(os.environ["MASTER_ADDR"])
    assert (
        met == ["localhost", "192.0.2.7"] and os.environ["LOCAL_WORLD_SIZE"] == "2"
    )  # by its name, by SLURM's address
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.9")  # as set in the user's script
    ranks.adopt_slurm_env()
    assert os.environ["MASTER_ADDR"] == "192.0.2.9"
    with pytest.raises(ConfigError, match=r"nowhere\.invalid, is no host name .* set MASTER_ADDR"):
        ranks.address_of("nowhere.invalid")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[01-03,07]", "gpu01"),
        ("n[9-11],m2", "n9"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("h[3,1]", "h3"),
        ("x,y", "x"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:  # tests/slurm asks scontrol for the same lists
    assert ranks.first_host(nodes) == first


def test_seconds_without_an_answer_have_a_range() -> None:
    assert compose(["parallel=ddp", "parallel.lost_after=null"]).run.parallel.lost_after is None
    assert compose(["parallel=ddp", "parallel.lost_after=90"]).run.parallel.lost_after == 90
    with pytest.raises(ConfigError, match=r"parallel\.lost_after=5: 10 to 3600 seconds .*trainer\.ddp_timeout"):
        compose(["parallel=ddp", "parallel.lost_after=5"])


def test_ranks_that_do_not_meet_say_where_they_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "MEETING_SECONDS", 1.0)
    port = ranks.free_port()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer = compose(["parallel=ddp", "trainer.ddp_timeout=3", "trainer.use_cpu=true"]).run.trainer
    place = rf"the other ranks at 127\.0\.0\.1:{port}: start the command on every node"
    with pytest.raises(ConfigError, match=rf"rank 1 of 2 on .* has not met, within trainer\.ddp_timeout=3 s, {place}"):
        ranks.init_process_group(trainer, None)
    assert "has waited 1 s for the other ranks at" in capsys.readouterr().err


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    ranks.adopt_slurm_env()
    assert ranks.world_size() == 1 and "RANK" not in os.environ


def test_the_first_rank_that_fails_stops_the_others() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    failing = (
        "import os, time; time.sleep(0.2); os._exit(3) if os.environ['RANK'] == '1' else None; exec(os.environ['ELSE'])"
    )
    began = time.monotonic()
    os.environ["ELSE"] = stubborn
    try:
        with pytest.raises(ranks.RankFailed, match=r"rank 1 of 2 .*exit code 3") as failed:
            ranks.run_ranks([sys.executable, "-c", failing], 2)
    finally:
        del os.environ["ELSE"]
    assert failed.value.code == 3 and failed.value.preempted_by is None and not failed.value.was_killed
    assert time.monotonic() - began < 50


def test_a_signal_is_forwarded_and_is_no_failure() -> None:
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(140))\n"
        "os.environ['RANK'] == '0' and os.kill(os.getppid(), signal.SIGUSR2)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ranks.RankFailed) as failed:
        ranks.run_ranks([sys.executable, "-c", script], 2)
    assert failed.value.preempted_by == signal.SIGUSR2
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
    until = time.monotonic() + 60
    while time.monotonic() < until and os.path.exists(f"/proc/{child}"):
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.parametrize(
    "name", ["it's", 'a "b"', "a\\", "a\\'b,[c]{d}(e)=f", "$HOME %d ~", "中文 😀", " lead", "null"]
)
def test_the_command_of_a_rank_has_the_folder_whatever_its_name(name):
    *_, last = ranks.command_of([], ["trainer.seed=1", "trainer.output_dir=x"], Path("/tmp") / name)
    (normalized,) = bracket_lists([last], multirun=False)
    (override,) = parse([normalized])
    assert override.key_or_group == "trainer.output_dir" and override.value() == f"/tmp/{name}"
