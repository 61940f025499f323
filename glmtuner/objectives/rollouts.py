"""What the objectives on sampled answers share: their random states, answers as rows, and the scores of a reward model.

Shape letters: R rows, T tokens (prompt and answer, padded on the right).
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from glmtuner.distributed import ranks
from glmtuner.models.value_head import load_head, new_head
from glmtuner.objectives.objective import Weights
from glmtuner.objectives.rows import Rows
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_states(seed: int, step: int, answers: int) -> list[Random]:
    """A random state for each of this rank's answers of a step, of which every rank has so many.

    It is that of the run's seed, the step and the answer's place among those of all ranks, and of nothing else: so a resumed run,
    and a run on several ranks, draws what an uninterrupted run of one process with the same batch draws.
    """
    first = ranks.rank() * answers
    return [Random(f"{seed} {step} {place}") for place in range(first, first + answers)]


def shuffled(is_real_R: torch.Tensor, size: int | None) -> list[torch.Tensor]:
    """The indices of a rollout's rows in minibatches of `size`, by default all rows in one, shuffled.

    Rows that fill up the batch come last; minibatches in which no rank has any other are left out.
    """
    size = size or len(is_real_R)
    order = torch.randperm(len(is_real_R)).to(is_real_R.device)
    order = torch.cat([order[is_real_R[order]], order[~is_real_R[order]]])
    count = max(ranks.all_gather(-(-int(is_real_R.sum()) // size)))
    return list(torch.split(order, size))[:count]


def answered_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of prompts with their answers, each [R, T]; the labels are the answers' tokens."""
    pairs = list(zip(prompts, answers, strict=True))
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + [*answer]) for prompt, answer in pairs]
    return (
        pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device),
        pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device),
    )


class RewardModelScores:
    """A reward model on the layers of the policy: other values of the same parameters, and the head in a file."""

    def __init__(self, model: "PreTrainedModel", reward: Weights, head: Path) -> None:
        self.model, self.reward = model, reward
        self.head = new_head(model, random_init=False).requires_grad_(False)
        load_head(self.head, head)

    def __call__(
        self, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor, rows: int | None = None
    ) -> torch.Tensor:
        """The score of each row, [R], computed for so many `rows` at a time; null is all of them."""
        size = rows or len(input_ids_RT)
        with self.reward.applied_to(self.model):
            parts = zip(torch.split(input_ids_RT, size), torch.split(attention_mask_RT, size), strict=True)
            head = self.head.to(self.model.device)
            return torch.cat([head(Rows(self.model, *part).last_states()) for part in parts])
