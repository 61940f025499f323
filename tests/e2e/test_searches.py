"""Searches by the command line: conditions, two objectives, several at once, killed and typed again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from stub_search import trials_of

from glmtuner.run_folder.folder import job_folders

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "-m", "model=tiny_glm", "tracker=none", "metric=none", "data.dataset=belle_sample", "data.max_samples=4", "trainer.max_steps=1",
    "trainer.logging_steps=1", "trainer.save_steps=1", "trainer.disable_tqdm=true", "hydra/sweeper=optuna",
]  # fmt: skip
RATES = "trainer.learning_rate=tag(log, interval(1e-6, 1e-2))"


@pytest.mark.heavy
def test_a_parameter_exists_only_with_the_method_that_has_it(glmtuner: Callable, tmp_path: Path) -> None:
    """The space stands in an experiment of the user's own; a second command goes on, and a third has nothing to do."""
    own = tmp_path / "my_conf/experiment"
    own.mkdir(parents=True)
    (own / "methods.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /hydra/sweeper: optuna\n"
        "hydra:\n  sweeper:\n    n_trials: 2\n    params:\n"
        "      finetuning: lora,freeze\n"
        '      finetuning.lora_rank: tag("finetuning=lora", log, int(interval(2, 8)))\n'
        '      finetuning.num_layer_trainable: tag("finetuning=freeze", choice(1, 2))\n'
        "objective: train_loss\n",
        encoding="utf-8",
    )
    words = ["--config-dir", "my_conf", *TINY[:-1], "experiment=methods", "name=methods"]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    again = glmtuner(*words, "hydra.sweeper.n_trials=4")
    assert again.returncode == 0 and "2 of 4 trials are finished" in again.stdout, again.stderr
    sweep = tmp_path / "outputs/sweeps/methods"
    trials = trials_of(sweep)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    needs = {"lora": {"finetuning", "finetuning.lora_rank"}, "freeze": {"finetuning", "finetuning.num_layer_trainable"}}
    assert {trial.params["finetuning"] for trial in trials} == {*needs}
    for trial in trials:
        assert trial.params.keys() == needs[trial.params["finetuning"]]
        metrics = json.loads((sweep / trial.user_attrs["folder"] / "metrics.json").read_text())
        assert trial.value == metrics["train_loss"]
    assert f"best_value: {min(trial.value for trial in trials)}" in (sweep / "optimization_results.yaml").read_text()
    nothing = glmtuner(*words, "hydra.sweeper.n_trials=4")
    assert nothing.returncode == 0 and "4 of 4 trials are finished" in nothing.stdout and "job 0" not in nothing.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra/sweeper/sampler=tpee"], "did you mean 'tpe'?"),
        (["hydra.sweeper.n_trails=3"], "did you mean 'n_trials'?"),
        (["hydra.sweeper.sampler=gp"], "type hydra/sweeper/sampler=gp"),
        (["hydra.sweeper.custom_search_space=mine.space"], "a condition is a tag"),
        (["trainer.max_steps=interval(1, 8)"], "a search draws whole numbers by int(interval(1, 8))"),
        (["trainer.max_grad_norm=interval(-1, 1)"], "trainer.max_grad_norm=-1.0: 0 or more"),
        (["finetuning=lora,freeze", "finetuning.lora_rank=int(interval(2, 8))"], "takes it as a condition"),
        (["objective=null"], "type objective=eval_loss"),
        (["objective=[eval_loss,train_runtime,train_loss]"], "expected one metric"),
        (["objective=eval_loss,train_loss"], "type objective=[a,b] for two"),
        (["hydra.sweeper.storage=sqlite:////no/such/folder/x.db"], "unable to open database file"),
        (["hydra.sweeper.storage=postgresql://me:hunter22@127.0.0.1:1/db"], "driver"),
        (["hydra.sweeper.storage=nonsense"], "legal: a URL of SQLAlchemy"),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_paragraph_before_anything_is_written(
    words: list[str], message: str, glmtuner: Callable, tmp_path: Path
) -> None:
    typed = [word for word in TINY if not any(word.startswith(f"{new.partition('=')[0]}=") for new in words)]
    aim = [] if any(word.startswith("objective=") for word in words) else ["objective=train_loss"]
    done = glmtuner(*typed, RATES, *aim, *words)
    assert done.returncode == 2 and message in done.stderr and "hunter22" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_condition_in_a_sweep_that_is_no_search_is_refused(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(*TINY[:-1], "finetuning=lora,freeze", 'finetuning.lora_rank=tag("finetuning=lora", choice(2, 4))')
    assert done.returncode == 2 and "conditions are for searches" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_sampler_without_a_search_is_refused(glmtuner: Callable) -> None:
    done = glmtuner(*TINY[:-1], "hydra/sweeper/sampler=gp", "trainer.seed=1,2", "objective=train_loss")
    assert done.returncode == 2 and "type hydra/sweeper=optuna, too" in done.stderr


@pytest.mark.heavy
def test_two_objectives_several_at_once_have_a_front_in_the_report(glmtuner: Callable, tmp_path: Path) -> None:
    words = [
        *TINY, RATES, "data.max_samples=16", "data.dev_ratio=0.25", "trainer.do_eval=true", "objective=[eval_loss,train_runtime]",
        "name=front", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
    words[words.index("trainer.max_steps=1")] = "trainer.max_steps=range(1, 9)"
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs/sweeps/front"
    measured = [json.loads(path.read_text()) for path in sweep.glob("*/metrics.json")]
    points = [(metrics["eval_loss"], metrics["train_runtime"]) for metrics in measured]
    assert len(points) == 6
    best = [
        one for one in points if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    ]
    assert f"{len(best)} of 6 jobs are on the Pareto front of evaluation loss and time" in done.stdout
    report = (sweep / "report.md").read_text()
    section = report.partition("## Pareto front")[2].partition("## Plots")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][2:] != []
    for loss, _ in best:
        assert f"| {loss:.4f} |" in section
    assert section.count("| learning_rate") + section.count("| max_steps") == len(best)
    assert (sweep / "pictures/pareto.png").is_file() and "Pareto front" in (sweep / "report.html").read_text()


@pytest.mark.heavy
@pytest.mark.matrix
@pytest.mark.slow
def test_a_search_of_twenty_that_is_killed_and_typed_again_has_twenty_none_twice(tmp_path: Path) -> None:
    moments = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*TINY, RATES, "objective=train_loss", "name=search"]
    sweep = tmp_path / "outputs/sweeps/search"
    killed = 0
    while True:
        with (tmp_path / "search.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "glmtuner", *words], cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        started = len([*sweep.glob("*/config.yaml")]) + moments.randint(1, 3)
        while process.poll() is None and (killed == 5 or len([*sweep.glob("*/config.yaml")]) < started):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    log_text = (tmp_path / "search.log").read_text()
    assert process.returncode == 0, log_text[-3000:]
    assert killed and "interrupted, which go on: 1" in log_text
    trials = trials_of(sweep)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 20
    assert len({trial.params["trainer.learning_rate"] for trial in trials}) == 20 == len(job_folders(sweep))
    # what Optuna's own study draws when nobody disturbs it
    from glmtuner.sweep.search_samplers import seed_of

    study = optuna.create_study()
    for trial in trials:
        study.sampler = optuna.samplers.TPESampler(seed=seed_of(42, trial.number), n_startup_trials=5)
        twin = study.ask()
        assert (
            twin.suggest_float("trainer.learning_rate", 1e-6, 1e-2, log=True) == trial.params["trainer.learning_rate"]
        )
        study.tell(twin, trial.value)
    written = {json.loads(path.read_text())["train_loss"] for path in sweep.glob("*/metrics.json")}
    assert written == {trial.value for trial in trials}


@pytest.mark.heavy
def test_a_search_in_a_database_goes_on_and_holds_no_secret(glmtuner: Callable, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/searches.db"
    words = [
        *TINY, RATES, f"hydra.sweeper.storage={storage}", "objective=train_loss", "trainer.hub_token=hf_typedInClear0123456789"
    ]  # fmt: skip
    done = glmtuner(*words, "hydra.sweeper.n_trials=1", "name=kept")
    assert done.returncode == 0, done.stderr
    again = glmtuner(*words, "hydra.sweeper.n_trials=2", "name=kept")
    assert again.returncode == 0 and "1 of 2 trials are finished" in again.stdout, again.stderr
    trials = trials_of(tmp_path, storage)
    folders = job_folders(tmp_path / "outputs/sweeps/kept")
    drawn = sorted(trial.params["trainer.learning_rate"] for trial in trials)
    assert sorted(folder.config().trainer.learning_rate for folder in folders) == drawn and len(drawn) == 2
    assert b"typedInClear" not in (tmp_path / "searches.db").read_bytes()
    other = glmtuner(*[word for word in words if word != RATES], "trainer.learning_rate=choice(1e-3,1e-4)", "name=kept")
    assert other.returncode == 2 and "searches another space" in other.stderr, other.stderr
    aim = glmtuner(*words, "objective=rouge-l", "name=kept")
    assert aim.returncode == 2 and "searches for train_loss (minimize)" in aim.stderr, aim.stderr


@pytest.mark.heavy
def test_a_trial_that_goes_on_is_its_own_run_and_the_others_end_at_their_rung(
    glmtuner: Callable, tmp_path: Path
) -> None:
    words = [
        "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=40", "data.dev_ratio=0.4",
        "data.max_target_length=32", "trainer.do_eval=true", "trainer.max_steps=8", "trainer.logging_steps=1", "trainer.disable_tqdm=true",
        "objective=eval_loss",
    ]  # fmt: skip
    search = ["-m", "hydra/sweeper=optuna", *words, RATES, "name=pruned", "hydra.sweeper.n_trials=6", "hydra.sweeper.rungs=[2,5]",
              "hydra.sweeper.pruner.n_startup_trials=1"]  # fmt: skip
    done = glmtuner(*search)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs/sweeps/pruned"
    trials = trials_of(sweep)
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert pruned and complete and len(trials) == 6
    leaderboard = (sweep / "leaderboard.csv").read_text(encoding="utf-8")
    for trial in pruned:
        folder = sweep / trial.user_attrs["folder"]
        steps = sorted(trial.intermediate_values)
        assert not (folder / "metrics.json").exists() and steps in ([2], [2, 5])
        last = json.loads((folder / f"pauses/{steps[-1]}/pause.json").read_text())
        assert trial.intermediate_values[steps[-1]] == last["metrics"]["loss"]
        assert f"pruned after step {steps[-1]}: loss {last['metrics']['loss']:.6g}" in leaderboard
    assert f"{len(pruned)} dropped" in done.stdout

    best = max(complete, key=lambda trial: trial.number)  # which has paused twice
    rate = f"trainer.learning_rate={best.params['trainer.learning_rate']}"
    assert glmtuner(*words, rate, "trainer.output_dir=alone").returncode == 0
    for name in ("history.jsonl", "adapter/adapter_model.safetensors"):
        assert (sweep / best.user_attrs["folder"] / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()

    refused = glmtuner(*search, "objective=train_loss", "name=other")
    assert refused.returncode == 2 and "no rung measures it" in refused.stderr, refused.stderr
