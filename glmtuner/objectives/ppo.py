"""Proximal policy optimization: answers, scores, and updates on one set of layers.

Policy, reference and reward model are three sets of values for the same parameters, put in place in turn. Shape letters: R
rows, T tokens (prompt and answer, padded on the right). What is said of a token stands at the place before it, where it was
predicted, so those tables are [R, T - 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from glmtuner.data.prompts import prompts_of
from glmtuner.distributed import ranks
from glmtuner.inference.generate import continuations
from glmtuner.models.value_head import FILE, hidden_states, last_token_scores, load_head, new_head, save_head
from glmtuner.objectives.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    label_logprobs,
    mean_entropy,
    next_kl_coefficient,
    token_rewards,
    whitened,
)
from glmtuner.objectives.objective import Measured, Objective, Weights, without_dropout
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.templates.base import IGNORE_INDEX

STATE = "ppo.json"  # what the objective carries from step to step


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A batch of answers with everything that updates need of the policy that gave them."""

    input_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor
    labels_RT: torch.Tensor  # the answers' tokens, their stop token included
    old_logprobs_RT: torch.Tensor
    old_values_RT: torch.Tensor
    advantages_RT: torch.Tensor
    returns_RT: torch.Tensor

    @property
    def is_response_RT(self) -> torch.Tensor:
        return self.labels_RT[:, 1:] != IGNORE_INDEX

    def rows(self, places: torch.Tensor) -> "Rollout":
        return replace(self, **{name: value[places] for name, value in vars(self).items()})


