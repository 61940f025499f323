"""Group relative policy optimization: several answers to each prompt, their rewards, and updates on the model's own layers.

Shape letters: R rows (the answers; those to a prompt stand together), T tokens (prompt and answer, padded on the right). Values of a
token are at the position before it, from which it was predicted, so those tensors are [R, T - 1].
"""

import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from glmtuner.config.rewards import PolicyLoss, Reward, Sampled, ScaleRewards
from glmtuner.data.prompts import prompts_of
from glmtuner.distributed import ranks
from glmtuner.errors import TrainingError
from glmtuner.inference.detokenize import decode_answer
from glmtuner.inference.generate import until_stop
from glmtuner.inference.sampling import Sampler
from glmtuner.objectives.objective import (
    Objective,
    RowMetrics,
    TrainingLoop,
    Weights,
    counted,
    disable_dropout,
    of_counted,
)
from glmtuner.objectives.policy_losses import (
    clipped_surrogate,
    group_advantages,
    importance_log_ratio,
    leave_one_out_advantages,
    reference_kl,
    scaled_by_batch,
    token_weights,
)
from glmtuner.objectives.rollouts import RewardModelScores, answered_rows, random_states, shuffled
from glmtuner.objectives.rows import Rows, TokenStatistics
from glmtuner.run_folder.files import read_lines, strict_json, write_text
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.templates.tool_calls import Syntax

THOUGHT = "<think>"
THOUGHT_TOKENS = 16  # of the prompt, in which a `<think>` at its end stands, if it is not a token of its own
MOST_CHARACTERS = 4000  # of a text in the file of sampled answers


class GrpoSettings(Protocol):
    """The keys of stage=grpo that are read here."""

    loss: PolicyLoss
    num_generations: int
    beta: float
    use_bias_correction_kl: bool
    num_iterations: int
    minibatch_size: int | None
    microbatch_size: int | None
    mask_truncated_completions: bool
    temperature: float

    @property
    def clip(self) -> tuple[float, float]: ...
    @property
    def scale(self) -> ScaleRewards: ...


@dataclass(frozen=True, kw_only=True)
class Group:
    """A batch of sampled answers, with all that the updates need to know of them."""

    input_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor
    labels_RT: torch.Tensor  # the answers' tokens with their stop token, IGNORE_INDEX elsewhere
    is_counted_RT: torch.Tensor  # the tokens that are learned from, [R, T - 1]: none of an answer that is filtered out
    advantages_R: torch.Tensor
    is_real_R: torch.Tensor  # False of answers to prompts that fill up the batch
    old_logprobs_RT: torch.Tensor | None  # None: those of the update itself, which then is the only one
    reference_RT: torch.Tensor | None  # None without a reference

    def rows(self, indices: torch.Tensor | slice) -> "Group":
        """These rows of it."""
        chosen: dict[str, Any] = {name: None if value is None else value[indices] for name, value in vars(self).items()}
        return replace(self, **chosen)


