"""`hydra/sweeper=optuna`: asks Optuna for values, lets Hydra's launcher run the jobs, and tells what they measured."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from glmtuner.config.compose import Composed, check_search_space, presets, searched_dirs
from glmtuner.config.overrides import parse, quoted_value
from glmtuner.config.search_space import has_condition, search_space
from glmtuner.console import say
from glmtuner.distributed.pause import Pause, measure_of
from glmtuner.errors import ConfigError
from glmtuner.report.jobs import Job, State
from glmtuner.run_folder.files import write_text
from glmtuner.sweep.folders import sweep_folder
from glmtuner.sweep.placeholders import reveal
from glmtuner.sweep.rungs import cannot_pause, has_reached, pause_words, wait_for_files
from glmtuner.sweep.search_pruners import pruner_of
from glmtuner.sweep.search_pruning import survivors
from glmtuner.sweep.search_samplers import drawn_at_random
from glmtuner.sweep.search_settings import check_search, settings_of
from glmtuner.sweep.search_storage import open_search
from glmtuner.sweep.search_study import FOLDER, OVERRIDES, SharedStudy, outcome_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OPTUNA_TARGET = "hydra_plugins.glmtuner.OptunaSweeper"  # `_target_` of conf/hydra/sweeper/optuna.yaml
REMOVED_TARGET = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
RESULTS = "optimization_results.yaml"
POLL_SECONDS = 2.0  # between two looks at a folder that another process uses


class OptunaSweeper(Sweeper):
    """Hydra's sweeper of a search; several processes with the same storage share it."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.whole_config = hydra_context, config
        self.sweep_dir = Path(str(config.hydra.sweep.dir))
        self.settings = settings_of(config.hydra.sweeper, config.get("objective"), self.sweep_dir)
        self.jobs = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until `n_trials` are finished; those of other processes count."""
        settings = self.settings
        sources = self.whole_config.hydra.runtime.config_sources
        config_dir = next((source.path for source in sources if source.provider == "command-line"), None)
        space = search_space(arguments, settings.params, presets(searched_dirs(config_dir)))
        self.fixed = space.fixed
        storage, locks = open_search(reveal(settings.storage) if settings.storage else None, self.sweep_dir)
        locks.enter()
        try:
            trials = SharedStudy(settings, space, storage, locks, self.sweep_dir, self.subdir_of)
            say(trials.status())
            if keys := drawn_at_random(settings.sampler, space):
                say(f"search {settings.study_name!r}: the sampler draws {', '.join(keys)} at random")
            while self.run_batch(trials):
                pass
            self.write_results(trials)
        finally:
            locks.leave()

    def run_batch(self, trials: SharedStudy) -> bool:
        """Run the next trials and tell their results; False if there is nothing left to do."""
        batch, others_wait = trials.next_batch()
        if not batch:
            if others_wait:
                time.sleep(POLL_SECONDS)
            return others_wait
        for trial in batch:
            say(f"trial {trial.number}: {' '.join(trial.user_attrs[OVERRIDES])}")
        with ExitStack() as alive:
            for trial in batch:
                alive.enter_context(trials.heartbeat(trial))
            returned = self.run_trials(trials, batch)
        failed = []
        for trial in batch:
            outcome = outcome_of(trials.folder(trial), self.settings.objectives)
            trials.tell(trial, outcome)
            failed += [trial] if outcome.kind == "error" else []
        for job in returned:
            _ = job.return_value  # raises what ended the job before it could record a reason
        if len(failed) / len(batch) > self.settings.max_failure_rate:
            say(
                f"search {self.settings.study_name!r}: {len(failed)} of {len(batch)} trials failed, more than "
                f"hydra.sweeper.max_failure_rate={self.settings.max_failure_rate:g}; the search ends here"
            )
            return False
        return True

    def run_trials(self, trials: SharedStudy, batch: Sequence["FrozenTrial"]) -> list[JobReturn]:
        """Run the jobs of the batch to their ends, or to the rung at which they are pruned."""
        going, returned = [*batch], list[JobReturn]()
        pruner, measure = pruner_of(self.settings.pruner), measure_of(self.settings.objectives[0])

        def launch(to_run: Sequence["FrozenTrial"], pause: Pause | None) -> None:
            if to_run:
                words = [[*self.words_of(trial), *pause_words(pause)] for trial in to_run]
                returned.extend(self.jobs.launch(words, batch[0].number))

        for pause in self.settings.rungs:
            launch([trial for trial in going if not has_reached(trials.folder(trial), pause)], pause)
            wait_for_files([trials.folder(trial) for trial in going], pause, self.whole_config.hydra.launcher)
            going = survivors(trials, going, pause, pruner, measure)
        launch(going, None)
        return returned

    def words_of(self, trial: "FrozenTrial") -> list[str]:
        """The overrides of the trial's job, with its folder."""
        subdir = quoted_value(trial.user_attrs[FOLDER])
        return [*self.fixed, *trial.user_attrs[OVERRIDES], f"hydra.sweep.subdir={subdir}"]

    def subdir_of(self, overrides: list[str], number: int) -> str:
        """The folder, in the sweep's, of the job with these values: hydra.sweep.subdir, composed as the launcher will."""
        config = self.context.config_loader.load_sweep_config(self.whole_config, [*self.fixed, *overrides])
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        outer = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            return str(OmegaConf.select(config, "hydra.sweep.subdir"))
        finally:
            HydraConfig.instance().cfg = outer

    def write_results(self, trials: SharedStudy) -> None:
        """Write optimization_results.yaml, the best trial or the Pareto front, and say it."""
        from optuna.trial import TrialState

        name, objectives = self.settings.study_name, self.settings.objectives
        complete = trials.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            say(f"search {name!r}: no trial has a result yet")
            return
        best = trials.study.best_trials
        if len(objectives) > 1:
            results: dict[str, Any] = {
                "name": "optuna",
                "solutions": [{"params": trial.params, "values": trial.values} for trial in best],
            }
            found = f"{len(best)} of them are on the Pareto front of {' and '.join(objectives)}"
        else:
            results = {"name": "optuna", "best_params": best[0].params, "best_value": best[0].value}
            found = f"the best is trial {best[0].number}, {objectives[0]} {best[0].value:.6g}"
        write_text(self.sweep_dir / RESULTS, yaml.safe_dump(results, sort_keys=False, allow_unicode=True))
        say(f"search {name!r}: {len(complete)} trials have a result; {found}")


