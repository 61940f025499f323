"""Optuna's samplers, made anew for every trial, so that a trial's values follow from the seed, its number and the trials before.

A search that was interrupted so draws what the undisturbed one draws. Nothing that a sampler stored is unpickled: CMA-ES, which
keeps its state as a pickle among the trials, goes through the finished generations again instead.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from glmtuner.config.search_space import SearchSpace
from glmtuner.console import say
from glmtuner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

PICKLED = "optimizer"  # in the names of the attributes in which CMA-ES stores pickles
RELATIVE = "tpe:relative_params"  # TPE's note of the values of a trial that is still drawn


def sampler_class(options: Mapping[str, Any]) -> type["BaseSampler"]:
    """The class that `hydra.sweeper.sampler` names; raises ConfigError for one that is none, or for options that it lacks."""
    from hydra.utils import get_class
    from optuna.samplers import BaseSampler

    name = str(options.get("_target_"))
    advice = "type hydra/sweeper/sampler=tpe, gp, cmaes, qmc, random or nsgaii"
    try:
        found = get_class(name)
    except Exception as error:  # whatever the import of a user's module raises
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"hydra.sweeper.sampler._target_={name}: there is no such class ({reason}); {advice}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise ConfigError(f"hydra.sweeper.sampler._target_={name} is no sampler of Optuna; {advice}")
    legal = [key for key in inspect.signature(found.__init__).parameters if key != "self"]
    for key in options:
        if key != "_target_" and key not in legal:
            raise ConfigError(
                f"hydra.sweeper.sampler.{key}: {found.__name__} has no such option"
                + did_you_mean(key, legal, f"legal: {', '.join(legal)}")
            )
    return found


def sampler_of(options: Mapping[str, Any], number: int) -> "BaseSampler":
    """The sampler of trial `number`; raises ConfigError for an option's illegal value."""
    from optuna.samplers import CmaEsSampler, QMCSampler, RandomSampler

    kind = sampler_class(options)
    given = {key: value for key, value in options.items() if key != "_target_"}
    seed = given.get("seed")
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"hydra.sweeper.sampler.seed={seed}: expected a whole number from 0 on, or null")
        given["seed"] = seed_of(seed, number)
    if kind is CmaEsSampler:
        kind = _replaying_cma_es()
    elif kind is QMCSampler:
        kind = _counting_qmc(number)
        # the sequence is one for all trials
        given |= {"seed": seed, "independent_sampler": RandomSampler(seed=given.get("seed"))}
    try:
        with warnings_said():
            return kind(**given)
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"hydra.sweeper.sampler={options.get('_target_')}: {reason}; type another value") from None


def seed_of(seed: int, number: int) -> int:
    """The seed of a trial: 32 bits of the child of that number of numpy's SeedSequence of the search's seed."""
    import numpy as np

    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])


def drawn_at_random(options: Mapping[str, Any], space: SearchSpace) -> list[str]:
    """The keys that the sampler does not model together with the others, and draws at random instead."""
    kind = sampler_class(options).__name__
    if kind not in ("CmaEsSampler", "GPSampler", "QMCSampler"):
        return []
    return [
        parameter.key
        for parameter in space.parameters
        if parameter.conditions or (parameter.values and kind == "CmaEsSampler")
    ]


def draw(
    options: Mapping[str, Any],
    space: SearchSpace,
    directions: Sequence[Literal["minimize", "maximize"]],
    trials: Sequence["FrozenTrial"],
    known: int,
) -> tuple["FrozenTrial", list[str]]:
    """The next trial after these and its overrides; it is drawn from the results of the first `known` ones only.

    The trial is RUNNING and in no study yet: whoever stores it writes all of it at once.
    """
    import optuna
    from optuna.trial import TrialState

    number = len(trials)
    with warnings_said():
        scratch = optuna.create_study(directions=[*directions], sampler=sampler_of(options, number))
        scratch.add_trials([_as_seen(trial, trial.number < known) for trial in trials])
        trial = scratch.ask()
        overrides = space.draw(trial)
    drawn = scratch.get_trials(deepcopy=False)[number]
    assert drawn.number == number
    attributes = {key: value for key, value in drawn.system_attrs.items() if not key.startswith(RELATIVE)}
    new = optuna.trial.create_trial(
        state=TrialState.RUNNING, params=drawn.params, distributions=drawn.distributions,
        system_attrs=without_pickles(attributes),
    )  # fmt: skip
    return new, overrides


def without_pickles(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's attributes but those that a sampler would unpickle."""
    return {key: value for key, value in attributes.items() if PICKLED not in key}


def _as_seen(trial: "FrozenTrial", is_known: bool) -> "FrozenTrial":
    """A copy of the trial for a sampler: as running if its result is not known, and without pickles."""
    from optuna.trial import TrialState

    seen = copy.copy(trial)
    seen.system_attrs = without_pickles(trial.system_attrs)
    if trial.state is TrialState.WAITING:  # queued by another program; a study would hand it out before it draws
        seen.state = TrialState.FAIL
        seen.datetime_start = seen.datetime_complete = datetime.now()
    elif not is_known and trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        seen.state, seen.values, seen.datetime_complete = TrialState.RUNNING, None, None
    return seen


def _replaying_cma_es() -> type["BaseSampler"]:
    """Optuna's CMA-ES with the optimizer computed from the generations that are finished instead of read from a pickle."""
    from optuna.samplers import CmaEsSampler
    from optuna.study import StudyDirection

    class ReplayingCmaEsSampler(CmaEsSampler):
        def _restore_optimizer(self, completed_trials: Any) -> None:
            self._completed = completed_trials

        def _init_optimizer(self, trans: Any, direction: Any) -> Any:
            before = self._cma_rng.rng.get_state()
            optimizer = super()._init_optimizer(trans, direction)
            if any(trial.system_attrs.get(self._attr_key_generation, 0) for trial in self._completed):
                self._cma_rng.rng.set_state(before)  # Optuna would have read a pickle, and drawn nothing
            sign = 1 if direction is StudyDirection.MINIMIZE else -1
            while optimizer.dim == len(trans.bounds):
                told = self._get_solution_trials(self._completed, optimizer.generation)[: optimizer.population_size]
                if len(told) < optimizer.population_size:
                    break
                stored = [trial.system_attrs.get("x_for_tell") for trial in told]  # of CMA-ES with margin
                points = [
                    trans.transform(trial.params) if x is None else _array(x)
                    for trial, x in zip(told, stored, strict=True)
                ]
                optimizer.tell([(x, sign * trial.values[0]) for x, trial in zip(points, told, strict=True)])
            return optimizer

    return ReplayingCmaEsSampler


def _array(values: Sequence[float]) -> Any:
    import numpy as np

    return np.array(values)


def _counting_qmc(number: int) -> type["BaseSampler"]:
    """Optuna's quasi-Monte Carlo with the trial's number as place in the sequence; Optuna counts in the study's attributes."""
    from optuna.samplers import QMCSampler

    class CountingQMCSampler(QMCSampler):
        def _find_sample_id(self, study: Any, search_space: Any) -> int:
            return max(number - 1, 0)  # trial 0 is drawn before the space is known

    return CountingQMCSampler


_said: set[str] = set()


@contextmanager
def warnings_said() -> Iterator[None]:
    """Print warnings of this block once each, except for those that a sampler or an option is experimental."""
    import optuna

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if issubclass(warning.category, optuna.exceptions.ExperimentalWarning) or text in _said:
            continue
        _said.add(text)
        say(f"optuna: {text}")
