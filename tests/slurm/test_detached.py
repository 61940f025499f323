"""Detached sweeps on a real SLURM (`make test-slurm`): nobody waits for them, and their report is written all the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import ENV, WORDS, folders, glmtuner, hurry, lines, processes_of, state_of, submit, wait

ONE = [word for word in WORDS if not word.startswith(("data.dataset=", "trainer.seed="))]
ONE += ["data.dataset=belle_sample", "trainer.seed=1"]


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no SLURM answers: {done.stderr}; type make test-slurm"


def reports(sweep: Path) -> list[str]:
    """The lines of the jobs' output that say that the report was written."""
    said = [path.read_text(encoding="utf-8") for path in sorted((sweep / ".submitit").rglob("*.out"))]
    return [line for text in said for line in text.splitlines() if line.startswith("report: ")]


def test_submit_look_and_read_the_report(tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_steps=150"]
    said, ids = submit(tmp_path, *words, "name=four")
    sweep = tmp_path / "outputs/sweeps/four"
    assert len(ids) == 4 and "python -m glmtuner status outputs/sweeps/four" in said
    assert not (sweep / "report.html").exists()
    wait(lambda: any(lines(folder) >= 1 for folder in folders(sweep)))
    shown = glmtuner(tmp_path, "status", "outputs/sweeps/four")
    assert shown.returncode == 0, shown.stderr
    last = shown.stdout.splitlines()[-1]
    assert " running" in last and " queued" in last, shown.stdout
    assert " of 150" in shown.stdout

    again, same = submit(tmp_path, *words, "name=four")
    assert same and {*same} <= {*ids} and again.count(" already:") == len(same), again  # the others were done by then
    assert "SLURM job" not in "\n".join(line for line in again.splitlines() if "already" not in line)

    wait(lambda: (sweep / "report.html").exists())
    wait(lambda: not any(state_of(job) for job in ids))
    assert len(reports(sweep)) == 1
    assert (sweep / "leaderboard.csv").read_text(encoding="utf-8").count("\n") == 5
    assert all((folder / "metrics.json").is_file() for folder in folders(sweep))
    assert not any((folder / "progress.json").exists() for folder in folders(sweep))
    over = glmtuner(tmp_path, "status", "outputs/sweeps/four", "--watch", "1")
    assert over.stdout.splitlines()[-1].endswith("4 done"), over.stdout
    done = glmtuner(tmp_path, "-m", *words, "name=four", "hydra/launcher=slurm", "hydra.launcher.wait=false")
    assert done.returncode == 0 and done.stdout.count("finished before, not submitted") == 4
    assert "SLURM job" not in done.stdout


def test_a_job_that_dies_twice_at_a_step_stops_and_the_report_is_written_all_the_same(tmp_path: Path) -> None:
    words = [*ONE, "trainer.max_steps=3000", "trainer.save_steps=3000", "name=dying"]
    _, (job,) = submit(tmp_path, *words)
    sweep = tmp_path / "outputs/sweeps/dying"
    for attempt in (1, 2):
        (folder,) = wait(lambda: [each for each in folders(sweep) if lines(each) >= 1 and processes_of(job)])
        os.kill(processes_of(job)[0], signal.SIGKILL)
        if attempt == 1:
            hurry(job)
            (folder / "history.jsonl").unlink(missing_ok=True)  # so that the second attempt is seen to begin
    wait(lambda: (sweep / "report.html").exists())
    wait(lambda: not state_of(job))
    failure = json.loads((folder / "failed.json").read_text())
    file = sweep / f".slurm/attempts/{folder.name}.json"
    assert "has died 2 times without a checkpoint after step 0" in failure["reason"]
    assert f"remove {file} and type the same command" in failure["reason"]
    assert json.loads(file.read_text())["starts"] == 2
    assert len(reports(sweep)) == 1 and "has died 2 times" in (sweep / "report.md").read_text(encoding="utf-8")
    shown = glmtuner(tmp_path, "status", "outputs/sweeps/dying")
    assert "1 failed" in shown.stdout and "has died 2 times" in " ".join(shown.stdout.replace("│", " ").split())

    refused = glmtuner(tmp_path, "-m", *words, "hydra/launcher=slurm", "hydra.launcher.wait=false")
    assert "not submitted" in refused.stdout and refused.returncode == 1
    file.unlink()
    _, (job,) = submit(tmp_path, *words)
    wait(lambda: file.exists() and not (folder / "failed.json").exists() and processes_of(job))
    subprocess.run(["scancel", job], check=True)
    assert json.loads(file.read_text())["starts"] == 1 and not (folder / "failed.json").exists()


def test_a_requeued_job_goes_on_and_is_not_counted_as_dead_for_ever(tmp_path: Path) -> None:
    _, (job,) = submit(tmp_path, *ONE, "name=requeued", "trainer.max_steps=150", "trainer.save_steps=10")
    sweep = tmp_path / "outputs/sweeps/requeued"
    (folder,) = wait(
        lambda: [each for each in folders(sweep) if (each / "checkpoints/checkpoint-10/complete.json").exists()]
    )
    subprocess.run(["scontrol", "requeue", job], check=True)
    hurry(job)
    wait(lambda: not state_of(job))
    assert (folder / "metrics.json").is_file()
    assert json.loads((sweep / f".slurm/attempts/{folder.name}.json").read_text())["starts"] == 2
    assert len(json.loads((folder / "provenance.json").read_text())["resumed"]) == 1
    assert len(reports(sweep)) == 1


def test_a_cancelled_job_stays_cancelled_and_status_writes_the_report(tmp_path: Path) -> None:
    _, ids = submit(tmp_path, *WORDS, "name=cancelled", "trainer.max_steps=4000")
    sweep = tmp_path / "outputs/sweeps/cancelled"
    wait(lambda: any(lines(folder) >= 1 for folder in folders(sweep)))
    subprocess.run(["scancel", ids[0].partition("_")[0]], check=True)
    wait(lambda: not any(state_of(job) for job in ids))
    shown = glmtuner(tmp_path, "status", "outputs/sweeps/cancelled")
    assert shown.stdout.count("dropped") >= 4 and "left the queue" in " ".join(shown.stdout.split())
    assert (sweep / "report.html").is_file()
    assert not any(state_of(job) for job in ids)


def test_the_last_job_writes_the_report_also_if_it_fails(tmp_path: Path) -> None:
    records = [{"instruction": f"{n}?", "input": "", "output": f"{n}!"} for n in range(16)]
    (tmp_path / "good.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "bad.json").write_text(json.dumps([*records, {"instruction": 1, "output": 2}]), encoding="utf-8")
    words = [word for word in ONE if not word.startswith(("data.dataset", "trainer.max_steps"))]
    words += ["data.dataset=good.json,bad.json", "data.dataset_dir=.", "trainer.max_steps=5", "name=failing"]
    _, ids = submit(tmp_path, *words, "hydra.launcher.array_parallelism=1")
    sweep = tmp_path / "outputs/sweeps/failing"
    wait(lambda: not any(state_of(job) for job in ids))
    good, bad = (next(each for each in folders(sweep) if name in each.name) for name in ("good", "bad"))
    assert (bad / "failed.json").stat().st_mtime > (good / "metrics.json").stat().st_mtime
    assert len(reports(sweep)) == 1 and "broken record" in (sweep / "report.md").read_text(encoding="utf-8")


def test_a_command_that_waits_waits_for_what_is_queued_already(tmp_path: Path) -> None:
    _, (job,) = submit(tmp_path, *ONE, "name=both", "+hydra.launcher.additional_parameters.hold=true")
    assert state_of(job) == "PENDING"  # however slowly the next command starts
    words = ["-m", "glmtuner", "-m", *ONE, "name=both", "hydra/launcher=slurm"]
    output = tmp_path / "output.log"
    with output.open("w") as file:
        waiting = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=ENV, stdout=file, stderr=file)
    wait(lambda: f"job 0 is SLURM job {job} already: " in output.read_text(encoding="utf-8"))
    assert waiting.poll() is None
    subprocess.run(["scontrol", "release", job], check=True)
    assert waiting.wait(300) == 0 and "(1 finished" in output.read_text(encoding="utf-8")
    assert len(list((tmp_path / "outputs/sweeps/both/.submitit").glob("[0-9]*"))) == 1


def test_what_sbatch_refuses_is_said(tmp_path: Path) -> None:
    done = glmtuner(
        tmp_path,
        "-m",
        *ONE,
        "name=refused",
        "hydra/launcher=slurm",
        "hydra.launcher.partition=nowhere",
        "hydra.launcher.wait=false",
    )
    assert done.returncode == 2 and "sbatch refused the jobs" in done.stderr and "Traceback" not in done.stderr
