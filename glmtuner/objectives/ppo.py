"""Proximal policy optimization: answers, their scores, and updates, on one set of layers.

Policy, reference and reward model are three sets of values for the same parameters, swapped in as they are needed. Shape
letters: R rows, T tokens (prompt and answer, padded on the right), H hidden size, V vocabulary. Values of a token are at the
position before it, from which it was predicted, so those tensors are [R, T - 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from glmtuner.data.prompts import prompts_of
from glmtuner.distributed import ranks
from glmtuner.inference.sampling import Sampler
from glmtuner.models.value_head import FILE, load_head, new_head, save_head
from glmtuner.objectives.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    next_kl_coefficient,
    token_rewards,
    whitened,
)
from glmtuner.objectives.objective import (
    Objective,
    RowMetrics,
    TrainingLoop,
    Weights,
    counted,
    disable_dropout,
    of_counted,
)
from glmtuner.objectives.rollouts import RewardModelScores, answered_rows, random_states, shuffled
from glmtuner.objectives.rows import Rows
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "ppo.json"  # the state of the objective in a checkpoint


def _over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' values."""
    return ranks.all_reduce_mean(value.clone()) * ranks.world_size()


class PpoSettings(Protocol):
    """The keys of stage=ppo that are read here."""

    ppo_epochs: int
    clip_range: float
    value_clip_range: float
    value_coefficient: float
    gamma: float
    gae_lambda: float
    kl_coefficient: float
    minibatch_size: int | None
    kl_target: float | None
    kl_horizon: int
    score_clip: float | None
    whiten_rewards: bool
    whiten_advantages: bool
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A batch of sampled answers, with all that the updates need to know of the policy that sampled them."""

    input_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor
    labels_RT: torch.Tensor  # the answers' tokens with their stop token, IGNORE_INDEX elsewhere
    is_real_R: torch.Tensor  # False of answers to prompts that fill up the batch
    old_logprobs_RT: torch.Tensor
    old_values_RT: torch.Tensor
    advantages_RT: torch.Tensor
    returns_RT: torch.Tensor

    @property
    def is_response_RT(self) -> torch.Tensor:
        """True where an answer's token is predicted that is learned from, [R, T - 1]."""
        return (self.labels_RT[:, 1:] != IGNORE_INDEX) & self.is_real_R[:, None]

    def rows(self, indices: torch.Tensor) -> "Rollout":
        """The rollout of these rows."""
        return replace(self, **{name: value[indices] for name, value in vars(self).items()})


