"""One run on the two nodes of a real SLURM (`make test-slurm`): by srun, as the job of a sweep, and when a node goes down in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_cluster import ENV, glmtuner, hurry, lines, state_of, wait

from glmtuner.distributed.ranks import first_host
from glmtuner.run_folder.folder import job_folders

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=32", "data.max_target_length=32",
    "finetuning.lora_dropout=0", "trainer.learning_rate=1e-3", "trainer.lr_scheduler_type=constant",
    "trainer.logging_steps=1", "trainer.disable_tqdm=true",
]  # fmt: skip
SHORT = [*WORDS, "trainer.max_steps=12"]
TWO = "trainer.per_device_train_batch_size=4"
NODES = ["hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no SLURM answers: {done.stderr}; type make test-slurm"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Waits for a run of one process with the same batches, which goes on beside the others, and returns its folder."""
    here = tmp_path_factory.mktemp("alone")
    words = [*WORDS, "trainer.per_device_train_batch_size=8", "trainer.max_steps=90", "trainer.output_dir=alone"]
    with (here / "log").open("w") as file:
        run = subprocess.Popen([sys.executable, "-m", "glmtuner", *words], cwd=here, env=ENV, stdout=file, stderr=file)

    def ended() -> Path:
        assert run.wait(600) == 0, (here / "log").read_text()
        return here / "alone"

    yield ended
    run.kill()
    run.wait()


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def same_losses(folder: Path, wanted: Path, steps: int) -> None:
    mine, theirs = history(folder), history(wanted)[:steps]
    assert len(mine) == len(theirs) == steps
    for line, other in zip(mine, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def is_idle(name: str) -> bool:
    """Whether the node is free; one that is down is brought back, if it does not come back by itself."""
    command = ["sinfo", "--noheader", "--Node", f"--nodes={name}", "--format=%T"]
    state = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if state.startswith("down"):
        subprocess.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False, capture_output=True)
    return state == "idle"


@pytest.mark.parametrize(
    "names", ["gpu[01-03,07]", "n[9-11],m2", "login,gpu1", "rack[1-2]n[03-04]", "a-b[007]", "x", "h[3,1]"]
)
def test_the_first_host_of_a_list_is_that_of_scontrol(names: str) -> None:
    told = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
    assert first_host(names) == told.stdout.split()[0]


def test_one_run_on_two_nodes_learns_what_one_process_learns(tmp_path: Path, alone: Callable[[], Path]) -> None:
    """srun with fsdp2, and a sweep of jobs of two nodes with ddp and fsdp2: one folder each, one log."""
    here = tmp_path
    srun = ["srun", "-N2", "--ntasks-per-node=1", "--chdir", str(here)]
    by_srun = [*srun, sys.executable, "-m", "glmtuner", *SHORT, TWO, "parallel=fsdp2", "trainer.output_dir=by_srun"]
    done = subprocess.run(by_srun, cwd=here, env=ENV, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("run folder") == 2 and done.stdout.count("step 1 of 12") == 1  # one of the two speaks
    job_words = [*SHORT, TWO, "parallel=ddp,fsdp2", "name=jobs", "hydra/launcher=slurm", *NODES]
    jobs = glmtuner(here, "-m", *job_words)
    assert jobs.returncode == 0, jobs.stdout + jobs.stderr
    swept = [folder.path for folder in job_folders(here / "outputs/sweeps/jobs")]
    assert len(swept) == 2
    for folder in (here / "by_srun", *swept):
        same_losses(folder, alone(), 12)
        assert json.loads((folder / "checkpoints/checkpoint-12/complete.json").read_text())["ranks"] == 2


def cluster() -> str:
    """What the devices and namespaces of this SLURM are called after: the port of its controller."""
    return "slurm" + re.search(r"SlurmctldPort=(\d+)", Path(os.environ["SLURM_CONF"]).read_text())[1]


def start_node(name: str) -> None:
    script, state = ROOT / "scripts/local_slurm.sh", Path(os.environ["SLURM_CONF"]).parent
    environment = {**os.environ, "SLURMCTLD_PORT": cluster().removeprefix("slurm")}
    subprocess.run([script, "node", state, name], check=True, env=environment)


def processes_on(place: Path) -> dict[int, str]:
    """The processes of a node, by its network namespace, and what they are called: its daemon, steps, and what they run."""
    inside, found = f"net:[{place.stat().st_ino}]", {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(path / "ns/net") == inside:
                found[int(path.name)] = (path / "comm").read_text().strip()
    return found


def has_no_srun(place: Path) -> bool:
    """Whether the attempt before has gone: its srun ends the step some seconds later, and the new one has the same number."""
    return not place.exists() or "srun" not in processes_on(place).values()


def test_a_machine_that_crashes_and_a_node_that_is_taken_down_are_survived_by_requeue(
    tmp_path: Path, alone: Callable[[], Path]
) -> None:
    sweep = tmp_path / "outputs/sweeps/down"
    words = [
        *WORDS,
        TWO,
        "parallel=fsdp2",
        "parallel.lost_after=10",
        "name=down",
        "trainer.max_steps=90",
        "trainer.save_steps=5",
    ]
    log = tmp_path / "waiting.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "glmtuner", "-m", *words, "hydra/launcher=slurm", *NODES]
        waiting = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=file, stderr=file)
    job = wait(lambda: re.search(r"job 0 is SLURM job (\S+):", log.read_text()))[1]
    first, second = (Path(f"/run/netns/{cluster()}-{name}") for name in ("node01", "node02"))
    restarts = 1
    (folder,) = wait(lambda: [each.path for each in job_folders(sweep) if lines(each.path) > 11])
    if second.exists():
        cable = ["ip", "link", "set", f"{cluster().replace('slurm', 's')}-node02"]
        try:
            subprocess.run([*cable, "down"], check=True)
            for process in processes_on(second):
                os.kill(process, signal.SIGKILL)
            # put back long before SLURM's own SlurmdTimeout of five minutes; it waits for the node to say that it has ended there
            wait(lambda: state_of(job) in ("PENDING", "COMPLETING"), 60)
        finally:
            subprocess.run([*cable, "up"], check=True)
            start_node("node02")
        reason = json.loads((folder / "failed.json").read_text())["reason"]
        assert re.match(
            r"rank 1 on node02 \(process \d+\) cannot be reached from node01, .* no answer for 10 s", reason
        )
        wait(lambda: has_no_srun(first))
        restarts, logged = 2, lines(folder)
        hurry(job)
        wait(lambda: lines(folder) > logged + 5)
    subprocess.run(["scontrol", "update", "NodeName=node02", "State=DOWN", "Reason=taken"], check=True)
    wait(lambda: state_of(job) == "PENDING")
    wait(lambda: is_idle("node02") and has_no_srun(first))
    hurry(job)
    assert waiting.wait(600) == 0, log.read_text()
    assert len(json.loads((folder / "provenance.json").read_text())["resumed"]) == restarts
    same_losses(folder, alone(), 90)
