"""A sweep on a real SLURM (`make test-slurm`): preempted, killed, started again, and equal to an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb_file
from slurm_cluster import job_processes

from glmtuner.run_folder.folder import job_folders

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "-m", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample,alpaca_zh_sample", "data.max_samples=40",
    "data.max_target_length=48", "trainer.max_steps=60", "trainer.logging_steps=5", "trainer.save_steps=20",
    "trainer.seed=1,2", "trainer.learning_rate=1e-3", "trainer.disable_tqdm=true", "objective=train_loss",
]  # fmt: skip
SLURM = ["hydra/launcher=slurm", "hydra.launcher.array_parallelism=2", "hydra.launcher.cpus_per_task=1"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no SLURM answers: {done.stderr}; type make test-slurm"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def undisturbed(here: Path) -> Path:
    """The same sweep, one job after another in one process."""
    done = glmtuner(here, *WORDS, "name=undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    return here / "outputs/sweeps/undisturbed"


def glmtuner(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glmtuner", *words], cwd=here, env=ENV, capture_output=True, text=True, timeout=1500
    )


class Driver:
    """`glmtuner -m … hydra/launcher=slurm`, while it waits for its jobs."""

    def __init__(self, here: Path, *words: str) -> None:
        self.log = here / f"driver_{time.monotonic_ns()}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "glmtuner", *words, *SLURM], cwd=here, env=ENV, stdout=file, stderr=file
            )

    def jobs(self) -> dict[int, str]:
        """SLURM's id of each job, once all are queued."""
        return wait(lambda: {int(n): i for n, i in re.findall(r"job (\d+) is SLURM job (\S+):", self.said())} or None)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self) -> int:
        return self.process.wait(1500)


def wait(condition, seconds: float = 600):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def lines(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def folders(sweep: Path) -> list[Path]:
    return [folder.path for folder in job_folders(sweep)]


def put_back(job: str) -> bool:
    """Whether the job stands in the queue."""
    return "PENDING" in subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout


def hurry(job: str) -> None:
    """SLURM lets a job that was put back wait two minutes; these are waited for here no longer than it takes to say so."""
    wait(lambda: put_back(job))
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def begun(sweep: Path, logged: int, name: str = "") -> Path | None:
    """A job of that name that has logged so many lines and is not done."""
    found = folders(sweep) if sweep.is_dir() else []
    return next((f for f in found if name in f.name and lines(f) >= logged and not (f / "metrics.json").exists()), None)


def same(sweep: Path, other: Path) -> None:
    assert [folder.name for folder in folders(sweep)] == [folder.name for folder in folders(other)]
    for mine, theirs in zip(folders(sweep), folders(other), strict=True):
        for name in ("history.jsonl", "adapter/adapter_model.safetensors"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), (mine, name)
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (mine, theirs)]
        timeless = [
            {key: value for key, value in found.items() if not re.search("runtime|second|memory", key)}
            for found in metrics
        ]
        assert timeless[0] == timeless[1]


def test_a_requeued_job_ends_like_its_undisturbed_twin(here: Path, undisturbed: Path) -> None:
    words = [word for word in WORDS if word != "tracker=none"]
    driver = Driver(here, *words, "tracker=wandb", "name=requeued")
    sweep = here / "outputs/sweeps/requeued"
    jobs = driver.jobs()
    folder = wait(lambda: begun(sweep, 3, "belle"))
    number = 0 if "seed-1" in folder.name else 1
    subprocess.run(["scontrol", "requeue", jobs[number]], check=True)
    hurry(jobs[number])
    assert driver.end() == 0, driver.said()
    assert "(4 finished, 0 did not fit into memory, 0 failed)" in driver.said()
    same(sweep, undisturbed)
    assert len(json.loads((folder / "provenance.json").read_text())["resumed"]) == 1
    assert "the winner" in (sweep / "report.html").read_text(encoding="utf-8").lower()
    assert (sweep / "leaderboard.csv").read_text(encoding="utf-8").count("\n") == 5
    assert (sweep / "pictures/loss.png").is_file()
    sessions = {
        job: [wandb_file.read(path) for path in job.glob("wandb/offline-run-*/*.wandb")] for job in folders(sweep)
    }
    runs = {job: {session.run.run_id for session in found} for job, found in sessions.items()}
    assert len(runs) == 4 and all(len(ids) == 1 for ids in runs.values())  # also of the job that was put back
    assert len(set.union(*runs.values())) == 4
    assert {session.run.run_group for found in sessions.values() for session in found} == {"requeued"}
    (report,) = sweep.glob("wandb/offline-run-*/*.wandb")
    assert (wandb_file.read(report).run.run_group, wandb_file.read(report).run.job_type) == ("requeued", "report")


