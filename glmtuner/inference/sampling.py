"""Answers for a policy to learn from: sampled from whole distributions, by continuous batching."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from glmtuner.inference.decoding import Decoder, NoCacheError, drawn, greedy, most_likely
from glmtuner.inference.generate import MAX_ROWS_CPU, MAX_ROWS_GPU, by_length, continuations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sampler:
    """Answers of one model. `max_rows` is the most that are generated at once, by default 64, or 128 on a GPU.

    Which answers stand in a batch determines what is drawn, so their number does not depend on the free memory: a resumed run
    draws the same.
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
        self.max_rows = max_rows or (MAX_ROWS_GPU if model.device.type == "cuda" else MAX_ROWS_CPU)
        self.pads: bool | None = None  # do rows of other lengths leave an answer as it is? None until it was tried

    def answers(self, prompts: Sequence[Sequence[int]], *, sample: bool) -> list[list[int]]:
        """The token ids behind each prompt, up to and including the first stop token; the most likely ones if not `sample`."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self._continuously_batched(prompts, sample)
        except NoCacheError:
            return continuations(
                self.model, [[*prompt] for prompt in prompts], max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids,
                pad_id=self.pad_id, do_sample=sample, **({"temperature": self.temperature} if sample else {}),
            )  # fmt: skip
        finally:
            self.model.train(was_training)

    def _continuously_batched(self, prompts: Sequence[Sequence[int]], sample: bool) -> list[list[int]]:
        decoder = Decoder(self.model, self.pad_id)
        if self.pads is None:
            short, long = min(prompts, key=len), max(prompts, key=len)
            # prompts of one length say nothing about padding
            longer = long if len(long) > len(short) else [*long, *long[-1:]]
            self.pads = decoder.padding_invariant(short, longer)
            if not self.pads and not decoder.batch_invariant(short, longer[: len(short)]):
                self.max_rows = 1
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
                choose=partial(drawn, temperature=self.temperature) if sample else most_likely,
            )
        )
        answer_of = {index: found[place] for place, index in enumerate(order)}
        return [answer_of[index] for index in range(len(prompts))]
