"""`--check` of runs and sweeps, and budgets: refused before, stopped in between, resumed with more."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORDS = ("model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "trainer.use_cpu=true")
SHORT = (*WORDS, "trainer.max_steps=6", "trainer.per_device_train_batch_size=4", "trainer.save_strategy=no")
RATES = "trainer.learning_rate=1e-3,2e-3,3e-3"


def told_jobs(told) -> list[dict]:
    return json.loads(told.stdout)["jobs"]


def test_a_run_and_a_sweep_are_forecast_by_one_probe(glmtuner, tmp_path):
    """The sums are those of the jobs: what differs in the rate is measured once, and libraries are loaded once."""
    told = glmtuner("--check", *SHORT)
    assert told.returncode == 0, told.stderr
    assert "longest batch" in told.stdout and "fits" in told.stdout
    assert "a few steps of lora are measured (1 of 1)" in told.stdout
    row = next(line for line in told.stdout.splitlines() if line.startswith("│ lora"))
    assert row.split("│")[3].strip() == "6" and row.split("│")[10].strip() == "probe"
    assert "forecast: " in told.stdout.splitlines()[-1] and "start-up" in told.stdout.splitlines()[-1]

    sweep = glmtuner("--check", "-m", *SHORT, RATES, "budget.price_per_cpu_hour=36", "--json")
    assert sweep.returncode == 0, sweep.stderr
    assert "measured (" not in sweep.stderr  # the probe of the run is that of the jobs
    found = json.loads(sweep.stdout)
    first, second, third = found["jobs"]
    assert [job["steps"] for job in found["jobs"]] == [6, 6, 6]
    assert first["parts"] == second["parts"] and second["cpu_hours"] == third["cpu_hours"] < first["cpu_hours"]
    assert found["cpu_hours"] == pytest.approx(sum(job["cpu_hours"] for job in found["jobs"]))
    assert found["money"] == pytest.approx(found["cpu_hours"] * 36)
    assert found["elapsed_seconds"] == pytest.approx(sum(job["seconds"]["wall"] for job in found["jobs"]))
    assert [path for path in tmp_path.iterdir()] == []  # nothing is written here


def test_the_tokens_and_steps_are_those_of_a_run(glmtuner, tmp_path):
    told = glmtuner("--check", *SHORT, "trainer.max_steps=-1", "trainer.num_train_epochs=2", "--json")
    (job,) = told_jobs(told)
    # 124 records of 5,151 tokens in batches of 4, as the plan of a run says
    assert (job["steps"], job["tokens"]) == (62, 2 * 5151)
    assert job["flops"] > 6 * 30_720 * job["tokens"] and job["kilowatt_hours"] is None


def test_jobs_at_the_same_time_take_less_time_and_as_many_hours(glmtuner):
    one = json.loads(
        glmtuner("--check", "-m", *SHORT, RATES, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "--json").stdout
    )
    three = json.loads(
        glmtuner("--check", "-m", *SHORT, RATES, "hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "--json").stdout
    )
    assert three["elapsed_seconds"] == pytest.approx(one["elapsed_seconds"] / 3)
    assert three["cpu_hours"] == one["cpu_hours"] and three["at_once"] == 3


def test_energy_is_that_of_budget_watts_where_the_machine_tells_none(glmtuner):
    found = json.loads(glmtuner("--check", "-m", *SHORT, RATES, "budget.watts=360", "--json").stdout)
    plain = json.loads(glmtuner("--check", "-m", *SHORT, RATES, "--json").stdout)
    seconds = sum(job["seconds"]["wall"] for job in found["jobs"])
    if plain["kilowatt_hours"] is None:  # RAPL cannot be read here
        assert found["kilowatt_hours"] == pytest.approx(seconds * 360 / 3.6e6)
    else:
        assert found["kilowatt_hours"] == plain["kilowatt_hours"]


def test_a_sweep_over_its_budget_is_refused_before_anything_starts(glmtuner, tmp_path):
    words = ("-m", *SHORT, RATES, "name=refused")
    told = glmtuner(*words, "budget.cpu_hours=1e-5")
    assert told.returncode == 2 and len(told.stderr.splitlines()) == 1, told.stderr
    for part in ("budget.cpu_hours=1e-05 is reached by", "the sweep is forecast to take", "budget.forecast=false"):
        assert part in told.stderr
    assert not (tmp_path / "outputs").exists()
    check = glmtuner("--check", *words, "budget.money=0.01", "budget.price_per_cpu_hour=1000")
    assert check.returncode == 2 and "budget.money=0.01 is reached by" in check.stderr and "│ sum" in check.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("budget.gpu_hours=2",), "budget.gpu_hours=2: the jobs run without a GPU; type budget.cpu_hours="),
        (("budget.money=5", "budget.price_per_gpu_hour=2"), "type budget.price_per_cpu_hour="),
        (("budget.cpu_hours=1,2",), "a budget is of the whole sweep"),
        (("budget.cpu_hour=1",), "did you mean 'cpu_hours'"),
        (("budget.money=5",), "without a price"),
    ],
)
def test_a_budget_that_is_not_one_is_refused(glmtuner, tmp_path, words, told):
    said = glmtuner("-m", *SHORT, RATES, *words)
    assert said.returncode == 2 and told in said.stderr and len(said.stderr.splitlines()) == 1, said.stderr
    assert not (tmp_path / "outputs").exists()


def spent(root: Path) -> dict[str, list[float]]:
    """The seconds of the attempts in the sweep's folder, by job."""
    found: dict[str, list[float]] = {}
    for path in sorted((root / ".spent").glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(values["job"], []).append(values["seconds"])
    return found


def finished(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/metrics.json")}


@pytest.mark.heavy
def test_a_budget_that_ends_after_the_second_job_stops_the_third_and_the_same_command_goes_on(glmtuner, tmp_path):
    """The third job saves a checkpoint, the fourth is not started; with more both are finished, as if nothing had been."""
    long = (*WORDS, "trainer.max_steps=24", "trainer.per_device_train_batch_size=8", "trainer.save_strategy=no")
    four = "trainer.seed=1,2,3,4"
    reference = glmtuner("-m", *long, four, "name=whole")
    assert reference.returncode == 0, reference.stderr
    whole = tmp_path / "outputs/sweeps/whole"
    seconds = [times[0] for _, times in sorted(spent(whole).items())]
    assert len(seconds) == 4 and all(seconds)
    usual = sorted(seconds)[1]
    limit = (
        seconds[0] + 1.5 * usual
    ) / 3600  # of the first, which also loads the libraries, of the second, and half of the third
    told = glmtuner("-m", *long, four, "name=cut", f"budget.cpu_hours={limit}", "budget.forecast=false")
    root = tmp_path / "outputs/sweeps/cut"
    assert told.returncode == 1, told.stderr
    done = finished(root)
    assert 1 <= len(done) <= 2
    (stopped,) = {path.parents[1].name for path in root.glob("*/checkpoints/checkpoint-*")} - done
    assert "saves a checkpoint and stops" in told.stdout and "not started, budget.cpu_hours=" in told.stdout
    assert "jobs are finished; the same command with a larger limit goes on" in told.stderr
    total = sum(map(sum, spent(root).values()))
    assert total == pytest.approx(limit * 3600, rel=0.25)

    again = glmtuner("-m", *long, four, "name=cut", f"budget.cpu_hours={limit}", "budget.forecast=false")
    assert again.returncode == 1 and finished(root) == done  # the hours are kept over attempts
    more = glmtuner("-m", *long, four, "name=cut", "budget.cpu_hours=1", "budget.forecast=false")
    assert more.returncode == 0, more.stderr
    assert "resumed from checkpoint-" in more.stdout and len(finished(root)) == 4
    assert len(spent(root)[stopped]) >= 2
    for name in finished(root):
        assert (root / name / "history.jsonl").read_bytes() == (whole / name / "history.jsonl").read_bytes()
        assert (root / name / "adapter/adapter_model.safetensors").read_bytes() == (
            whole / name / "adapter/adapter_model.safetensors"
        ).read_bytes()


@pytest.mark.heavy
@pytest.mark.matrix
def test_a_killed_sweep_keeps_its_hours(glmtuner, tmp_path):
    """SIGKILL while a job trains: what it took counts, is refused by a limit that it has reached, and goes on with more."""
    words = (
        *WORDS,
        "trainer.max_steps=400",
        "trainer.save_steps=10",
        "trainer.seed=1,2",
        "name=killed",
        "budget.forecast=false",
    )
    root = tmp_path / "outputs/sweeps/killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    sweep = subprocess.Popen(
        [sys.executable, "-m", "glmtuner", "-m", *words], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 1500
    while not (list(root.glob("*/checkpoints/checkpoint-*")) and sum(map(sum, spent(root).values())) > 1):
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    sweep.kill()
    sweep.wait()
    took = sum(map(sum, spent(root).values()))
    told = glmtuner("-m", *words, f"budget.cpu_hours={took / 3600}")
    assert told.returncode == 1 and told.stdout.count("not started, budget.cpu_hours=") == 2, told.stdout
    assert sum(map(sum, spent(root).values())) == took  # no attempt was made
    more = glmtuner("-m", *words, f"budget.cpu_hours={took / 3600 + 1}")
    assert more.returncode == 0 and "resumed from checkpoint-" in more.stdout, more.stderr
    assert len(finished(root)) == 2 and sum(map(sum, spent(root).values())) > took


def test_finished_jobs_and_spent_hours_are_part_of_the_forecast(glmtuner, tmp_path):
    """Finished jobs take nothing more, an equal one takes what they took, and what is spent counts towards the limit."""
    assert glmtuner("-m", *SHORT, "trainer.learning_rate=1e-3,2e-3", "name=half").returncode == 0
    root = tmp_path / "outputs/sweeps/half"
    took = [times[0] for times in spent(root).values()]
    found = json.loads(glmtuner("--check", "-m", *SHORT, RATES, "name=half", "--json").stdout)
    assert [job["state"] for job in found["jobs"]] == ["finished", "finished", ""]
    assert found["jobs"][2]["source"] == "finished run"
    assert found["jobs"][2]["cpu_hours"] * 3600 == pytest.approx(sum(took) / 2)
    assert found["spent"]["cpu"] * 3600 == pytest.approx(sum(took))
    limit = (sum(took) + sum(took) / 4) / 3600
    told = glmtuner("-m", *SHORT, RATES, "name=half", f"budget.cpu_hours={limit}")
    assert told.returncode == 2 and "of which" in told.stderr and "are spent" in told.stderr
    assert len(finished(root)) == 2


def test_a_damaged_file_of_hours_is_named(glmtuner, tmp_path):
    root = tmp_path / "outputs/sweeps/damaged/.spent"
    root.mkdir(parents=True)
    (root / "job.1-1-0.json").write_text('{"job": "job", "of": "tpu", "seconds": 3}', encoding="utf-8")
    told = glmtuner("-m", *SHORT, RATES, "name=damaged", "budget.cpu_hours=1", "budget.forecast=false")
    assert told.returncode == 2 and "job.1-1-0.json is damaged" in told.stderr and "remove it" in told.stderr


def test_a_run_has_a_budget_of_its_own(glmtuner, tmp_path):
    words = (*WORDS, "trainer.max_steps=30", "trainer.save_strategy=no", "trainer.output_dir=run")
    told = glmtuner(*words, "budget.cpu_hours=1e-7")
    assert told.returncode == 143 and "saves a checkpoint and stops" in told.stdout, told.stderr
    assert (tmp_path / "run/checkpoints/checkpoint-1").is_dir()
    told = glmtuner(*words, "budget.cpu_hours=1e-7")
    assert told.returncode == 2 and "which earlier attempts have spent" in told.stderr
    told = glmtuner(*words, "budget.cpu_hours=1")
    assert told.returncode == 0 and "resumed from checkpoint-1" in told.stdout, told.stderr
