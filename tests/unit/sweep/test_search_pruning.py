"""Searches that prune at rungs, with stubbed jobs, against plain Optuna with the same pruner, values and order."""

import math
from pathlib import Path

import optuna
import pytest
from stub_search import StubLauncher, StubSweeper, bowl, killed_at_random, started, trials_of, whole

from glmtuner.distributed.pause import VARIABLE
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.report.jobs import State, read_jobs
from glmtuner.report.race import pruned_reason
from glmtuner.run_folder.folder import RunFolder
from glmtuner.sweep.rungs import rungs_of
from glmtuner.sweep.search_pruning import step_of

RUNGS = [0.2, 0.5]
PRUNERS = {
    "median": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3},
    "percentile": {"_target_": "optuna.pruners.PercentilePruner", "percentile": 25.0, "n_startup_trials": 2},
    "halving": {"_target_": "optuna.pruners.SuccessiveHalvingPruner", "min_resource": 200, "reduction_factor": 2},
}


def loss_at(values: dict[str, str], share: float) -> float:
    """A curve that falls to the bowl's value, faster for large norms, so that the order of trials changes on the way."""
    return bowl(values)["eval_loss"] + (1 - share) * (2 - float(values["trainer.max_grad_norm"]))


class PausingLauncher(StubLauncher):
    """Writes what a job leaves at a pause; `seen` are the shares that were asked for, None for the end."""

    def run(self, folder: RunFolder, values: dict[str, str], words: list[str]) -> None:
        pause = values.pop(f"++hydra.job.env_set.{VARIABLE}", "").strip("'")
        with (self.sweep / "trained.log").open("a") as log:
            log.write(f"{folder.path.name} {pause or 'end'}\n")
        if not pause:
            super().run(folder, values, words)
            return
        place = folder / "pauses" / pause
        folder.path.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("{}\n")
        metrics = {"loss": loss_at(values, float(pause))}
        whole(place / "pause.json", {"step": 1, "max_steps": 10, "records": "", "metrics": metrics})


class PausingSweeper(StubSweeper):
    def __init__(self, sweep: Path, pruner: str = "median", **values) -> None:
        super().__init__(sweep, rungs=RUNGS, pruner=PRUNERS[pruner], **values)
        self.jobs = PausingLauncher(sweep, self.jobs.job, self.jobs.seconds)


def by_optuna(pruner: str, trials: list, n_jobs: int) -> list[str]:
    """The states of the trials in a study of plain Optuna's own loop: ask, report, should_prune, tell, so many at once."""
    options = {key: value for key, value in PRUNERS[pruner].items() if key != "_target_"}
    made = getattr(optuna.pruners, PRUNERS[pruner]["_target_"].rpartition(".")[2])(**options)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(), pruner=made)
    for first in range(0, len(trials), n_jobs):
        values, asked = [], []
        for trial in trials[first : first + n_jobs]:
            study.enqueue_trial(trial.params)
            asked.append(study.ask(trial.distributions))
            values.append({key: str(value) for key, value in trial.params.items()})
        going = [*range(len(asked))]
        for share in RUNGS:
            for place in going:
                asked[place].report(loss_at(values[place], share), round(share * 1000))
            pruned = [place for place in going if asked[place].should_prune()]
            for place in pruned:
                study.tell(asked[place], state=optuna.trial.TrialState.PRUNED)
            going = [place for place in going if place not in pruned]
        for place in going:
            study.tell(asked[place], bowl(values[place])["eval_loss"])
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_trials_are_pruned_that_plain_optuna_prunes(pruner: str, n_jobs: int, tmp_path: Path) -> None:
    PausingSweeper(tmp_path, pruner, n_jobs=n_jobs, n_trials=18).run()
    trials = trials_of(tmp_path)
    states = [trial.state.name for trial in trials]
    assert states == by_optuna(pruner, trials, n_jobs)
    assert 2 <= states.count("PRUNED") <= 16
    for trial in trials:
        values = {key: str(value) for key, value in trial.params.items()}
        assert trial.intermediate_values == pytest.approx(
            {step: loss_at(values, step / 1000) for step in trial.intermediate_values}
        )
        folder = RunFolder(tmp_path / trial.user_attrs["folder"])
        assert (trial.state.name == "PRUNED") == (not folder.is_finished) == (pruned_reason(folder) is not None)
    trained = (tmp_path / "trained.log").read_text().splitlines()
    assert len(trained) == len({*trained})  # no part of a training twice
    assert trained.count(f"{trials[0].user_attrs['folder']} 0.2") == 1
    jobs = {job.name: job for job in read_jobs(tmp_path)}
    pruned = next(trial for trial in trials if trial.state.name == "PRUNED")
    job = jobs[pruned.user_attrs["folder"]]
    assert job.state is State.dropped and job.reason.startswith("pruned after 0.") and "loss" in job.reason