class GrpoObjective(Objective):
    """A clipped policy loss on groups of sampled answers; the reference is the model as it is now, and is held if `beta` is above 0.

    rewards: what scores the answers, by name; `reward_model` is that of reward=model.
    table: the file that gets a group of answers of every step; None writes none.
    """

    takes_optimizer_steps: ClassVar[bool] = True
    reads_counted: ClassVar[bool] = True

    def __init__(
        self,
        model: "PreTrainedModel",
        settings: GrpoSettings,
        *,
        rewards: Mapping[str, Reward],
        sampler: Sampler,
        tokenizer: "PreTrainedTokenizerBase",
        syntax: "Syntax | None" = None,
        reward_model: RewardModelScores | None = None,
        table: Path | None = None,
    ) -> None:
        super().__init__(model)
        self.settings, self.rewards, self.reward_model = settings, rewards, reward_model
        self.sampler, self.tokenizer, self.syntax, self.table = sampler, tokenizer, syntax, table
        self.reference = Weights.snapshot(model) if settings.beta else None
        self.policy = Weights({})  # the model's current values
        self.table_started = False
        disable_dropout(model)

    # -- answers and their rewards ---------------------------------------------------------------------------------------

    def sampled(
        self, batch: Mapping[str, Any], generations: int, states: Sequence[Random] | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[Sampled]]:
        """So many answers to each prompt, as ids, mask and labels, each [R, T], and as texts; the most likely ones without `states`."""
        prompts = [prompt for prompt in prompts_of(dict(batch)) for _ in range(generations)]
        answers = self.sampler.answers(prompts, states, generations)
        texts = [
            Sampled(
                prompt=batch["prompt"][row // generations],
                answer=self._text(prompt, answer),
                label=batch["answer"][row // generations],
                tokens=len(answer),
                max_tokens=self.sampler.max_new_tokens,
                stopped=bool(answer) and answer[-1] in self.sampler.stop_ids,
            )
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        return answered_rows(prompts, answers, self.sampler.pad_id, self.model.device), texts

    def _text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """An answer's text; a thought that the prompt begins is the answer's."""
        text = decode_answer(self.tokenizer, until_stop(answer, self.sampler.stop_ids), self.syntax)
        begins = decode_answer(self.tokenizer, prompt[-THOUGHT_TOKENS:], self.syntax).rstrip().endswith(THOUGHT)
        return f"{THOUGHT}\n{text}" if begins else text

    def scores(
        self, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sampled: Sequence[Sampled]
    ) -> tuple[torch.Tensor, RowMetrics]:
        """The weighted sum of the rewards, [R], and each of them, without its weight, [R]."""
        device = self.model.device
        parts: dict[str, torch.Tensor] = {}
        for name, reward in self.rewards.items():
            if reward.uses_reward_model:
                assert self.reward_model is not None
                parts[name] = self.reward_model(rows[0], rows[1], self._size(len(sampled))).float()
            else:
                parts[name] = torch.tensor(_scores(name, reward, sampled), device=device)
        weighted = [reward.weight * parts[name] for name, reward in self.rewards.items()]
        return torch.stack(weighted).sum(0), parts

    def rollout(
        self, batch: Mapping[str, Any], seed: int = 0, step: int = 0
    ) -> tuple[Group, RowMetrics, list[dict[str, Any]]]:
        """Sampled answers with their advantages, the metrics logged of them, and the first prompt's answers as the table has them.

        What is drawn depends on the run's `seed` and the `step`.
        """
        settings, group = self.settings, self.settings.num_generations
        states = random_states(seed, step, len(batch["input_ids"]) * group)
        rows, sampled = self.sampled(batch, group, states)
        input_ids_RT, attention_mask_RT, labels_RT = rows
        rewards_R, parts = self.scores(rows, sampled)
        is_response_RT = labels_RT[:, 1:] != IGNORE_INDEX
        stopped_R = torch.tensor([each.stopped for each in sampled], device=self.model.device)
        is_real = counted(batch, len(batch["input_ids"]), self.model.device)  # prompts
        is_real_R = is_real.repeat_interleave(group)
        is_counted_RT = is_response_RT & is_real_R[:, None]
        if settings.mask_truncated_completions:
            is_counted_RT = is_counted_RT & stopped_R[:, None]
        reference_RT = old_RT = None
        if self.reference is not None:
            with self.reference.applied_to(self.model):
                reference_RT = self._logprobs(*rows)
        is_sequence_kl = settings.loss is PolicyLoss.rloo and reference_RT is not None
        if self._updates(len(sampled)) > 1 or is_sequence_kl:
            with self.policy.applied_to(self.model):
                old_RT = self._logprobs(*rows)
        learned_R = rewards_R
        if is_sequence_kl:  # the KL divergence is part of the reward (arXiv:2402.14740, eq. 4)
            assert old_RT is not None and reference_RT is not None
            learned_R = rewards_R - settings.beta * ((old_RT - reference_RT) * is_counted_RT).sum(1)
        grouped = rewards_R.view(-1, group)
        of_answers = {
            "reward": rewards_R,
            **{f"reward_{name}": part_R for name, part_R in parts.items()},
            "response_length": is_response_RT.sum(1).float(),
            "response_stopped": stopped_R.float(),
        }
        of_prompts = {"reward_std": grouped.std(1), "no_signal": (grouped.amax(1) == grouped.amin(1)).float()}
        measured = of_counted(of_answers, is_real_R) | of_counted(of_prompts, is_real)
        made = Group(
            input_ids_RT=input_ids_RT, attention_mask_RT=attention_mask_RT, labels_RT=labels_RT, is_counted_RT=is_counted_RT,
            advantages_R=self._advantages(learned_R, is_real_R), is_real_R=is_real_R, old_logprobs_RT=old_RT,
            reference_RT=reference_RT,
        )  # fmt: skip
        shown = [
            {
                "answer": each.answer[:MOST_CHARACTERS],
                "reward": rewards_R[row].item(),
                **{f"reward_{name}": part_R[row].item() for name, part_R in parts.items()},
                "tokens": each.tokens,
            }
            for row, each in enumerate(sampled[:group])
        ]
        return made, measured, shown

    def _advantages(self, rewards_R: torch.Tensor, is_real_R: torch.Tensor) -> torch.Tensor:
        """The advantage of each answer, [R], 0 of those that fill up; a standard deviation of a step's rewards is that of all ranks'."""
        group, scale, mine, own_R = self.settings.num_generations, self.settings.scale, slice(None), rewards_R
        if scale is ScaleRewards.batch and ranks.world_size() > 1:
            by_rank, rank = ranks.all_gather(rewards_R[is_real_R].tolist()), ranks.rank()
            first = sum(map(len, by_rank[:rank]))
            mine = slice(first, first + len(by_rank[rank]))
            rewards_R = rewards_R.new_tensor([reward for rewards in by_rank for reward in rewards])
        else:
            rewards_R = rewards_R[is_real_R]
        if self.settings.loss is not PolicyLoss.rloo:
            advantages_R = group_advantages(rewards_R, group, scale)
        else:
            advantages_R = leave_one_out_advantages(rewards_R, group)
            advantages_R = scaled_by_batch(advantages_R) if scale is ScaleRewards.batch else advantages_R
        return torch.zeros_like(own_R).masked_scatter(is_real_R, advantages_R[mine])

    def _statistics(self, part: Group, model: nn.Module | None, *, entropy: bool) -> TokenStatistics:
        rows = Rows(self.model, part.input_ids_RT, part.attention_mask_RT)
        return rows.statistics(part.labels_RT, model, temperature=self.settings.temperature, entropy=entropy)

    def _logprobs(
        self, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor, labels_RT: torch.Tensor
    ) -> torch.Tensor:
        """The log-probabilities of the answers' tokens, [R, T - 1]."""
        size, temperature = self._size(len(labels_RT)), self.settings.temperature
        parts = zip(*(torch.split(each, size) for each in (input_ids_RT, attention_mask_RT, labels_RT)), strict=True)
        return torch.cat(
            [
                Rows(self.model, ids_RT, mask_RT).statistics(labels, temperature=temperature).logprobs_RT[:, 1:]
                for ids_RT, mask_RT, labels in parts
            ]
        )

    def _size(self, rows: int) -> int:
        """The rows of a forward pass."""
        settings = self.settings
        return settings.microbatch_size or settings.minibatch_size or rows

    def _updates(self, rows: int) -> int:
        """The optimizer steps on a rollout of so many rows."""
        return self.settings.num_iterations * math.ceil(rows / (self.settings.minibatch_size or rows))

    # -- updates ---------------------------------------------------------------------------------------------------------

    def part_loss(
        self, part: Group, weights_RT: torch.Tensor, model: nn.Module | None = None
    ) -> tuple[torch.Tensor, RowMetrics]:
        """What some rows of a minibatch add to its loss, given the tokens' weights, [R, T - 1]; `model` is the wrapped one, if any."""
        settings, is_counted_RT = self.settings, part.is_counted_RT
        found = self._statistics(part, model, entropy=True)
        logprobs_RT = found.logprobs_RT[:, 1:]
        old_RT = logprobs_RT.detach() if part.old_logprobs_RT is None else part.old_logprobs_RT
        log_ratio_RT = importance_log_ratio((logprobs_RT - old_RT) * is_counted_RT, is_counted_RT, settings.loss)
        loss_RT, is_clipped_RT = clipped_surrogate(log_ratio_RT, part.advantages_R, *settings.clip)
        is_response_RT, counted_R = part.labels_RT[:, 1:] != IGNORE_INDEX, is_counted_RT.sum(1)
        assert found.entropies_RT is not None
        clipped_R = (is_clipped_RT * is_counted_RT).sum(1) / counted_R  # NaN where nothing counts
        measured: RowMetrics = {
            "entropy": found.entropies_RT.sum(1) / is_response_RT.sum(1).clamp(min=1),
            "clip_fraction": clipped_R,
        }
        if part.reference_RT is not None:
            if settings.loss is not PolicyLoss.rloo:
                kl_RT = reference_kl(logprobs_RT, part.reference_RT)
                loss_RT = loss_RT + settings.beta * (
                    log_ratio_RT.exp() * kl_RT if settings.use_bias_correction_kl else kl_RT
                )
            measured["kl"] = ((logprobs_RT - part.reference_RT) * is_response_RT).sum(1)
        measured = of_counted({name: value.detach() for name, value in measured.items()}, part.is_real_R)
        return (loss_RT * weights_RT).sum(), measured

    def weights(self, minibatch: Group) -> torch.Tensor:
        """The weights of a minibatch's tokens, [R, T - 1], in means over the rows or tokens of all ranks, whose gradients are averaged."""
        is_counted_RT = minibatch.is_counted_RT
        tokens, rows = ranks.all_reduce_mean(torch.stack([is_counted_RT.sum(), minibatch.is_real_R.sum()]).float())
        return token_weights(is_counted_RT, self.settings.loss, self.sampler.max_new_tokens, tokens, rows)

    def minibatches(self, rollout: Group) -> Iterator[Group]:
        """The minibatches of one step's updates, in order; every iteration shuffles the rows, those that fill up the batch last."""
        for _ in range(self.settings.num_iterations):
            for indices in shuffled(rollout.is_real_R, self.settings.minibatch_size):
                yield rollout.rows(indices)

    def update(self, trainer: TrainingLoop, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One training step: a rollout, then an optimizer step per minibatch but for the last, which the trainer's loop takes.

        Returns the mean loss of the updates; the gradient of the last one is left in the parameters.
        """
        step = trainer.state.global_step + 1
        with trainer.compute_loss_context_manager():
            rollout, measured, shown = self.rollout(batch, trainer.args.seed, step)
        self._write(step, batch, shown)
        trainer.measured.add(measured)
        trainer.tokens += rollout.attention_mask_RT[rollout.is_real_R].sum()
        losses = []
        minibatches = list(self.minibatches(rollout))
        for number, minibatch in enumerate(minibatches, 1):
            weights_RT, size = self.weights(minibatch), self._size(len(minibatch.labels_RT))
            total = torch.zeros((), device=self.model.device)
            for start in range(0, len(weights_RT), size):
                rows = slice(start, start + size)
                with trainer.compute_loss_context_manager():
                    loss, measured = self.part_loss(minibatch.rows(rows), weights_RT[rows], model)
                trainer.measured.add(measured)
                total += loss.detach()
                trainer.accelerator.backward(loss)
            losses.append(total)
            if number < len(minibatches):
                if trainer.args.max_grad_norm:
                    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
        trainer.measured.add({"policy_loss": torch.stack(losses)})
        return torch.stack(losses).mean()

    def preflight_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of an update on a rollout of the batch, with advantages of 1: all answers may have the same reward."""
        rollout, _, _ = self.rollout(batch)
        part = rollout.rows(slice(0, self._size(len(rollout.labels_RT))))
        part = replace(
            part, advantages_R=torch.ones_like(part.advantages_R), is_counted_RT=part.labels_RT[:, 1:] != IGNORE_INDEX
        )
        return self.part_loss(part, self.weights(part))[0]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """Used for evaluation: the negative reward of each prompt's most likely answer, [R]; the metrics name it and its parts."""
        rows, sampled = self.sampled(batch, 1, states=None)
        rewards_R, parts = self.scores(rows, sampled)
        device = self.model.device
        return -rewards_R, {
            "reward": rewards_R,
            **{f"reward_{name}": part_R for name, part_R in parts.items()},
            "response_length": torch.tensor([float(each.tokens) for each in sampled], device=device),
            "response_stopped": torch.tensor([float(each.stopped) for each in sampled], device=device),
        }

    # -- the table of answers --------------------------------------------------------------------------------------------

    def _write(self, step: int, batch: Mapping[str, Any], shown: list[dict[str, Any]]) -> None:
        """Append the first prompt's answers; before the first, drop those of steps that a resumed run takes again."""
        if self.table is None or not ranks.is_main():
            return
        if not self.table_started:
            kept = [
                line for line in read_lines(self.table) if isinstance(line.get("step"), int) and line["step"] < step
            ]
            write_text(self.table, "".join(f"{strict_json(line)}\n" for line in kept))
            self.table_started = True
        asked = {
            "step": step,
            "prompt": batch["prompt"][0][:MOST_CHARACTERS],
            "label": batch["answer"][0][:MOST_CHARACTERS],
        }
        with self.table.open("a", encoding="utf-8") as file:
            file.write("".join(f"{strict_json(asked | answer)}\n" for answer in shown))


def _scores(name: str, reward: Reward, sampled: Sequence[Sampled]) -> list[float]:
    """What a reward gives to the answers; raises TrainingError where its function fails, or gives something that is not a finite number."""
    try:
        given: list[Any] = [*reward.scores(sampled)]
    except (Exception, SystemExit) as error:  # a user's function may also end the process, without a word
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TrainingError(
            f"reward={name} failed on the answers to {_quoted(sampled)} ({reason}, at {last.filename}:{last.lineno}); fix it, or leave "
            "it out"
        ) from error
    scores = [_finite(score) for score in given]
    numbers = [score for score in scores if score is not None]
    if len(numbers) != len(sampled):
        wrong = repr(given[scores.index(None)])[:80] if None in scores else f"{len(given)} scores"
        raise TrainingError(
            f"reward={name} gave {wrong} for the {len(sampled)} answers to {_quoted(sampled)}: a finite number for each is expected; "
            "fix it, or leave it out"
        )
    return numbers


def _finite(score: Any) -> float | None:
    """A score as a number; None where it is not finite, or no number, such as a text."""
    if isinstance(score, str | bytes):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _quoted(sampled: Sequence[Sampled]) -> str:
    return json.dumps(sampled[0].prompt[-80:], ensure_ascii=False)
