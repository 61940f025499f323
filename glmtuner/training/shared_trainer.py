"""The Trainer of a run that shares its base, and each forward and backward pass, with other runs in this process."""

from typing import TYPE_CHECKING, Any

import torch

from glmtuner.console import say
from glmtuner.memory.checkpointing import enable_checkpointing
from glmtuner.training.joint_step import JointStep, Place
from glmtuner.training.lockstep import Runner
from glmtuner.training.trainer import GlmTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments


class SharedTrainer(GlmTrainer):
    """GlmTrainer whose steps `joint` computes with those of other runs; everything else is each run's own."""

    def __init__(
        self, model: torch.nn.Module, args: "TrainingArguments", *, runner: Runner, joint: JointStep, **kwargs: Any
    ) -> None:
        super().__init__(model, args, **kwargs)
        self.runner, self.joint = runner, joint
        self.place: Place | None = None

    def measure_peak(self) -> None:
        """Nothing: the peak is that of all runs together, since the first began."""

    def checkpoint_activations(self) -> None:
        """Also in the model of the joint step, whose layers with dropout then remember their random states."""
        super().checkpoint_activations()
        enable_checkpointing(self.joint.base, self.args)
        self.joint.layers.recomputing.keeps_states |= bool(self.args.activation_checkpointing)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The training, in the joint step unless something forbids it, which is printed."""
        self.joint.autocast = self.accelerator.autocast
        self.place = self.joint.enter(self.model, self.runner)
        problem = self._problem() or self.place.problem
        if problem is not None:
            self.place.problem = problem
            say(f"this run computes its steps by itself: {problem}")
        was_told = problem is not None
        self.runner.can_stop = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self.runner.can_stop = False
            if self.place.problem is not None and not was_told:
                say(f"this run computed its steps by itself: {self.place.problem}")
            self.joint.leave(self.place)

    def _problem(self) -> str | None:
        """Why the losses of this run cannot be computed from hidden states of a row without padding."""
        if self.objective is not None or not self.chunks_loss:
            reasons = "; ".join(reason for reason in self.left_out.values() if reason)
            return f"its loss is not one of last hidden states{f' ({reasons})' if reasons else ''}"
        return None

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """GlmTrainer's step, whose forward and backward pass through the base are those of all runs."""
        assert self.place is not None
        if "segments" not in inputs:
            self.place.problem = self.place.problem or "its batches are padded"
        step = super().training_step
        return self.place.step(lambda: step(model, inputs, num_items_in_batch))