def test_a_search_that_is_killed_prunes_what_the_undisturbed_one_prunes(tmp_path: Path) -> None:
    PausingSweeper(tmp_path / "whole", n_trials=14).run()
    expected = [(trial.params, trial.state.name) for trial in trials_of(tmp_path / "whole")]
    (tmp_path / "cut").mkdir()
    kills = killed_at_random(PausingSweeper(tmp_path / "cut", n_trials=14), 3)
    assert kills >= 2
    assert [(trial.params, trial.state.name) for trial in trials_of(tmp_path / "cut")] == expected
    assert len({*started(tmp_path / "cut")}) == sum(state == "COMPLETE" for _, state in expected)


def test_a_pruned_trial_counts_and_is_not_trained_again(tmp_path: Path) -> None:
    PausingSweeper(tmp_path, n_trials=10).run()
    before = (tmp_path / "trained.log").read_text()
    PausingSweeper(tmp_path, n_trials=10).run()
    assert (tmp_path / "trained.log").read_text() == before and len(trials_of(tmp_path)) == 10


def test_a_loss_that_is_not_finite_is_pruned_and_a_missing_measure_is_named(tmp_path: Path, monkeypatch) -> None:
    from glmtuner.errors import TrainingError

    monkeypatch.setattr(f"{__name__}.loss_at", lambda values, share: math.nan)
    PausingSweeper(tmp_path / "nan", n_trials=6).run()
    assert [trial.state.name for trial in trials_of(tmp_path / "nan")][3:] == ["PRUNED"] * 3
    with pytest.raises(TrainingError, match="has measured loss, and no accuracy"):
        PausingSweeper(tmp_path / "other", objective="eval_accuracy", direction="maximize").run()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rungs": "0.2"}, "a list of shares or steps"),
        ({"rungs": [0.5, 0.2]}, "each rung is later"),
        ({"rungs": [0.5, 10]}, "either shares of the training, or numbers of steps"),
        ({"rungs": [0]}, "a number of steps"),
        ({"pruner": "median"}, "type hydra/sweeper/pruner=median"),
        ({"pruner": {"_target_": "optuna.pruners.MedianPrunner"}}, "there is no such class"),
        ({"pruner": {"_target_": "optuna.samplers.TPESampler"}}, "is no pruner of Optuna"),
        ({"pruner": {"_target_": "optuna.pruners.MedianPruner", "n_min_trails": 3}}, "did you mean 'n_min_trials'"),
        ({"pruner": {"_target_": "optuna.pruners.PercentilePruner", "percentile": 250.0}}, "Percentile must be"),
        ({"objective": ["eval_loss", "train_runtime"], "direction": ["minimize"] * 2}, "Optuna prunes by one metric"),
    ],
)  # fmt: skip
def test_what_cannot_prune_is_told(values: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        StubSweeper(tmp_path, **{"rungs": RUNGS, "pruner": PRUNERS["median"], **values})


def test_a_damaged_decision_is_named(tmp_path: Path) -> None:
    (tmp_path / "pruned.json").write_text('{"reason": 7}')
    with pytest.raises(CheckpointError, match="the same command decides again"):
        pruned_reason(RunFolder(tmp_path))


def test_rungs_are_steps_to_optuna() -> None:
    assert [step_of(pause) for pause in rungs_of([0.07, 0.5])] == [70, 500]
    assert [step_of(pause) for pause in rungs_of([10, 200])] == [10, 200]
