"""Each sampler draws what Optuna's own draws with the same seed, from a study that Optuna keeps itself; nothing is unpickled."""

import math
import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from stub_search import StubSweeper, trials_of

from glmtuner.config.search_space import search_space
from glmtuner.errors import ConfigError
from glmtuner.sweep.search_samplers import draw, sampler_of, seed_of
from glmtuner.sweep.search_settings import settings_of

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = search_space(["a=tag(log, interval(1e-3, 1))", "b=int(interval(1, 9))", "c=interval(-1, 1)"], {}, {})
PRESETS = {
    "tpe": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3},
    "tpe, each key alone": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3, "multivariate": False},
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "cmaes": {"_target_": "optuna.samplers.CmaEsSampler", "popsize": 4},
    "cmaes with margin": {"_target_": "optuna.samplers.CmaEsSampler", "popsize": 4, "with_margin": True},
    "nsgaii": {"_target_": "optuna.samplers.NSGAIISampler", "population_size": 4},
}


def loss(params: dict[str, float]) -> float:
    return (math.log10(params["a"]) + 2) ** 2 + (params["b"] - 3) ** 2 / 10 + params["c"] ** 2


def draws(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Ours: each trial is drawn from the list of those before, and stored and told by another study."""
    study = optuna.create_study()
    for number in range(count):
        trial, _ = draw(options, SPACE, ["minimize"], study.get_trials(), number)
        study.add_trial(trial)
        study.tell(number, loss(trial.params))
    return [trial.params for trial in study.get_trials()]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", PRESETS)
def test_a_sampler_draws_what_optunas_own_study_draws(name):
    options = {**PRESETS[name], "seed": 7}
    given = {key: value for key, value in options.items() if key not in ("_target_", "seed")}
    kind = getattr(optuna.samplers, options["_target_"].rpartition(".")[2])
    study = optuna.create_study()
    for number in range(14):
        study.sampler = kind(seed=seed_of(7, number), **given)
        trial = study.ask()
        trial.suggest_float("a", 1e-3, 1, log=True)
        trial.suggest_int("b", 1, 9)
        trial.suggest_float("c", -1, 1)
        study.tell(trial, loss(trial.params))
    ours = draws(options, 14)
    # a pickle of CMA-ES keeps half of its covariance matrix, which is symmetric but for rounding
    assert ours == [pytest.approx(trial.params, rel=1e-9) for trial in study.get_trials()]
    assert len({*map(str, ours)}) == 14
    assert draws({**options, "seed": 8}, 14) != ours


def test_quasi_monte_carlo_takes_one_place_of_its_sequence_after_the_other():
    options = {"_target_": "optuna.samplers.QMCSampler", "scramble": True, "seed": 7}
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=7, scramble=True))
    for _ in range(9):
        trial = study.ask()
        trial.suggest_float("a", 1e-3, 1, log=True)
        trial.suggest_int("b", 1, 9)
        trial.suggest_float("c", -1, 1)
        study.tell(trial, loss(trial.params))
    assert draws(options, 9)[1:] == [trial.params for trial in study.get_trials()][1:]  # the first one is random


@pytest.mark.parametrize("name", ["gp", "nsgaii", "tpe", "qmc", "random", "cmaes"])
def test_a_shipped_preset_repeats_its_draws(name, tmp_path):
    import yaml

    from glmtuner.config.paths import conf_dir

    options = yaml.safe_load((conf_dir() / f"hydra/sweeper/sampler/{name}.yaml").read_text())
    sampler_of(options, 0)
    count = 7 if name == "gp" else 12  # a Gaussian process is fitted for seconds
    StubSweeper(tmp_path, sampler=options, n_trials=count, n_jobs=2).run()
    values = [trial.value for trial in trials_of(tmp_path)]
    again = tmp_path / "again"
    StubSweeper(again, sampler=options, n_trials=count, n_jobs=2).run()
    assert len({*values}) == count and [trial.value for trial in trials_of(again)] == values
    assert min(values) < 0.6


class Opened:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_in_a_journal_is_never_read(tmp_path):
    options = {**PRESETS["cmaes"], "seed": 7}
    StubSweeper(tmp_path / "s", sampler=options, n_trials=6).run()
    journal = tmp_path / "s/search.journal"
    trace = tmp_path / "opened"
    poison = pickle.dumps(Opened(trace)).hex()
    assert "optimizer" not in journal.read_text()
    journal.write_text(
        journal.read_text().replace('"cma:generation":0', f'"cma:optimizer:0":"{poison}","cma:generation":0')
    )
    assert poison in journal.read_text()
    StubSweeper(tmp_path / "s", sampler=options, n_trials=10).run()
    assert len(trials_of(tmp_path / "s")) == 10 and not trace.exists()
    pickle.loads(bytes.fromhex(poison))
    assert trace.exists()  # as Optuna's own sampler would have


def test_numbers_that_a_sampler_does_not_model_are_said(tmp_path, capsys):
    space = {"x": "1,2", "y": "interval(0, 1)", "z": 'tag("x=1", interval(0, 1))'}
    options = {**PRESETS["cmaes"], "warn_independent_sampling": False, "seed": 1}
    StubSweeper(
        tmp_path, lambda drawn: {"eval_loss": float(drawn["y"])}, sampler=options, params=space, n_trials=6
    ).run()
    assert "the sampler draws x, z at random" in capsys.readouterr().out


GIVEN = {
    "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 1}, "direction": "minimize", "storage": None, "study_name": None,
    "rungs": [], "pruner": {"_target_": "optuna.pruners.MedianPruner"},
    "n_trials": 3, "n_jobs": 1, "max_failure_rate": 1.0, "params": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_trial": 3}, r"unknown key 'hydra.sweeper.n_trial'; did you mean 'n_trials'\?"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials=0: expected a whole number from 1 on"),
        ({"n_jobs": "all"}, "hydra.sweeper.n_jobs=all: expected"),
        ({"max_failure_rate": 2}, "max_failure_rate=2: expected a share"),
        ({"search_space": {}}, "hydra.sweeper.search_space: there is no such key any more; type hydra.sweeper.params"),
        ({"custom_search_space": "mine.space"}, "custom_search_space: .* a condition is a tag"),
        ({"direction": "minimise"}, r"direction=minimise: not a direction; did you mean 'minimize'\?"),
        ({"direction": ["minimize", "minimize"]}, r"a direction for each objective"),
        ({"sampler": "tpe"}, "type hydra/sweeper/sampler=tpe"),
        ({"sampler": {"_target_": "optuna.samplers.TPESample"}}, "no such class .*; type hydra/sweeper/sampler=tpe, gp"),
        ({"sampler": {"_target_": "pathlib.Path"}}, "pathlib.Path is no sampler of Optuna"),
        ({"sampler": {**PRESETS["tpe"], "n_startup_trial": 3}}, r"TPESampler has no such option; did you mean 'n_startup_trials'\?"),
        ({"sampler": {**PRESETS["tpe"], "seed": -1}}, "seed=-1: expected a whole number"),
        ({"sampler": {**PRESETS["nsgaii"], "population_size": 1}}, "population_size.* greater than or equal to 2"),
        ({"sampler": {**PRESETS["tpe"], "multivariate": False, "group": True}}, "group.*multivariate"),
        ({"storage": 3}, "storage=3: expected a URL"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_mistakes_in_the_settings_end_in_one_paragraph(changed, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as raised:
        settings_of({**GIVEN, **changed}, "eval_loss", tmp_path)
    assert "\n" not in str(raised.value)


def test_cma_es_has_one_objective(tmp_path):
    with pytest.raises(
        ConfigError, match="CMA-ES searches for the best value of one metric; type hydra/sweeper/sampler=tpe"
    ):
        settings_of(
            {**GIVEN, "sampler": PRESETS["cmaes"], "direction": ["minimize"] * 2},
            ["eval_loss", "train_runtime"],
            tmp_path,
        )
