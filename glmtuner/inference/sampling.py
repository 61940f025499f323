"""Answers for a policy to learn from: sampled from whole distributions, by continuous batching."""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import torch

from glmtuner.console import say
from glmtuner.distributed import accelerator
from glmtuner.inference.decoding import FAILED, Decoder, NoCacheError, Row, greedy, most_likely
from glmtuner.inference.generate import MAX_ROWS_CPU, MAX_ROWS_GPU, by_length, continuations
from glmtuner.inference.in_step import in_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Draws:
    """Draws the tokens of answers, each from a random state of its own.

    So an answer depends on its state and its prompt, up to rounding, and not on what else is in the batch, or on another rank.
    """

    def __init__(self, states: Sequence[Random], temperature: float) -> None:
        self.states, self.temperature = states, temperature

    def __call__(self, logits_BV: torch.Tensor, rows: Sequence[Row | None]) -> torch.Tensor:
        """A token of each row, [B], by the inverse of the cumulative distribution; FAILED where that is not finite."""
        probabilities_BV = torch.softmax(logits_BV / self.temperature, dim=-1)
        if torch.are_deterministic_algorithms_enabled():
            probabilities_BV = probabilities_BV.cpu()  # torch has no deterministic sum on a GPU
        is_finite_B = probabilities_BV.isfinite().all(-1)
        # sums of float32 would leave out the words at the end of a large vocabulary; Metal has no float64
        dtype = torch.float32 if probabilities_BV.device.type == "mps" else torch.float64
        sums_BV = probabilities_BV.where(is_finite_B[:, None], 1.0).cumsum(-1, dtype=dtype)
        shares = [0.0 if row is None else self.states[row[0]].random() for row in rows]
        points_B1 = sums_BV[:, -1:] * torch.tensor(shares, dtype=dtype, device=sums_BV.device)[:, None]
        tokens_B = torch.searchsorted(sums_BV, points_B1, right=True)[:, 0].clamp(max=sums_BV.shape[1] - 1)
        return tokens_B.where(is_finite_B, FAILED).to(logits_BV.device)


class Sampler:
    """Answers of one model. `max_rows` is the most that are generated at once, by default 64, or 128 on a GPU.

    Which answers stand in a batch determines how logits are rounded, so their number does not depend on the free memory: a
    resumed run gives the same.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        pad_id: int,
        temperature: float,
        max_rows: int | None = None,
    ) -> None:
        self.model, self.max_new_tokens, self.stop_ids = model, max_new_tokens, stop_ids
        self.pad_id, self.temperature = pad_id, temperature
        self.max_rows = max_rows
        # None until they were tried:
        self.pads: bool | None = None  # do rows of other lengths leave an answer as it is?
        self.repeats: bool | None = None  # does an answer stay as it is where its prompt is read once for several?

    def answers(
        self, prompts: Sequence[Sequence[int]], states: Sequence[Random] | None, group: int = 1
    ) -> list[list[int]]:
        """The token ids behind each prompt, up to and including the first stop token; the most likely ones without `states`.

        Each `group` of prompts is the same one over and over, which is read once for all. There is a state for each answer;
        a model without a cache draws from torch's global random state instead.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with in_step(self.model, prompts, self.pad_id):
                try:
                    return self._continuously_batched(prompts, states, group)
                except NoCacheError:
                    sampling = {} if states is None else {"temperature": self.temperature}
                    return continuations(
                        self.model, [[*prompt] for prompt in prompts], max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids,
                        pad_id=self.pad_id, do_sample=states is not None, **sampling,
                    )  # fmt: skip
        finally:
            self.model.train(was_training)

    def _continuously_batched(
        self, prompts: Sequence[Sequence[int]], states: Sequence[Random] | None, group: int
    ) -> list[list[int]]:
        decoder = Decoder(self.model, self.pad_id)
        short = min(prompts, key=len)
        if self.max_rows is None:  # only now the model is where it computes
            self.max_rows = MAX_ROWS_GPU if accelerator.has_memory(decoder.device) else MAX_ROWS_CPU
        if self.pads is None:
            long = max(prompts, key=len)
            # prompts of one length say nothing about padding
            longer = long if len(long) > len(short) else [*long, *long[-1:]]
            self.pads = decoder.padding_invariant(short, longer)
            if not self.pads and not decoder.batch_invariant(short, longer[: len(short)]):
                self.max_rows = 1
        if self.repeats is None and group > 1:
            self.repeats = decoder.repeat_invariant(short)
            if not self.repeats:
                name = type(decoder.model).__name__
                say(
                    f"the answers of {name} change where a prompt is read once for several: it is read for each of them"
                )
        order = range(len(prompts)) if self.pads else by_length(prompts)
        found = dict(
            greedy(
                decoder,
                [prompts[index] for index in order],
                max_rows=self.max_rows,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
                repetition_penalty=1.0,
                pads=self.pads,
                group=group if self.repeats else 1,
                choose=most_likely if states is None else Draws([states[index] for index in order], self.temperature),
            )
        )
        answer_of = {index: found[place] for place, index in enumerate(order)}
        return [answer_of[index] for index in range(len(prompts))]
