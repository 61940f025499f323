"""Hydra's sweepers, as `register` of the launchers puts them in the place of the plugins' own."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper as HydraOptunaSweeper
from omegaconf import DictConfig, OmegaConf

from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.run_folder.redaction import redact_text
from glmtuner.sweep.placeholders import reveal

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study

BASIC_TARGET = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
OPTUNA_TARGET = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"


class BasicSweeper(Sweeper):
    """Hydra's sweeper of every combination, whose multirun.yaml names the sweep's folder instead of the whole configuration."""

    def __init__(self, **options: Any) -> None:
        # Hydra reloads the module
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper as HydraBasicSweeper

        self.sweeper = HydraBasicSweeper(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.whole_config: DictConfig = config
        self.sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        sweeper, validate = self.sweeper, self.sweeper.validate_batch_is_legal
        folder_only = OmegaConf.create({"hydra": {"sweep": {"dir": str(self.whole_config.hydra.sweep.dir)}}})

        def validate_whole(batch: Sequence[Sequence[str]]) -> None:
            sweeper.config = self.whole_config
            validate(batch)
            sweeper.config = folder_only

        sweeper.config, sweeper.validate_batch_is_legal = folder_only, validate_whole  # type: ignore[method-assign]
        return sweeper.sweep(arguments)


class OptunaSweeper(HydraOptunaSweeper):
    """A search. With a storage it is continued: `n_trials` counts those that are finished, and unfinished ones come first."""

    def sweep(self, arguments: list[str]) -> None:
        search = self.sweeper
        if isinstance(search.storage, str):
            search.study_name = search.study_name or Path(str(search.sweep_dir)).name
            search.storage = open_storage(reveal(search.storage))
            self._continue_study(search)
        try:
            super().sweep(arguments)
        except ValueError as error:
            if not any(part in str(error) for part in ("dynamic value space", "distribution kind")):
                raise
            raise ConfigError(
                f"hydra.sweeper.storage: the study {search.study_name!r} searches other values ({' '.join(str(error).split())}); type "
                "another name=…, or hydra.sweeper.study_name=…, for another search"
            ) from None

    def _continue_study(self, search: Any) -> None:
        """Count the trials that are finished, and begin with those that were not, with the values that they had."""
        import optuna
        from optuna.trial import TrialState

        try:
            study: Study = optuna.create_study(
                study_name=search.study_name,
                storage=search.storage,
                directions=search._get_directions(),
                load_if_exists=True,
            )
        except ValueError as error:
            raise ConfigError(
                f"hydra.sweeper.storage: the study {search.study_name!r} has another direction ({error}); type another name=…, or "
                "hydra.sweeper.study_name=…, for another objective"
            ) from None
        trials = study.get_trials(deepcopy=False)
        if not trials:
            return
        finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        done = [trial.params for trial in finished]
        repeated: list[dict[str, Any]] = []
        for trial in trials:
            if trial.state in (TrialState.RUNNING, TrialState.WAITING):
                study.tell(trial.number, state=TrialState.FAIL)
            if trial.state != TrialState.COMPLETE and trial.params and trial.params not in done + repeated:
                repeated.append(trial.params)
        search.n_trials = max(search.n_trials - len(finished), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for params in repeated[: search.n_trials]:
                study.enqueue_trial(params)
        sampler = search.config.hydra.sweeper.sampler
        if isinstance(sampler.get("seed"), int):  # the same seed would draw the same values again
            search.sampler = instantiate(sampler, seed=sampler.seed + len(trials))
        say(
            f"search {search.study_name!r}: {len(finished)} trials of the storage are finished, {len(repeated)} are tried again, "
            f"{search.n_trials} to go"
        )


def open_storage(url: str) -> "BaseStorage":
    """Optuna's storage of this URL, a database of SQLAlchemy or Redis; raises ConfigError."""
    import optuna
    from sqlalchemy.exc import MovedIn20Warning, SQLAlchemyError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MovedIn20Warning)
            if not url.startswith("redis"):
                # Optuna 2 does not commit the version of its tables with SQLAlchemy 2, and then refuses its own database
                optuna.storages.RDBStorage(url, engine_kwargs={"isolation_level": "AUTOCOMMIT"}).engine.dispose()
            return optuna.storages.get_storage(url)
    except ImportError as error:
        cause = error.__cause__ or error
        raise _not_opened(url, f"{cause}; install the database's Python driver") from None
    except (SQLAlchemyError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
        raise _not_opened(
            url, f"{reason}; legal: a URL of SQLAlchemy such as sqlite:///study.db, whose folder exists"
        ) from None


def _not_opened(url: str, reason: str) -> ConfigError:
    return ConfigError(redact_text(f"hydra.sweeper.storage={url}: it cannot be opened: {reason}"))


def check_storage(hydra: DictConfig) -> None:
    """Raise ConfigError if the sweeper is a search whose storage cannot be opened."""
    sweeper = hydra.sweeper
    if sweeper._target_ == OPTUNA_TARGET and isinstance(sweeper.storage, str):
        open_storage(sweeper.storage)
