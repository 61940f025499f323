"""The learning rate of a training that continues a checkpoint."""

from typing import Any

from transformers import TrainerCallback


class FollowSchedule(TrainerCallback):
    """Sets the learning rate of the first step to that of the schedule.

    A checkpoint's optimizer has the rate of its own schedule for the next step: zero, if that one ended there and this
    training is longer.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule: Any = kwargs.get("lr_scheduler")
        if state.global_step == 0 or not hasattr(schedule, "lr_lambdas"):
            return
        rates = [
            base * rate_of(schedule.last_epoch)
            for base, rate_of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
