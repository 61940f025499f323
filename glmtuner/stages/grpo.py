"""Group relative policy optimization, and the losses that followed it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.ranges import range_errors
from glmtuner.config.rewards import PolicyLoss, ScaleRewards
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError, DataError
from glmtuner.objectives.reward_model import head_file
from glmtuner.run_folder.names import SAMPLED
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

# What the papers of the losses choose: epsilon, epsilon_high, scale_rewards. Dr. GRPO and DAPO keep PPO's lower bound; RLOO does
# without bounds, since it takes one step on each answer, where they do nothing.
PAPERS = {
    PolicyLoss.grpo: (0.2, 0.2, ScaleRewards.group),
    PolicyLoss.dr_grpo: (0.2, 0.2, ScaleRewards.none),
    PolicyLoss.dapo: (0.2, 0.28, ScaleRewards.group),
    PolicyLoss.gspo: (3e-4, 4e-4, ScaleRewards.group),
    PolicyLoss.rloo: (0.2, 0.2, ScaleRewards.none),
}


@preset("stage", "grpo")
@dataclass(kw_only=True)
class Grpo(LearningStage):
    """Reinforcement learning without a value function: an answer's advantage is its reward relative to other answers to the prompt.

    A step is `trainer.per_device_train_batch_size` prompts with `num_generations` answers each: sampling, rewards, then
    `num_iterations` passes of updates over them (Shao et al. 2024, arXiv:2402.03300). The reference is the model at the start of
    this run. The rewards are the presets of the group `reward`.

    loss: grpo (arXiv:2402.03300), dr_grpo (Liu et al. 2025, arXiv:2503.20783), dapo (Yu et al. 2025, arXiv:2503.14476), gspo (Zheng
        et al. 2025, arXiv:2507.18071), rloo (Ahmadian et al. 2024, arXiv:2402.14740).
    num_generations: answers to each prompt.
    epsilon, epsilon_high: the ratio to the policy that sampled is clipped to 1 - epsilon and 1 + epsilon_high; null is the loss's
        paper's: 0.2, for dapo 0.2 and 0.28, for gspo 0.0003 and 0.0004. An `epsilon` alone is both.
    beta: weight of the KL divergence from the reference, of every token (arXiv:2402.03300, eq. 4), for rloo of the answer and in its
        reward; 0 holds no reference.
    use_bias_correction_kl: is the divergence of a token multiplied by the ratio, so that its gradient is unbiased (DeepSeek-V3.2,
        arXiv:2512.02556, section 3.1)?
    scale_rewards: the standard deviation that advantages are divided by: that of a prompt's rewards (group), that of all rewards of
        a step (batch), or none; null is the paper's: group, for dr_grpo and rloo none.
    mask_truncated_completions: is nothing learned from answers without a stop token (arXiv:2503.14476, section 3.4)?
    num_iterations: passes over each batch of answers (arXiv:2402.03300, algorithm 1).
    minibatch_size: answers per optimizer step; null is all of a step.
    microbatch_size: answers per forward and backward pass, which determine the memory and change nothing else; null is a minibatch.
    temperature: of sampling, and of the probabilities in the loss; there is no top-k and no top-p, since the ratio is that of the
        full distributions.
    max_new_tokens: the most tokens of an answer; null is data.max_target_length.
    """

    loss: PolicyLoss
    num_generations: int
    beta: float
    use_bias_correction_kl: bool = False
    epsilon: float | None = None
    epsilon_high: float | None = None
    scale_rewards: ScaleRewards | None = None
    mask_truncated_completions: bool = False
    num_iterations: int = 1
    minibatch_size: int | None = None
    microbatch_size: int | None = None
    temperature: float = 1.0
    max_new_tokens: int | None = None

    reads_rows: ClassVar[bool] = True
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss", "reward", "response_length", "response_stopped")
    uses_reward_model: ClassVar[bool] = True
    uses_rewards: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    memory_notice: ClassVar[str | None] = (
        "stage=grpo also generates answers, and holds a reference if stage.beta is above 0, which are not counted"
    )

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "stage",
                self,
                (
                    (
                        "num_generations",
                        self.num_generations >= 2,
                        "2 or more: rewards are relative to those of other answers",
                    ),
                    ("beta", self.beta >= 0, "0 or more; 0 holds no reference"),
                    ("epsilon", self.epsilon is None or 0 < self.epsilon < 1, "in (0, 1), or null for the paper's"),
                    (
                        "epsilon_high",
                        self.epsilon_high is None or self.epsilon_high > 0,
                        "above 0, or null for stage.epsilon, or else the paper's",
                    ),
                    ("num_iterations", self.num_iterations >= 1, "1 or more"),
                    (
                        "minibatch_size",
                        self.minibatch_size is None or self.minibatch_size >= 1,
                        "1 or more, or null for all",
                    ),
                    (
                        "microbatch_size",
                        self.microbatch_size is None or self.microbatch_size >= 1,
                        "1 or more, or null for a minibatch",
                    ),
                    ("temperature", self.temperature > 0, "above 0"),
                    ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more, or null"),
                ),
            )
        ]
        if self.loss is PolicyLoss.rloo and self.scale_rewards is ScaleRewards.group:
            wrong.append(
                "stage.scale_rewards=group with stage.loss=rloo: its advantages are divided by the standard deviation of a step's, if "
                "at all; type stage.scale_rewards=batch, or leave it out"
            )
        if self.use_bias_correction_kl and (self.beta == 0 or self.loss is PolicyLoss.rloo):
            knob = "stage.loss=rloo, whose divergence is part of the reward" if self.beta else "stage.beta=0"
            wrong.append(f"stage.use_bias_correction_kl=true with {knob}: it would change nothing; leave it out")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def clip(self) -> tuple[float, float]:
        """How far the ratio may go below 1 and above, the paper's values filled in."""
        low, high, _ = PAPERS[self.loss]
        if self.epsilon is not None:
            low = high = self.epsilon
        return low, high if self.epsilon_high is None else self.epsilon_high

    @property
    def scale(self) -> ScaleRewards:
        """What advantages are divided by, the paper's choice filled in."""
        return PAPERS[self.loss][2] if self.scale_rewards is None else self.scale_rewards

    def impossible(self, run: Run) -> Iterator[str]:
        yield from super().impossible(run)
        trainer, answers = run.trainer, run.trainer.per_device_train_batch_size * self.num_generations
        if not run.reward:
            yield "stage=grpo without a reward: answers need a score; type reward=number, or several as reward=[number,format]"
        for reward in run.reward.values():
            yield from reward.impossible(run.model, self.max_new_tokens or run.data.max_target_length)
        if run.model.reward_model is not None and not any(reward.uses_reward_model for reward in run.reward.values()):
            yield (
                f"model.reward_model={run.model.reward_model} without reward=model: nothing would be scored by it; type reward=model, or "
                "leave it out"
            )
        if not trainer.do_train:
            yield (
                "stage=grpo without training: it evaluates nothing that stage=sft does not; type trainer=train, or "
                "trainer=predict with stage=sft"
            )
        if trainer.gradient_accumulation_steps != 1:
            yield (
                f"trainer.gradient_accumulation_steps={trainer.gradient_accumulation_steps} with stage=grpo: a step generates "
                f"{answers} answers at once, and stage.microbatch_size is the number of them in a forward pass; type "
                "trainer.gradient_accumulation_steps=1"
            )
        for name, most, what in (
            (
                "minibatch_size",
                answers,
                "answers of a step (trainer.per_device_train_batch_size times stage.num_generations)",
            ),
            ("microbatch_size", self.minibatch_size or answers, "answers of an optimizer step"),
        ):
            if (getattr(self, name) or 1) > most:
                yield f"stage.{name}={getattr(self, name)} is more than the {most} {what}"

    def check(self, run: Run) -> None:
        """Raise CheckpointError where the reward model is not found, or has another base or method than this run."""
        if run.model.reward_model is not None:
            check_reward_model(run)

    def largest_batch(self, run: Run) -> tuple[int, int]:
        answers = run.trainer.per_device_train_batch_size * self.num_generations
        longest = run.data.max_source_length + (self.max_new_tokens or run.data.max_target_length)
        return self.microbatch_size or self.minibatch_size or answers, longest

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        from glmtuner.data.splits import datasets_of

        data = datasets_of(run, specs, self.encoder(run, template, tokenizer))
        for name, reward in run.reward.items():
            if not reward.reads_labels:
                continue
            for part in data.prepared:
                for row, label in enumerate(part.rows["answer"]):
                    if (problem := reward.label_problem(label)) is not None:
                        prompt = " ".join(part.rows[row]["prompt"].split())[:80]
                        raise DataError(
                            f"data.dataset={part.spec.name}: reward={name} compares answers with the label, and that of row {row + 1} "
                            f"({prompt!r}) {problem}; correct or remove the record, or choose another reward"
                        )
        return data

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.prompts import LabelledPromptEncoder

        return LabelledPromptEncoder(
            template=template,
            tokenizer=tokenizer,
            every_answer=False,
            asks_thinking=getattr(template, "asks_thinking", None),  # as the policy was trained
            **run.data.lengths(),
        )

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.prompts import LabelledPromptCollator

        return LabelledPromptCollator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.console import say
        from glmtuner.objectives.grpo import GrpoObjective
        from glmtuner.objectives.rollouts import RewardModelScores
        from glmtuner.stages.rollouts import sampler_of

        run, tokenizer = context.run, context.tokenizer
        reward_model = None
        if (path := run.model.reward_model) is not None:
            head = head_file(path, "model.reward_model")
            reward_model = RewardModelScores(context.model, reward_weights(context, path), head)
        low, high = self.clip
        say(
            f"stage.loss={self.loss.value}: stage.epsilon={low:g}, stage.epsilon_high={high:g}, "
            f"stage.scale_rewards={self.scale.value}"
        )
        return GrpoObjective(
            context.model,
            self,
            rewards=run.reward,
            sampler=sampler_of(context, self.max_new_tokens, self.temperature),
            tokenizer=tokenizer,
            syntax=context.template.syntax(tokenizer),
            reward_model=reward_model,
            table=context.folder / SAMPLED,
        )
