"""The scores of a reward model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from glmtuner.config.groups import Model, preset
from glmtuner.config.rewards import Reward


@preset("reward", "model")
@dataclass(kw_only=True)
class RewardModel(Reward):
    """The score that `model.reward_model`, a run of stage=rm, gives to prompt and answer; stage=grpo computes it as stage=ppo does."""

    uses_reward_model: ClassVar[bool] = True

    def impossible(self, model: Model, max_tokens: int) -> Iterator[str]:
        if model.reward_model is None:
            yield (
                "reward=model without model.reward_model: train a reward model with stage=rm and type model.reward_model=<its run "
                "folder>"
            )