class PpoObjective(Objective):
    """PPO on sampled answers; the reference is the model as it is now.

    reward: the reward model's values for the model's parameters; reward_head: the file of its value head.
    """

    takes_optimizer_steps: ClassVar[bool] = True
    reads_counted: ClassVar[bool] = True

    def __init__(
        self,
        model: "PreTrainedModel",
        settings: PpoSettings,
        *,
        reward: Weights,
        reward_head: Path,
        sampler: Sampler,
    ) -> None:
        super().__init__(model)
        self.settings, self.reference = settings, Weights.snapshot(model)
        self.policy = Weights({})  # the model's current values
        self.sampler = sampler
        self.kl_coefficient: float = settings.kl_coefficient
        self.reward = RewardModelScores(model, reward, reward_head)
        self.value_head = new_head(model, random_init=False)
        model.value_head = self.value_head  # trained with the model's parameters
        disable_dropout(model)

    # -- answers and their scores ----------------------------------------------------------------------------------------

    def generate_answers(
        self, prompts: Sequence[list[int]], states: Sequence[Random] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, attention mask and labels of the prompts with the policy's answers, each [R, T]; greedy without `states`."""
        answers = self.sampler.answers(prompts, states)
        return answered_rows(prompts, answers, self.sampler.pad_id, self.model.device)

    def scores(self, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor) -> torch.Tensor:
        """The reward model's scores, clipped, [R]."""
        scores_R = self.reward(input_ids_RT, attention_mask_RT, self.settings.minibatch_size)
        clip = self.settings.score_clip
        return scores_R if clip is None else scores_R.clamp(-clip, clip)

    def rollout(
        self, prompts: Sequence[list[int]], seed: int = 0, step: int = 0, is_real_R: torch.Tensor | None = None
    ) -> tuple[Rollout, RowMetrics, float]:
        """Sampled answers with their advantages, the metrics logged of them, and the mean KL of all ranks' answers.

        What is drawn depends on the run's `seed` and the `step`. `is_real_R` is False of prompts that fill up the batch.
        """
        if is_real_R is None:
            is_real_R = torch.ones(len(prompts), dtype=torch.bool, device=self.model.device)
        states = random_states(seed, step, len(prompts))
        input_ids_RT, attention_mask_RT, labels_RT = self.generate_answers(prompts, states)
        is_response_RT = (labels_RT[:, 1:] != IGNORE_INDEX) & is_real_R[:, None]
        scores_R = self.scores(input_ids_RT, attention_mask_RT)
        with self.reference.applied_to(self.model):
            reference_RT, _, _ = self._answer_statistics(input_ids_RT, attention_mask_RT, labels_RT)
        with self.policy.applied_to(self.model):
            logprobs_RT, values_RT, entropy_R = self._answer_statistics(input_ids_RT, attention_mask_RT, labels_RT)
        settings = self.settings
        kl_RT = (logprobs_RT - reference_RT) * is_response_RT
        rewards_RT = token_rewards(scores_R, kl_RT, is_response_RT, self.kl_coefficient)
        if settings.whiten_rewards:
            rewards_RT = whitened(rewards_RT, is_response_RT, shift_mean=False, total=_over_ranks)
        advantages_RT, returns_RT = generalized_advantages(
            rewards_RT, values_RT, is_response_RT, settings.gamma, settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantages_RT = whitened(advantages_RT, is_response_RT, total=_over_ranks)
        kl_R = kl_RT.sum(1)
        is_stop_RT = torch.isin(input_ids_RT, torch.tensor(self.sampler.stop_ids, device=input_ids_RT.device)) & (
            labels_RT != IGNORE_INDEX
        )
        measured = {
            "reward": scores_R,
            "kl": kl_R,
            "kl_coefficient": torch.full_like(kl_R, self.kl_coefficient),
            "entropy": entropy_R,
            "response_length": is_response_RT.sum(1).float(),
            "response_stopped": is_stop_RT.any(1).float(),
        }
        rollout = Rollout(
            input_ids_RT=input_ids_RT, attention_mask_RT=attention_mask_RT, labels_RT=labels_RT, is_real_R=is_real_R,
            old_logprobs_RT=logprobs_RT, old_values_RT=values_RT, advantages_RT=advantages_RT, returns_RT=returns_RT,
        )  # fmt: skip
        kl, count = _over_ranks(torch.stack([kl_R.sum(), is_real_R.sum().to(kl_R)]))
        return rollout, of_counted(measured, is_real_R), (kl / count).item()

    def _answer_statistics(
        self, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor, labels_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and values of the answers' tokens, each [R, T - 1], and mean entropies, [R]; in minibatches."""
        temperature = self.settings.temperature
        logprobs, values, entropies = [], [], []
        for ids_RT, mask_RT, targets_RT in zip(
            *map(self._split_rows, (input_ids_RT, attention_mask_RT, labels_RT)), strict=True
        ):
            rows = Rows(self.model, ids_RT, mask_RT)
            found = rows.statistics(targets_RT, temperature=temperature, entropy=True, states=True)
            is_response_RT = targets_RT[:, 1:] != IGNORE_INDEX
            logprobs.append(found.logprobs_RT[:, 1:])
            values.append(rows.unpacked(self.value_head(found.states_BSH))[:, :-1] * is_response_RT)
            assert found.entropies_RT is not None
            entropies.append(found.entropies_RT.sum(1) / is_response_RT.sum(1).clamp(min=1))
        return torch.cat(logprobs), torch.cat(values), torch.cat(entropies)

    def _split_rows(self, table_RT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(table_RT, self.settings.minibatch_size or len(table_RT))

    # -- updates ---------------------------------------------------------------------------------------------------------

    def update_loss(self, part: Rollout, model: nn.Module | None = None) -> tuple[torch.Tensor, RowMetrics]:
        """The clipped policy loss with the value loss, of some rows of a rollout; `model` is the wrapped model, if any.

        They are means over the tokens of all ranks, whose gradients are averaged.
        """
        settings, is_response_RT = self.settings, part.is_response_RT
        tokens = ranks.all_reduce_mean(is_response_RT.sum().float()).clamp(min=1e-9)
        rows = Rows(self.model, part.input_ids_RT, part.attention_mask_RT)
        found = rows.statistics(part.labels_RT, model, temperature=settings.temperature, states=True)
        logprobs_RT = found.logprobs_RT[:, 1:]
        values_RT = rows.unpacked(self.value_head(found.states_BSH))[:, :-1]
        policy_loss, clip_fraction = clipped_policy_loss(
            logprobs_RT, part.old_logprobs_RT, part.advantages_RT, is_response_RT, settings.clip_range, tokens
        )
        value_loss = clipped_value_loss(
            values_RT, part.old_values_RT, part.returns_RT, is_response_RT, settings.value_clip_range, tokens
        )
        measured = {"policy_loss": policy_loss, "value_loss": value_loss, "clip_fraction": clip_fraction}
        return policy_loss + settings.value_coefficient * value_loss, {
            name: value.detach()[None] for name, value in measured.items()
        }

    def minibatches(self, rollout: Rollout) -> Iterator[Rollout]:
        """The minibatches of one step's updates, in order; every epoch shuffles the rows, those that fill up the batch last."""
        for _ in range(self.settings.ppo_epochs):
            for indices in shuffled(rollout.is_real_R, self.settings.minibatch_size):
                yield rollout.rows(indices)

    def update(self, trainer: TrainingLoop, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One training step: a rollout, then an optimizer step per minibatch but for the last, which the trainer's loop takes.

        Returns the mean loss of the updates; the gradient of the last one is left in the parameters.
        """
        prompts = prompts_of(batch)
        is_real_R = counted(batch, len(prompts), self.model.device)
        with trainer.compute_loss_context_manager():
            rollout, measured, kl = self.rollout(prompts, trainer.args.seed, trainer.state.global_step + 1, is_real_R)
        trainer.measured.add(measured)
        trainer.tokens += rollout.attention_mask_RT[rollout.is_real_R].sum()
        losses = []
        minibatches = list(self.minibatches(rollout))
        for number, minibatch in enumerate(minibatches, 1):
            with trainer.compute_loss_context_manager():
                loss, measured = self.update_loss(minibatch, model)
            trainer.measured.add(measured)
            losses.append(loss.detach())
            trainer.accelerator.backward(loss)
            if number < len(minibatches):
                if trainer.args.max_grad_norm:
                    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
        settings = self.settings
        if settings.kl_target is not None:
            rows = int(_over_ranks(rollout.is_real_R.sum()))
            self.kl_coefficient = next_kl_coefficient(
                self.kl_coefficient, kl, settings.kl_target, settings.kl_horizon, rows
            )
        return torch.stack(losses).mean()

    def preflight_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of an update on a rollout of the batch."""
        rollout, _, _ = self.rollout(prompts_of(batch))
        return self.update_loss(rollout)[0]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """Used for evaluation: the negative score of each prompt's greedy answer, [R]; the score is the metric `reward`."""
        input_ids_RT, attention_mask_RT, labels_RT = self.generate_answers(prompts_of(batch), states=None)
        scores_R = self.scores(input_ids_RT, attention_mask_RT)
        lengths_R = (labels_RT != IGNORE_INDEX).sum(1).float()
        return -scores_R, {"reward": scores_R, "response_length": lengths_R}

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the value head and the KL coefficient."""
        save_head(self.value_head, folder)
        write_json(folder / STATE, {"kl_coefficient": self.kl_coefficient})

    def restore(self, folder: Path) -> None:
        """Load the value head and the KL coefficient."""
        load_head(self.value_head, folder / FILE)
        self.kl_coefficient = read_json(folder / STATE)["kl_coefficient"]
