"""A race by the command line: its winner is that of an undisturbed run, and killed anywhere it ends the same."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from glmtuner.cli.main import main
from glmtuner.run_folder.folder import job_folders

ROOT = Path(__file__).parents[2]
RUN = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=40", "data.dev_ratio=0.4",
    "data.max_target_length=32", "trainer.do_eval=true", "trainer.max_steps=8", "trainer.logging_steps=3",
    "trainer.eval_strategy=steps", "trainer.eval_steps=4", "trainer.save_steps=3", "trainer.disable_tqdm=true",
]  # fmt: skip
RACE = ["-m", "hydra/sweeper=race", *RUN, "hydra.sweeper.rungs=[2,4]"]
RATES = "trainer.learning_rate=1e-2,1e-6"
BEST, WORST = "learning_rate-0.01", "learning_rate-1e-06"
RESULTS = ("history.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors")


def folders(sweep: Path) -> dict[str, Path]:
    return {folder.path.name.rpartition("_")[0]: folder.path for folder in job_folders(sweep)}


def decisions(sweep: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((sweep / "race").glob("rung-*.json"))]


def states(rung: dict) -> dict[str, str]:
    return {job["job"].rpartition("_")[0]: job["state"] for job in rung["jobs"]}


def same_results(one: Path, other: Path, names: Sequence[str] = RESULTS) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), (one, name)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    timeless = [
        {name: value for name, value in found.items() if not re.search("runtime|second|memory", name)}
        for found in metrics
    ]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a race of two jobs that nothing disturbed, and what it printed."""
    here, out = tmp_path_factory.mktemp("raced"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(here)
        patch.setenv("COLUMNS", "160")
        assert main([*RACE, RATES, "name=race"]) == 0
    return here / "outputs/sweeps/race", out.getvalue()


def test_the_winner_of_a_race_is_that_of_a_run_that_was_never_paused(
    raced: tuple[Path, str], glmtuner: Callable, tmp_path: Path
) -> None:
    sweep, printed = raced
    first, second = decisions(sweep)
    assert states(first) == {BEST: "best", WORST: "goes on"}  # the first rung measures only
    assert states(second) == {BEST: "best", WORST: "dropped"}
    assert "rung 2 of 2, after step 4: loss on 16 records" in printed

    alone = glmtuner(*RUN, "trainer.learning_rate=1e-2", "trainer.output_dir=alone")
    assert alone.returncode == 0, alone.stderr
    same_results(folders(sweep)[BEST], tmp_path / "alone")
    history = map(json.loads, (tmp_path / "alone/history.jsonl").read_text().splitlines())
    (at_4,) = [line["eval_loss"] for line in history if "eval_loss" in line and line["step"] == 4]
    assert second["jobs"][0]["value"] == pytest.approx(at_4, abs=1e-6)  # the run's own evaluation at that step


def test_dropped_jobs_are_reported_with_their_evidence_and_can_be_called_back(
    raced: tuple[Path, str], glmtuner: Callable, tmp_path: Path
) -> None:
    shutil.copytree(raced[0], tmp_path / "outputs/sweeps/race")
    sweep = tmp_path / "outputs/sweeps/race"
    second = decisions(sweep)[1]
    assert "1 dropped" in raced[1].rpartition("sweep folder:")[2]
    with (sweep / "leaderboard.csv").open(encoding="utf-8") as file:
        lines = {line["job"]: line for line in csv.DictReader(file)}
    gone = next(job for job in second["jobs"] if job["state"] == "dropped")
    line = lines[gone["job"]]
    assert line["state"] == "dropped" and line["reason"].startswith("rung 2 of 2 (step 4 of 8): loss ")
    assert f"{gone['gap']:.4f} [{gone['low']:.4f}, {gone['high']:.4f}] behind the best" in line["reason"]
    assert "the race has trained 12 of the 16 steps" in raced[1].lower()
    for page in ("report.md", "report.html"):
        text = (sweep / page).read_text(encoding="utf-8")
        assert "hydra.sweeper.recall=" in text and "steps of the grid" in text and f"{gone['gap']:.4f}" in text

    # the same command decides nothing again and trains nothing again; a dropped job that is called back ends like its twin
    kept = {path: path.stat().st_mtime_ns for path in sweep.glob("race/*.json")}
    called = glmtuner(*RACE, RATES, "name=race", f"hydra.sweeper.recall=[{WORST}]")
    assert called.returncode == 0, called.stderr
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("race/*.json")} == kept
    assert called.stdout.count("resumed from") == 1
    assert glmtuner(*RUN, "trainer.learning_rate=1e-6", "trainer.output_dir=alone_too").returncode == 0
    same_results(folders(sweep)[WORST], tmp_path / "alone_too")

    # what the decisions do not fit is refused, and not decided anew
    other = glmtuner(*RACE, RATES, "name=race", "hydra.sweeper.alpha=0.2")
    assert other.returncode == 2 and "hydra.sweeper.alpha=0.05, and this command has 0.2" in other.stderr
    more = glmtuner(*RACE, f"{RATES},1e-4", "name=race")
    assert more.returncode == 2 and "learning_rate-0.0001_" in more.stderr and "is new" in more.stderr
    typo = glmtuner(*RACE, RATES, "name=race", "hydra.sweeper.recall=[learning_rate-1e-5]")
    assert typo.returncode == 2 and "did you mean 'learning_rate-1e-06'" in typo.stderr, typo.stderr
    (sweep / "race/rung-1.json").write_text("{")
    damaged = glmtuner(*RACE, RATES, "name=race")
    assert damaged.returncode == 2 and "rung-1.json is damaged" in damaged.stderr
    assert all("Traceback" not in each.stderr and each.stderr.count("\n") == 1 for each in (other, more, typo, damaged))