class PpoObjective(Objective):
    """`settings` has the keys of stage=ppo; the reference is the model as it comes in here."""

    updates: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        settings: Any,
        *,
        reward: Weights,
        reward_head: Path,
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        pad_id: int,
    ) -> None:
        super().__init__(model)
        self.settings, self.reward, self.reference = settings, reward, Weights.trained_in(model)
        self.policy = Weights({})  # the model as it is
        self.max_new_tokens, self.stop_ids, self.pad_id = max_new_tokens, stop_ids, pad_id
        self.kl_coefficient: float = settings.kl_coefficient
        self.reward_head = new_head(model, drawn=False).requires_grad_(False)
        load_head(self.reward_head, reward_head)
        model.value_head = new_head(model, drawn=False)
        without_dropout(model)

    # -- answers and their scores ----------------------------------------------------------------------------------------

    def answered(self, prompts: list[list[int]], sample: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, mask and labels of prompts with answers of the policy, each [R, T]."""
        answers = continuations(
            self.model, prompts, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids, pad_id=self.pad_id,
            do_sample=sample, temperature=self.settings.temperature,
        )  # fmt: skip
        device = self.model.device
        rows = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [
            torch.tensor([IGNORE_INDEX] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return (
            pad_sequence(rows, batch_first=True, padding_value=self.pad_id).to(device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
            pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device),
        )

    def scores(self, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor) -> torch.Tensor:
        """The reward model's scores, clipped, [R]."""
        with self.reward.on(self.model):
            parts = zip(self._pieces(input_ids_RT), self._pieces(attention_mask_RT), strict=True)
            head = self.reward_head.to(self.model.device)
            scores_R = torch.cat([last_token_scores(self.model, head, *part) for part in parts])
        clip = self.settings.score_clip
        return scores_R if clip is None else scores_R.clamp(-clip, clip)

    def rollout(self, prompts: list[list[int]]) -> tuple[Rollout, Measured, float]:
        """Sampled answers ready to be learned from, what is logged of them, and their mean KL."""
        input_ids_RT, attention_mask_RT, labels_RT = self.answered(prompts, sample=True)
        is_response_RT = labels_RT[:, 1:] != IGNORE_INDEX
        scores_R = self.scores(input_ids_RT, attention_mask_RT)
        with self.reference.on(self.model):
            reference_RT, _, _ = self._judged(input_ids_RT, attention_mask_RT, labels_RT)
        with self.policy.on(self.model):
            logprobs_RT, values_RT, entropy_R = self._judged(input_ids_RT, attention_mask_RT, labels_RT)
        settings = self.settings
        kl_RT = (logprobs_RT - reference_RT) * is_response_RT
        rewards_RT = token_rewards(scores_R, kl_RT, is_response_RT, self.kl_coefficient)
        if settings.whiten_rewards:
            rewards_RT = whitened(rewards_RT, is_response_RT, shift_mean=False)
        advantages_RT, returns_RT = generalized_advantages(
            rewards_RT, values_RT, is_response_RT, settings.gamma, settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantages_RT = whitened(advantages_RT, is_response_RT)
        kl_R = kl_RT.sum(1)
        stopped = torch.isin(input_ids_RT, torch.tensor(self.stop_ids, device=input_ids_RT.device)) & (labels_RT >= 0)
        measured = {
            "reward": scores_R,
            "kl": kl_R,
            "kl_coefficient": torch.full_like(kl_R, self.kl_coefficient),
            "entropy": entropy_R,
            "response_length": is_response_RT.sum(1).float(),
            "response_stopped": stopped.any(1).float(),
        }
        found = Rollout(
            input_ids_RT=input_ids_RT, attention_mask_RT=attention_mask_RT, labels_RT=labels_RT,
            old_logprobs_RT=logprobs_RT, old_values_RT=values_RT, advantages_RT=advantages_RT, returns_RT=returns_RT,
        )  # fmt: skip
        return found, measured, kl_R.mean().item()

    def _judged(self, *tables_RT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities and values of the answers' tokens, each [R, T - 1], and entropies, [R], some rows at a time."""
        temperature, parts = self.settings.temperature, []
        for ids_RT, mask_RT, labels_RT in zip(*map(self._pieces, tables_RT), strict=True):
            states_RTH, logits_RTV = hidden_states(self.model, ids_RT, mask_RT, logits=True)
            parts.append(
                (
                    label_logprobs(logits_RTV, labels_RT, temperature),
                    self.model.value_head(states_RTH)[:, :-1] * (labels_RT[:, 1:] != IGNORE_INDEX),
                    mean_entropy(logits_RTV, labels_RT, temperature),
                )
            )
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _pieces(self, table_RT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return table_RT.split(self.settings.minibatch_size or len(table_RT))

    # -- updates ---------------------------------------------------------------------------------------------------------

    def update_loss(self, part: Rollout, call: nn.Module | None = None) -> tuple[torch.Tensor, Measured]:
        """The clipped objective with the value loss, of some rows of a rollout."""
        settings, is_response_RT = self.settings, part.is_response_RT
        states_RTH, logits_RTV = hidden_states(self.model, part.input_ids_RT, part.attention_mask_RT, call, logits=True)
        logprobs_RT = label_logprobs(logits_RTV, part.labels_RT, settings.temperature)
        values_RT = self.model.value_head(states_RTH)[:, :-1]
        policy_loss, clip_fraction = clipped_policy_loss(
            logprobs_RT, part.old_logprobs_RT, part.advantages_RT, is_response_RT, settings.clip_range
        )
        value_loss = clipped_value_loss(
            values_RT, part.old_values_RT, part.returns_RT, is_response_RT, settings.value_clip_range
        )
        measured = {"policy_loss": policy_loss, "value_loss": value_loss, "clip_fraction": clip_fraction}
        return policy_loss + settings.value_coefficient * value_loss, {
            name: value.detach()[None] for name, value in measured.items()
        }

    def minibatches(self, rollout: Rollout) -> Iterator[Rollout]:
        """The parts that the updates of one step are made on, in order; rows are shuffled in every pass."""
        rows = len(rollout.labels_RT)
        for _ in range(self.settings.ppo_epochs):
            for places in torch.randperm(rows).split(self.settings.minibatch_size or rows):
                yield rollout.rows(places.to(rollout.labels_RT.device))

    def update(self, trainer: Any, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One step of training: answers, then all updates on them but the last, which is left to the trainer's loop.

        Returns the mean loss of the updates; the gradient of the last one is in the parameters.
        """
        with trainer.compute_loss_context_manager():
            rollout, measured, kl = self.rollout(prompts_of(batch))
        trainer.measured.add(measured)
        trainer.tokens += rollout.attention_mask_RT.sum()
        losses = []
        parts = list(self.minibatches(rollout))
        for number, part in enumerate(parts, 1):
            with trainer.compute_loss_context_manager():
                loss, measured = self.update_loss(part, model)
            trainer.measured.add(measured)
            losses.append(loss.detach())
            trainer.accelerator.backward(loss)
            if number < len(parts):
                if trainer.args.max_grad_norm:
                    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
        settings = self.settings
        if settings.kl_target is not None:
            mean_kl = ranks.all_reduce_mean(torch.tensor(kl, device=self.model.device)).item()
            rows = len(batch["input_ids"]) * ranks.world_size()
            self.kl_coefficient = next_kl_coefficient(
                self.kl_coefficient, mean_kl, settings.kl_target, settings.kl_horizon, rows
            )
        return torch.stack(losses).mean()

    def trial(self, batch: dict[str, Any]) -> torch.Tensor:
        rollout, _, _ = self.rollout(prompts_of(batch))
        return self.update_loss(rollout)[0]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Measured]:
        """An evaluation: the negative score of each prompt's greedy answer, [R], and the same as `reward`."""
        input_ids_RT, attention_mask_RT, labels_RT = self.answered(prompts_of(batch), sample=False)
        scores_R = self.scores(input_ids_RT, attention_mask_RT)
        lengths_R = (labels_RT != IGNORE_INDEX).sum(1).float()
        return -scores_R, {"reward": scores_R, "response_length": lengths_R}

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        save_head(self.model.value_head, folder)
        write_json(folder / STATE, {"kl_coefficient": self.kl_coefficient})

    def restore(self, folder: Path) -> None:
        load_head(self.model.value_head, folder / FILE)
        self.kl_coefficient = read_json(folder / STATE)["kl_coefficient"]