def check_sweeper(composed: Composed, overrides: Sequence[str], *, config_dir: str | None, config_name: str) -> bool:
    """Whether the composed sweep is a search, one that can run; raises ConfigError or CheckpointError for what it cannot do."""
    if composed.hydra.sweeper._target_ != OPTUNA_TARGET:
        conditional = [override.input_line for override in parse(overrides) if has_condition(override)]
        if conditional:
            raise ConfigError(
                f"{conditional[0]}: conditions are for searches, and this sweep runs every combination; type hydra/sweeper=optuna, or "
                "leave the tag out"
            )
        return False
    settings = check_search(composed.hydra, composed.run.objective, sweep_folder(overrides))
    if settings.rungs and (
        wrong := [*cannot_pause(composed.run, settings.rungs, "hydra.sweeper.rungs", per_record=False)]
    ):
        raise ConfigError("; also: ".join(wrong))
    space = search_space(overrides, settings.params, presets(searched_dirs(config_dir)))
    check_search_space(space, config_dir=config_dir, config_name=config_name)
    return True


def is_failure(job: Job, searches: bool) -> bool:
    """Whether the job of a sweep makes the command fail; to a search, one that diverged or still runs elsewhere is none."""
    if searches and (job.state is State.running or outcome_of(job.folder, []).kind == "diverged"):
        return False
    return job.state in (State.failed, State.unfinished, State.running)


class RemovedSweeper(Sweeper):
    """hydra-optuna-sweeper's class, in a preset of the user's own."""

    def __init__(self, **options: Any) -> None:
        raise ConfigError(
            f"hydra.sweeper._target_={REMOVED_TARGET}: searches are glmtuner's own now; start the preset from the shipped one with "
            "defaults: [/hydra/sweeper/optuna@_here_], and leave _target_ out"
        )

    def setup(self, **context: Any) -> None: ...

    def sweep(self, arguments: Sequence[str]) -> None: ...
