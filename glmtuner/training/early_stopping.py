"""Ends a training whose evaluations no longer improve, by the same decision after a resume."""

from typing import Any

from transformers import TrainerCallback

from glmtuner.console import say


class EarlyStopping(TrainerCallback):
    """Ends the training after `patience` evaluations in a row that are not better than the best one by more than `threshold`.

    `evaluations` counts them; a checkpoint keeps the number. Evaluations before step 1 and after the training do not count.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold
        self.evaluations = 0
        self._is_training = False

    @property
    def stops(self) -> bool:
        """Whether the training is over."""
        return self.evaluations >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_training = False

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Called before transformers compares the same metric with the best so far, `state.best_metric`."""
        if not self._is_training or state.global_step == 0:
            return
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        value, best = (metrics or {})[name], state.best_metric
        gain = None if best is None else value - best if args.greater_is_better else best - value
        self.evaluations = 0 if gain is None or gain > self.threshold else self.evaluations + 1
        if self.stops:
            control.should_training_stop = True
            say(
                f"the training stops early, after step {state.global_step}: in {self.evaluations} evaluations {name} has not become "
                f"better than {best:g} by more than {self.threshold:g} (trainer.early_stopping_patience={self.patience})"
            )
