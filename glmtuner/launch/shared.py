"""Several runs of one process that share their base, tokenizer and data, and compute their steps together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import TrainingError
from glmtuner.launch.device import device_of, place_model
from glmtuner.launch.parts import Parts
from glmtuner.run_folder.folder import is_out_of_memory
from glmtuner.templates.base import Template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets
    from glmtuner.training.joint_step import JointStep
    from glmtuner.training.lockstep import Runner
    from glmtuner.training.trainer import GlmTrainer


class SharedBase:
    """The base of a group of runs, loaded by the first of them, and what else is the same for all."""

    def __init__(self) -> None:
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.data: dict[Any, Datasets] = {}
        self.joint: JointStep | None = None

    def device(self, run: Run) -> "torch.device":
        """The device of the group."""
        return device_of(run)

    def together(self) -> "dict[str, Callable[[Sequence[Runner]], None]]":
        """What the runs compute together, by the names that they wait for, as `Lockstep` takes it."""
        from glmtuner.training.joint_step import BACKWARD, FORWARD

        def computed(kind: str, runners: "Sequence[Runner]") -> None:
            assert self.joint is not None
            try:
                (self.joint.backward if kind == BACKWARD else self.joint.forward)(runners)
            except Exception as error:
                if len(runners) == 1 or not is_out_of_memory(error):
                    raise
                raise TrainingError(
                    f"the memory does not suffice for a step of {len(runners)} jobs together; type "
                    f"hydra.launcher.jobs_at_once={len(runners) // 2}, or a smaller trainer.per_device_train_batch_size"
                ) from error

        return {kind: partial(computed, kind) for kind in (BACKWARD, FORWARD)}

    def parts_of(self, run: Run, runner: "Runner") -> Parts:
        """The parts of one of the runs."""
        return SharedParts(self, run, runner)


class SharedParts(Parts):
    """The parts of a run of the group."""

    def __init__(self, base: SharedBase, run: Run, runner: "Runner") -> None:
        self.base, self.run, self.runner = base, run, runner

    def tokenizer(self, run: Run) -> "PreTrainedTokenizerBase":
        if self.base.tokenizer is None:
            self.base.tokenizer = super().tokenizer(run)
        return self.base.tokenizer

    def datasets(
        self, run: Run, specs: dict[str, DatasetSpec], template: Template, tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        trainer = run.trainer
        evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
        seed = trainer.seed if trainer.data_seed is None else trainer.data_seed
        drawn = run.data.dev_ratio or run.data.mix_probabilities
        key = (bool(evaluates), seed if drawn else None, run.generation.thinking)
        if key not in self.base.data:
            self.base.data[key] = super().datasets(run, specs, template, tokenizer)
        return self.base.data[key]

    @property
    def load_model(self) -> "Callable[..., PreTrainedModel]":  # type: ignore[override]
        """Loads the base once, and returns a tree of modules of its own each time."""
        return self._twin

    def _twin(self, *args: Any, **options: Any) -> "PreTrainedModel":
        from glmtuner.kernels.segment_attention import enable_segment_attention, segment_attention_problem
        from glmtuner.models.load import load_model
        from glmtuner.models.twins import twin_of
        from glmtuner.training.joint_step import JointStep

        if self.base.model is None:
            model = load_model(*args, **options)
            place_model(self.run, model, device_of(self.run))
            self.run.quant.prepare(model)
            self.base.model = model
        if self.base.joint is None:
            base = twin_of(self.base.model)
            if segment_attention_problem(base) is None:
                enable_segment_attention(base)
            self.base.joint = JointStep(base)
        return twin_of(self.base.model)

    @property
    def trainer(self) -> "Callable[..., GlmTrainer]":  # type: ignore[override]
        from glmtuner.training.shared_trainer import SharedTrainer

        assert self.base.joint is not None
        return partial(SharedTrainer, runner=self.runner, joint=self.base.joint)
