"""`hydra.sweeper` of a search: its values, checked before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glmtuner.config.explain import explain
from glmtuner.config.objective import less_is_better, objectives_of
from glmtuner.distributed.pause import Pause
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.sweep.placeholders import reveal
from glmtuner.sweep.rungs import illegal_rungs, rungs_of
from glmtuner.sweep.search_pruners import pruner_of
from glmtuner.sweep.search_samplers import sampler_class, sampler_of
from glmtuner.sweep.search_storage import check_storage

Direction = Literal["minimize", "maximize"]
DIRECTIONS = get_args(Direction)
GONE = {  # keys of hydra-optuna-sweeper, and what to type instead
    "search_space": "type hydra.sweeper.params, whose values are search spaces in Hydra's own words",
    "custom_search_space": "a condition is a tag, as in 'finetuning.lora_rank=tag(\"finetuning=lora\", int(interval(4, 64)))'",
}


@dataclass(frozen=True)
class Settings:
    """The values of conf/hydra/sweeper/optuna.yaml."""

    sampler: dict[str, Any]  # `_target_`, a class of Optuna, and its options
    direction: list[Direction]  # of each objective
    storage: str | None
    study_name: str
    n_trials: int
    n_jobs: int
    max_failure_rate: float
    rungs: tuple[Pause, ...]  # at which trials may be pruned; empty: none is
    pruner: dict[str, Any]  # `_target_`, a class of Optuna, and its options
    params: dict[str, Any]
    objectives: list[str]


def direction_of(objective: Any) -> str | list[str]:
    """`minimize` or `maximize`, as Optuna calls it, for two objectives a list; raises ConfigError without an objective."""
    names = objectives_of(objective)
    if not names:
        raise ConfigError(
            "hydra/sweeper=optuna searches for the best value of a metric; type objective=eval_loss, or rouge-l"
        )
    directions = ["minimize" if less_is_better(name) else "maximize" for name in names]
    return directions if len(directions) > 1 else directions[0]


def settings_of(sweeper: DictConfig | Mapping[str, Any], objective: Any, sweep: Path) -> Settings:
    """The settings of the search in the sweep's folder; raises ConfigError for each mistake in `hydra.sweeper`."""
    direction_of(objective)  # before the interpolation of the same
    try:
        given = OmegaConf.to_container(sweeper, resolve=True) if isinstance(sweeper, DictConfig) else dict(sweeper)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(given, dict)
    values = {str(key): value for key, value in given.items() if key != "_target_"}
    legal = [declared.name for declared in fields(Settings) if declared.name != "objectives"]
    for key in values:
        if key in GONE:
            raise ConfigError(f"hydra.sweeper.{key}: there is no such key any more; {GONE[key]}")
        if key not in legal:
            raise ConfigError(
                f"unknown key 'hydra.sweeper.{key}'" + did_you_mean(key, legal, f"legal: {', '.join(legal)}")
            )
    if missing := [key for key in legal if key not in values]:
        raise ConfigError(
            f"hydra.sweeper.{missing[0]} is missing; start your own preset from the shipped one: defaults: "
            "[/hydra/sweeper/optuna@_here_]"
        )
    sampler = values["sampler"]
    if not isinstance(sampler, dict):
        raise ConfigError(
            f"hydra.sweeper.sampler={sampler}: a sampler is a preset; type hydra/sweeper/sampler={sampler}"
        )
    for key, least in (("n_trials", 1), ("n_jobs", 1)):
        if not isinstance(values[key], int) or isinstance(values[key], bool) or values[key] < least:
            raise ConfigError(f"hydra.sweeper.{key}={values[key]}: expected a whole number from {least} on")
    rate = values["max_failure_rate"]
    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate <= 1:
        raise ConfigError(f"hydra.sweeper.max_failure_rate={rate}: expected a share of the trials, from 0 to 1")
    objectives = objectives_of(objective)
    direction = _directions(values["direction"], objectives)
    storage = values["storage"]
    if storage is not None and not isinstance(storage, str):
        raise ConfigError(
            f"hydra.sweeper.storage={storage}: expected a URL, or the path of a file that ends in .journal"
        )
    kind = sampler_class(sampler).__name__
    if len(objectives) > 1 and kind == "CmaEsSampler":
        raise ConfigError(
            f"hydra/sweeper/sampler=cmaes with objective=[{','.join(objectives)}]: CMA-ES searches for the best value of one metric; "
            "type hydra/sweeper/sampler=tpe, gp or nsgaii, or one objective"
        )
    sampler_of(sampler, 0)
    pruner_of(values["pruner"])
    if wrong := [*illegal_rungs(values["rungs"])]:
        raise ConfigError("; also: ".join(wrong))
    if values["rungs"] and len(objectives) > 1:
        raise ConfigError(
            f"hydra.sweeper.rungs with objective=[{','.join(objectives)}]: Optuna prunes by one metric; type one objective, or leave "
            "hydra.sweeper.rungs out"
        )
    return Settings(
        sampler=sampler,
        direction=direction,
        storage=storage,
        study_name=str(values["study_name"] or sweep.name),
        n_trials=values["n_trials"],
        n_jobs=values["n_jobs"],
        max_failure_rate=float(rate),
        rungs=rungs_of(values["rungs"]),
        pruner=values["pruner"],
        params=values["params"] or {},
        objectives=objectives,
    )


def _directions(given: Any, objectives: list[str]) -> list[Direction]:
    directions = [given] if isinstance(given, str) else [*(given or [])]
    for word in directions:
        if word not in DIRECTIONS:
            raise ConfigError(
                f"hydra.sweeper.direction={word}: not a direction"
                + did_you_mean(str(word), DIRECTIONS, "legal: minimize, maximize")
            )
    if len(directions) != len(objectives):
        raise ConfigError(
            f"hydra.sweeper.direction=[{','.join(directions)}] with objective=[{','.join(objectives)}]: a direction for each "
            "objective; leave hydra.sweeper.direction out, or type as many"
        )
    return cast(list[Direction], directions)


def check_search(hydra: DictConfig, objective: Any, sweep: Path) -> Settings:
    """The settings of the composed search, whose storage can be opened; raises ConfigError or CheckpointError."""
    settings = settings_of(hydra.sweeper, objective, sweep)
    check_storage(reveal(settings.storage) if settings.storage else None, sweep)
    return settings