def test_a_signal_before_the_time_limit_saves_and_requeues(here: Path, undisturbed: Path) -> None:
    driver = Driver(here, *WORDS, "name=signalled")
    sweep = here / "outputs/sweeps/signalled"
    jobs = driver.jobs()
    folder = wait(lambda: begun(sweep, 2, "belle"))
    number = 0 if "seed-1" in folder.name else 1
    # while the job goes back into the queue scancel waits, and then it would signal the one that has begun anew, too
    signals = subprocess.Popen(["scancel", "--signal=USR2", jobs[number]], stderr=subprocess.DEVNULL)
    wait(lambda: put_back(jobs[number]))
    signals.kill()
    signals.wait()
    hurry(jobs[number])
    assert driver.end() == 0, driver.said()
    same(sweep, undisturbed)
    assert len(json.loads((folder / "provenance.json").read_text())["resumed"]) == 1


def test_a_killed_job_is_tried_again_and_nothing_finished_is(here: Path, undisturbed: Path) -> None:
    driver = Driver(here, *WORDS, "name=killed")
    sweep = here / "outputs/sweeps/killed"
    driver.jobs()
    wait(lambda: begun(sweep, 5))
    victim = min(wait(job_processes))
    os.kill(victim, signal.SIGKILL)
    assert driver.end() == 1, driver.said()
    assert "3 finished" in driver.said() and "1 failed" in driver.said()
    kept = {f.name: (f / "metrics.json").stat().st_mtime_ns for f in folders(sweep) if (f / "metrics.json").is_file()}
    assert len(kept) == 3
    again = Driver(here, *WORDS, "name=killed")
    assert again.end() == 0, again.said()
    same(sweep, undisturbed)
    assert {name: (sweep / name / "metrics.json").stat().st_mtime_ns for name in kept} == kept


def test_a_job_of_two_tasks_learns_what_one_process_learns_in_one_folder(here: Path) -> None:
    same_words = [word for word in WORDS if not word.startswith(("data.dataset", "trainer.seed", "trainer.max_steps"))]
    same_words += ["data.dataset=belle_sample", "trainer.max_steps=12", "finetuning.lora_dropout=0", "trainer.seed=1"]
    alone = glmtuner(here, *same_words, "trainer.per_device_train_batch_size=8", "name=alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    two = ["trainer.per_device_train_batch_size=4", "hydra.launcher.tasks_per_node=2", "name=two_tasks"]
    driver = Driver(here, *same_words, *two)
    assert driver.end() == 0, driver.said()
    (one,), (both,) = folders(here / "outputs/sweeps/alone"), folders(here / "outputs/sweeps/two_tasks")
    mine, wanted = ([json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()] for f in (both, one))
    assert len(mine) == len(wanted) == 2
    for line, other in zip(mine, wanted, strict=True):
        assert line == pytest.approx(other, abs=1e-5)
    assert json.loads((both / "checkpoints/checkpoint-12/complete.json").read_text())["ranks"] == 2


def test_a_task_that_dies_ends_its_job_and_the_sweep_goes_on_with_it(here: Path) -> None:
    words = ["trainer.seed=1", "data.dataset=belle_sample", "hydra.launcher.tasks_per_node=2", "name=task_killed"]
    words = [*(word for word in WORDS if not word.startswith(("data.dataset=", "trainer.seed="))), *words]
    driver = Driver(here, *words)
    sweep = here / "outputs/sweeps/task_killed"
    wait(lambda: begun(sweep, 5))
    (second,) = [pid for pid, environment in job_processes().items() if "SLURM_PROCID=1" in environment]
    os.kill(second, signal.SIGKILL)
    assert driver.end() == 1, driver.said()
    again = Driver(here, *words)
    assert again.end() == 0, again.said()
    (folder,) = folders(sweep)
    assert len(json.loads((folder / "provenance.json").read_text())["resumed"]) == 1


def test_a_users_own_plugin_reaches_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "my_plugin.py").write_text((ROOT / "tests/own_plugin.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.json").write_text(json.dumps([{"ask": f"{n}?", "reply": f"{n}!"} for n in range(16)]))
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json", "formatting": "ask_reply"}}')
    done = glmtuner(
        tmp_path, "-m", "plugins=my_plugin", "model=tiny_glm", "tracker=none", "metric=same_length", "finetuning=norms",
        "data.dataset=mine", "data.dataset_dir=.", "data.dev_ratio=0.25", "data.max_target_length=8", "trainer.max_steps=2",
        "trainer.seed=1,2", "trainer.do_predict=true", "trainer.predict_with_generate=true", "objective=same_length",
        "name=plugin", *SLURM,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = job_folders(tmp_path / "outputs/sweeps/plugin")
    assert len(jobs) == 2 and all("predict_same_length" in job.metrics() for job in jobs)
