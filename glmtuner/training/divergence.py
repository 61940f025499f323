"""The end of a training that diverged: at the first number that is not finite, before it reaches the saved weights."""

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from glmtuner.distributed import accelerator
from glmtuner.errors import Diverged, TrainingError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def require_finite(name: str, value: torch.Tensor, step: int, args: "TrainingArguments") -> torch.Tensor:
    """The value; raises Diverged where it is not finite. `step` counts the optimizer steps before it."""
    if not bool(torch.isfinite(value).all()):
        raise Diverged(
            f"the {name} is {value.item()} in step {step + 1}: the training diverged with trainer.learning_rate="
            f"{args.learning_rate:g} and trainer.max_grad_norm={args.max_grad_norm:g}; type a smaller trainer.learning_rate, "
            "trainer.warmup_ratio=0.03, trainer.max_grad_norm=1, or a higher precision (trainer.bf16=true instead of fp16, "
            "model.dtype=float32)"
        )
    return value


class FiniteChecks:
    """`require_finite` for the numbers of every step, without waiting for the GPU in every step.

    A number on a GPU is copied beside the computation and looked at when it has arrived, at most LAG numbers later; the GPU has work
    for the next step meanwhile. `settle` waits for what has not arrived, before anything of the training is logged or saved.
    """

    LAG = 4

    def __init__(self, args: "TrainingArguments") -> None:
        self.args = args
        self._pending: deque[tuple[Any, str, torch.Tensor, int]] = deque()

    def add(self, name: str, value: torch.Tensor, step: int) -> None:
        """Check a number, [], now or later; raises Diverged for it or an earlier one."""
        if isinstance(value, DTensor) or not accelerator.has_memory(value.device):
            self.settle()
            require_finite(name, value, step, self.args)
            return
        copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        copy.copy_(value.detach().reshape(()), non_blocking=True)
        self._pending.append((accelerator.recorded_event(value.device), name, copy, step))
        while self._pending and (len(self._pending) > self.LAG or self._pending[0][0].query()):
            self._check_first()

    def settle(self) -> None:
        """Check all numbers; raises Diverged for the first that is not finite."""
        while self._pending:
            self._check_first()

    def _check_first(self) -> None:
        arrived, name, copy, step = self._pending.popleft()
        arrived.synchronize()
        require_finite(name, copy, step, self.args)


def require_finite_weights(parameters: Iterable[torch.nn.Parameter], args: "TrainingArguments") -> None:
    """Raise Diverged where a trained weight is not finite after the last step; of a shard, this rank's part counts."""
    for parameter in parameters:
        values = parameter.detach()
        local = values.to_local() if isinstance(values, DTensor) else values
        if parameter.requires_grad and not bool(torch.isfinite(local).all()):
            raise Diverged(
                f"a trained weight is not finite after the last step: the training diverged with trainer.learning_rate="
                f"{args.learning_rate:g}; type a smaller trainer.learning_rate, or trainer.warmup_ratio=0.03"
            )


def require_finite_evaluation(losses: torch.Tensor, step: int, args: "TrainingArguments") -> None:
    """Raise Diverged unless every evaluation record has a finite loss after `step` optimizer steps."""
    failed = int((~torch.isfinite(losses)).sum())
    if not failed:
        return
    what = f"the loss of {failed:,} of {len(losses):,} evaluation records is not finite"
    higher = "a higher precision (trainer.bf16=true instead of fp16, model.dtype=float32)"
    if not step:
        raise Diverged(f"{what}: the model overflows; type {higher}")
    raise Diverged(
        f"{what} after step {step}: the training diverged with trainer.learning_rate={args.learning_rate:g}; type a smaller "
        f"trainer.learning_rate, trainer.warmup_ratio=0.03, or {higher}"
    )


def require_steps(taken: int, trained: int) -> None:
    """Raise TrainingError where there were steps, and none of the `trained` ones updated the weights."""
    if trained and not taken:
        raise TrainingError(
            f"no optimizer step was taken in {trained} steps: every gradient overflowed in half precision; type trainer.bf16=true "
            "instead of trainer.fp16=true, or a smaller trainer.learning_rate"
        )
