"""A board on a real SLURM (`make test-slurm`): a sweep is submitted from it, stopped with a checkpoint, and continued."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from acting_board import ActingBoard
from slurm_cluster import WORDS, folders, lines, state_of, wait

ONE = [word for word in WORDS if not word.startswith(("data.dataset=", "trainer.seed=", "trainer.save_steps="))]
ONE += [
    "data.dataset=belle_sample",
    "trainer.seed=1,2",
    "trainer.max_steps=150",
    "trainer.save_steps=1000",
    "name=board",
]
ONE += ["hydra.launcher.array_parallelism=1", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ActingBoard]:
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no SLURM answers: {done.stderr}; type make test-slurm"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = ActingBoard(tmp_path)
    yield made
    made.actions.close()


def test_a_sweep_is_submitted_stopped_and_continued(board: ActingBoard) -> None:
    _, begun = board.post("start", words=[*ONE, "hydra/launcher=slurm"], multirun=True, launcher="slurm")
    ended = board.ended(begun["task"])
    assert ended["code"] == 0 and begun["id"] == "sweeps/board", ended
    sweep = board.outputs / "sweeps/board"
    wait(lambda: any(lines(folder) >= 2 for folder in folders(sweep)))
    assert "cannot be deleted" in board.post("delete", ids=["sweeps/board"])[1]["error"]
    (running,) = folders(sweep)
    _, stopping = board.post("stop", id="sweeps/board")
    told = board.ended(stopping["task"])
    assert told["code"] == 0, told
    assert any(line.startswith("scancel --signal=TERM ") for line in told["lines"])
    assert any(line.startswith("scancel ") and "--signal" not in line for line in told["lines"])
    assert any(f"{running.name}: stopped, and continued from checkpoint-" in line for line in told["lines"])
    assert not (running / "metrics.json").exists() and len(folders(sweep)) == 1

    _, going_on = board.post("continue", id="sweeps/board")
    assert board.ended(going_on["task"])["code"] == 0
    wait(lambda: len([folder for folder in folders(sweep) if (folder / "metrics.json").is_file()]) == 2)
    assert '"resumed"' in (running / "provenance.json").read_text() and os.path.isfile(running / "output.log") is False
    ids = [
        line.partition("|")[0]
        for line in subprocess.run(["squeue", "-h", "-o", "%i|"], capture_output=True, text=True).stdout.split()
    ]
    wait(lambda: not any(state_of(job) for job in ids))
