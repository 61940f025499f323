"""Hydra's basic sweeper, as `register` of the launchers puts it in the place of Hydra's own."""

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from glmtuner.config.compose import MOST_SWEEP_JOBS_CHECKED

BASIC_TARGET = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


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

        seen = 0

        def validate_whole(batch: Sequence[Sequence[str]]) -> None:
            nonlocal seen
            sweeper.config = self.whole_config
            validate(batch[max(MOST_SWEEP_JOBS_CHECKED - seen, 0) :])  # the first ones are composed already
            sweeper.config, seen = folder_only, seen + len(batch)

        sweeper.config, sweeper.validate_batch_is_legal = folder_only, validate_whole  # type: ignore[method-assign]
        return sweeper.sweep(arguments)
