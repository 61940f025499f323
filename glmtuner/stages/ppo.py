"""Proximal policy optimization."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.ranges import range_errors
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError
from glmtuner.objectives.reward_model import head_file
from glmtuner.stages.reward_model import check_reward_model, reward_weights
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective
    from glmtuner.templates.base import Template


@preset("stage", "ppo")
@dataclass(kw_only=True)
class Ppo(LearningStage):
    """Reinforcement learning: the model answers prompts, `model.reward_model` scores the answers, and PPO increases the scores.

    A step is `trainer.per_device_train_batch_size` prompts: answers, scores, then `ppo_epochs` passes of updates over them
    (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al.
    2022, arXiv:2203.02155). The reference is the model at the start of this run.

    ppo_epochs: passes over each batch of answers (arXiv:1707.06347, algorithm 1).
    minibatch_size: answers per optimizer step, which determine the memory; null is the whole batch.
    clip_range: the probability ratio is clipped to 1 plus or minus this (arXiv:1707.06347, eq. 7).
    value_clip_range: a new value is clipped to the old one plus or minus this (arXiv:1909.08593's code).
    value_coefficient: weight of the value loss (arXiv:1707.06347, eq. 9); the value head shares the policy's layers.
    gamma, gae_lambda: discount, and bias-variance trade-off, of the advantages (Schulman et al. 2015, arXiv:1506.02438).
    kl_coefficient: weight of the penalty on log(policy / reference) of every token (arXiv:1909.08593, eq. 2).
    kl_target, kl_horizon: with a target, the coefficient adapts until the mean KL of an answer is the target; the horizon is the
        number of answers over which it adapts (arXiv:1909.08593, section 2.2); null keeps the coefficient fixed.
    score_clip: scores are clipped to plus or minus this; null disables it (Huang et al. 2024, arXiv:2403.17031).
    whiten_rewards, whiten_advantages: scale to variance 1, and shift advantages to mean 0, in each batch (arXiv:1909.08593's code;
        arXiv:2403.17031).
    temperature: of sampling, and of the probabilities in the loss; there is no top-k and no top-p, since the probability ratio
        is that of the full distributions.
    max_new_tokens: the most tokens of an answer; null is data.max_target_length.
    """

    ppo_epochs: int
    clip_range: float
    value_clip_range: float
    value_coefficient: float
    gamma: float
    gae_lambda: float
    kl_coefficient: float
    minibatch_size: int | None = None
    kl_target: float | None = None
    kl_horizon: int = 10000
    score_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    temperature: float = 1.0
    max_new_tokens: int | None = None

    reads_rows: ClassVar[bool] = True
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss", "reward", "response_length")
    uses_reward_model: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    memory_notice: ClassVar[str | None] = (
        "stage=ppo also generates answers and holds a value head and a reward model, which are not counted"
    )

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "stage",
                self,
                (
                    ("ppo_epochs", self.ppo_epochs >= 1, "1 or more"),
                    (
                        "minibatch_size",
                        self.minibatch_size is None or self.minibatch_size >= 1,
                        "1 or more, or null for the whole batch",
                    ),
                    ("clip_range", 0 < self.clip_range < 1, "in (0, 1)"),
                    ("value_clip_range", self.value_clip_range > 0, "above 0"),
                    ("value_coefficient", self.value_coefficient >= 0, "0 or more"),
                    ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
                    ("gae_lambda", 0 <= self.gae_lambda <= 1, "in [0, 1]"),
                    ("kl_coefficient", self.kl_coefficient >= 0, "0 or more"),
                    (
                        "kl_target",
                        self.kl_target is None or self.kl_target > 0,
                        "above 0, or null for a fixed coefficient",
                    ),
                    ("kl_horizon", self.kl_horizon >= 1, "1 answer or more"),
                    ("score_clip", self.score_clip is None or self.score_clip > 0, "above 0, or null"),
                    ("temperature", self.temperature > 0, "above 0"),
                    ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more, or null"),
                ),
            )
        ]
        if self.kl_target is not None and self.kl_coefficient == 0:
            wrong.append(
                "stage.kl_target with stage.kl_coefficient=0: the coefficient adapts by a factor, so it would stay 0; "
                "type stage.kl_coefficient=0.1"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def impossible(self, run: Run) -> Iterator[str]:
        yield from super().impossible(run)
        trainer = run.trainer
        if run.model.reward_model is None:
            yield (
                "stage=ppo without model.reward_model: answers need a score; train a reward model with stage=rm and type "
                "model.reward_model=<its run folder>"
            )
        if not trainer.do_train:
            yield (
                "stage=ppo without training: it evaluates nothing that stage=sft does not; type trainer=train, or "
                "trainer=predict with stage=sft"
            )
        if trainer.gradient_accumulation_steps != 1:
            yield (
                f"trainer.gradient_accumulation_steps={trainer.gradient_accumulation_steps} with stage=ppo: a step generates "
                "trainer.per_device_train_batch_size answers at once and trains on stage.minibatch_size at a time; type "
                "trainer.gradient_accumulation_steps=1"
            )
        if (self.minibatch_size or 1) > trainer.per_device_train_batch_size:
            yield (
                f"stage.minibatch_size={self.minibatch_size} is more than the trainer.per_device_train_batch_size="
                f"{trainer.per_device_train_batch_size} answers of a step"
            )

    def check(self, run: Run) -> None:
        """Raise CheckpointError where the reward model is not found, or has another base or method than this run."""
        check_reward_model(run)

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        from glmtuner.data.splits import datasets_of

        return datasets_of(run, specs, self.encoder(run, template, tokenizer))

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.prompts import PromptEncoder

        asks_thinking = getattr(template, "asks_thinking", None)  # as the policy was trained
        return PromptEncoder(
            template=template,
            tokenizer=tokenizer,
            every_answer=False,
            asks_thinking=asks_thinking,
            **run.data.lengths(),
        )

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.prompts import PromptCollator

        return PromptCollator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.ppo import PpoObjective
        from glmtuner.stages.rollouts import sampler_of

        path = str(context.run.model.reward_model)
        return PpoObjective(
            context.model,
            self,
            reward=reward_weights(context, path),
            reward_head=head_file(path, "model.reward_model"),
            sampler=sampler_of(context, self.max_new_tokens, self.temperature),
        )