def test_a_pause_without_evaluation_records_is_refused_before_training(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMTUNER_PAUSE_AT", "2")
    words = [word for word in RUN if not word.startswith(("data.dev_ratio", "trainer.do_eval", "trainer.eval_"))]
    done = glmtuner(*words, "trainer.output_dir=run")
    assert done.returncode == 2 and "GLMTUNER_PAUSE_AT=2: a training pauses to be evaluated" in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


class Killed(BaseException):
    """Nothing of the process is left."""


EVENTS = [
    *(f"in the evaluation of {pause}, {job}" for pause in (2, 4) for job in (BEST, WORST)),
    *(f"{moment} rung-{number}.json" for number in (1, 2) for moment in ("before", "after")), "on the way to the end",
]  # fmt: skip


@pytest.mark.heavy
def test_killed_in_and_after_every_rung_a_race_ends_the_same(
    raced: tuple[Path, str],
    glmtuner: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from glmtuner.launch import pause
    from glmtuner.sweep import race
    from glmtuner.training import trainer as training

    seen: list[str] = []
    written, decided, stepped = pause.write_json, race.write_json, training.GlmTrainer.training_step

    def at(event: str) -> None:
        """Each event kills the race when it first happens."""
        if event in EVENTS and event not in seen:
            seen.append(event)
            raise Killed(event)

    def write_pause(path: Path, value: object) -> None:
        at(f"in the evaluation of {path.parent.name}, {path.parents[2].name.rpartition('_')[0]}")
        written(path, value)

    def write_decision(path: Path, value: object) -> None:
        at(f"before {path.name}")
        decided(path, value)
        at(f"after {path.name}")

    def step(self, *given, **named):
        if self.state.global_step == 5:
            at("on the way to the end")
        return stepped(self, *given, **named)

    monkeypatch.setattr(pause, "write_json", write_pause)
    monkeypatch.setattr(race, "write_json", write_decision)
    monkeypatch.setattr(training.GlmTrainer, "training_step", step)
    killed = tmp_path / "outputs/sweeps/killed"
    for _ in range(len(EVENTS) + 1):
        try:
            done = glmtuner(*RACE, RATES, "name=killed")
            break
        except Killed:
            for folder in job_folders(killed):
                folder.unlock()  # as the end of a process does
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(seen) == sorted(EVENTS)
    for number in (1, 2):
        name = f"race/rung-{number}.json"
        assert (killed / name).read_bytes() == (raced[0] / name).read_bytes()
    same_results(folders(killed)[BEST], folders(raced[0])[BEST])


@pytest.mark.heavy
def test_a_job_that_fails_or_does_not_fit_leaves_the_race_with_its_reason(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from glmtuner.launch import run as launch

    trained = launch.train

    def train(context, *given):
        if context.run.trainer.learning_rate == 1e-6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
        if context.run.trainer.learning_rate == 3e-3:
            raise RuntimeError("a cable was pulled")
        return trained(context, *given)

    monkeypatch.setattr(launch, "train", train)
    done = glmtuner(*RACE, f"{RATES},3e-3", "name=failing", "trainer.max_steps=5")
    sweep = tmp_path / "outputs/sweeps/failing"
    assert done.returncode == 1
    (first,) = decisions(sweep)  # one job is left, which nobody can drop
    assert [*states(first).values()] == ["best", "out of memory", "failed"]
    assert first["jobs"][2]["reason"] == "RuntimeError: a cable was pulled"
    assert "hydra.sweeper.recall=[<job>] runs it again" in done.stderr
    monkeypatch.setattr(launch, "train", trained)
    name = first["jobs"][2]["job"]
    called = glmtuner(*RACE, f"{RATES},3e-3", "name=failing", "trainer.max_steps=5", f"hydra.sweeper.recall=[{name}]")
    assert called.returncode == 0 and "(2 finished, 1 did not fit into memory, 0 failed)" in called.stdout, (
        called.stdout
    )
    assert decisions(sweep) == [first]


@pytest.mark.heavy
def test_a_race_by_scores_of_answers_and_by_rank(glmtuner: Callable, tmp_path: Path) -> None:
    words = [
        *(word for word in RUN if not word.startswith(("data.max_samples", "trainer.max_steps", "trainer.eval_"))),
        "data.max_samples=12", "trainer.max_steps=4", "trainer.do_predict=true", "trainer.predict_with_generate=true",
        "generation.max_new_tokens=8", "objective=rouge-l",
    ]  # fmt: skip
    rule = ["hydra.sweeper.rule=halving", "hydra.sweeper.reduction_factor=2", "hydra.sweeper.rungs=[2]"]
    done = glmtuner("-m", "hydra/sweeper=race", *words, *rule, "trainer.learning_rate=3e-2,1e-6", "name=scores")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs/sweeps/scores"
    (rung,) = decisions(sweep)
    assert (rung["metric"], rung["records"]) == ("rouge-l", 5)
    for job in rung["jobs"]:
        about = json.loads((sweep / job["job"] / "pauses/2/pause.json").read_text())
        assert job["value"] == pytest.approx(about["metrics"]["rouge-l"])  # the metric's own mean
    best, dropped = sorted(rung["jobs"], key=lambda job: job["place"])
    assert (best["state"], dropped["state"]) == ("best", "dropped") and best["value"] >= dropped["value"]
    (winner,) = [folder.path for folder in job_folders(sweep) if folder.is_finished]
    assert winner.name == best["job"]
    rate = "3e-2" if "0.03" in winner.name else "1e-6"
    assert glmtuner(*words, f"trainer.learning_rate={rate}", "trainer.output_dir=alone").returncode == 0
    same_results(winner, tmp_path / "alone")
    assert (winner / "predictions.jsonl").read_bytes() == (tmp_path / "alone/predictions.jsonl").read_bytes()


@pytest.mark.heavy
@pytest.mark.matrix
def test_a_race_of_12_picks_the_winner_of_the_grid_or_one_that_is_not_apart_from_it(
    glmtuner: Callable, tmp_path: Path
) -> None:
    grid = [  # the command of docs/race.md
        "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.dev_ratio=0.3", "trainer.do_eval=true",
        "trainer.max_steps=50", "finetuning.lora_rank=2,8", "trainer.learning_rate=3e-2,1e-2,3e-3,1e-3,1e-4,1e-5",
    ]  # fmt: skip
    raced = glmtuner("-m", "hydra/sweeper=race", *grid, "name=race")
    assert raced.returncode == 0, raced.stdout + raced.stderr
    whole = glmtuner("-m", *grid, "name=grid")
    assert whole.returncode == 0, whole.stdout + whole.stderr

    def board(name: str) -> list[dict[str, str]]:
        with (tmp_path / f"outputs/sweeps/{name}/leaderboard.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    picked = next(line for line in board("race") if line["rank"] == "1")
    of_grid = next(line for line in board("grid") if line["job"] == picked["job"])
    assert of_grid["rank"] == "1" or of_grid["told_apart"] == "false", of_grid
    same_results(
        tmp_path / "outputs/sweeps/race" / picked["job"], tmp_path / "outputs/sweeps/grid" / picked["job"], RESULTS[:3]
    )
    trained, steps = re.findall(r"has trained (\d+) of the (\d+) steps", raced.stdout)[0]
    assert int(steps) == 12 * 50 and int(trained) < 0.6 * 12 * 50


@pytest.mark.heavy
@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_signals_at_any_moment_change_no_decision(
    launcher: str, raced: tuple[Path, str], glmtuner_process: Callable, tmp_path: Path
) -> None:
    words = [*RACE, RATES, "name=killed", *(["hydra/launcher=joblib"] if launcher == "joblib" else [])]
    killed, moments = tmp_path / "outputs/sweeps/killed", random.Random(launcher)
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner", *words], cwd=tmp_path, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )  # fmt: skip
        time.sleep(moments.uniform(4, 14))
        if process.poll() is None:  # the command and its jobs, as the end of a terminal does
            os.killpg(process.pid, signum)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # joblib waits for its jobs, which had not yet begun to listen
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    done = glmtuner_process(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert decisions(killed) == decisions(raced[0])
    same_results(folders(killed)[BEST], folders(raced[0])[BEST])
