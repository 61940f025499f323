"""Continuous batching (Yu et al., Orca, OSDI 2022): finished sequences are replaced by the next prompts between two steps.

Rows are left-padded, so all get their next token in the same column. Keys and values are kept in preallocated buffers with
spare columns and written in place, whereas transformers' DynamicCache copies itself for every token.
Rows of caches that hold more than the keys and values of every token (sliding windows, linear attention) cannot join one
by one; such rows start together, and a finished row stays in the batch until all have finished.

A decoding step of a large model launches more than a thousand small kernels, and launching them from Python takes longer
than a GPU takes to run them. While a batch's buffers stay the same, a step is therefore captured as a CUDA graph and
replayed (glmtuner/inference/replay.py).

Shape letters: B rows, W columns in use, R rows and C columns of a buffer, G key-value heads, D head dimension, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import Cache

from glmtuner.console import say
from glmtuner.distributed import accelerator
from glmtuner.errors import ConfigError, PreflightError
from glmtuner.inference.batch import Batch
from glmtuner.inference.replay import Recorder, can_replay
from glmtuner.models.mixing_layers import masks_padding
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PREFILL_TOKENS = 8192  # prompt tokens of one prefill, padding included: bounds memory, and how long other rows wait
# Largest difference that padding or other rows may make, relative to the largest logit: rounding makes less.
LOGITS_TOLERANCE, HALF_LOGITS_TOLERANCE = 1e-3, 0.05
CHECKED_STEPS = 2  # behind the prompt: the first of them reads what the prompt left
Row = tuple[int, list[int]]  # of `greedy`: a prompt's index, and the tokens behind it so far
FAILED = -1  # in place of the token of a row whose logits are not finite
RECORDED_STEP = 3  # which step on the same buffers is recorded: many batches end earlier


class NoCacheError(ConfigError):
    """The model returns no transformers Cache for its next step."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} returns no transformers Cache for its next step, so it cannot be served; use chat instead"
        )


class Decoder:
    """Computes logits for a batch: after the prompts (`prefill`), then after every further token (`step`).

    `replays` says whether steps are captured as CUDA graphs and replayed; None means on a GPU only.
    """

    def __init__(self, model: "PreTrainedModel", pad_id: int, replays: bool | None = None) -> None:
        # adapters are layers of the base model itself; PEFT's wrapper adds nothing to its forward pass
        self.model: Any = unwrapped(model)
        # FSDP gathers weights in the forward pass of the module that it wrapped
        self.forward: Any = model if isinstance(model, FSDPModule) else self.model
        self.accepted = inspect.signature(self.model.forward).parameters
        self.pad_id = pad_id
        if replays is None:
            replays = accelerator.supports("graphs", self.device)
        self.recorder = Recorder(self.model, self.accepted) if replays and can_replay(model, self.model) else None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.model.device
        return device

    def padding_invariant(self, short: Sequence[int], long: Sequence[int]) -> bool:
        """Whether padding leaves the logits of the shorter prompt as they are, and those of the next tokens.

        transformers' Bloom gives NaN for padding; layers that keep a state may take it for text. Raises NoCacheError, a
        ConfigError, for a model that returns no cache.
        """
        return self.batch_invariant(short, long) and masks_padding(self.model)

    def batch_invariant(self, prompt: Sequence[int], other: Sequence[int]) -> bool:
        """Whether the logits of the prompt, and those of the next tokens, are the same beside another prompt; see above."""
        return self._same_logits(self.prefill([0], [prompt]), self.prefill([0, 1], [prompt, other]), row=0)

    def repeat_invariant(self, prompt: Sequence[int]) -> bool:
        """Whether those logits are the same where the prompt was read once for two rows; see above."""
        return self._same_logits(self.prefill([0], [prompt]), self.prefill([0, 1], [prompt], [2]), row=1)

    def _same_logits(self, one: tuple[Batch, torch.Tensor], two: tuple[Batch, torch.Tensor], row: int) -> bool:
        """Whether a prefill of one row and this row of a prefill of two have the same logits, there and in the next steps."""
        (alone, alone_BV), (beside, beside_BV) = one, two
        for step in range(CHECKED_STEPS + 1):
            if not same_logits(alone_BV[0], beside_BV[row], self.model.dtype):
                return False
            if step < CHECKED_STEPS:
                token = alone_BV.argmax(-1)
                alone.append(token)
                beside.append(token.repeat(2))
                alone_BV, beside_BV = self.step(alone), self.step(beside)
        return True

    def prefill(
        self, rows: Sequence[Any], prompts: Sequence[Sequence[int]], counts: Sequence[int] | None = None
    ) -> tuple[Batch, torch.Tensor]:
        """A batch of these rows, and the logits after their prompts, [B, V], float32.

        `counts` is how many of the rows each prompt is for, by default one: it is read once for all of them.
        """
        if counts is None or len(counts) == len(rows):
            batch = Batch(rows, prompts, self.pad_id, self.device)
            return batch, self._forward(batch, new_tokens=None)
        batch = Batch(range(len(prompts)), prompts, self.pad_id, self.device)
        logits_BV = self._forward(batch, new_tokens=None)
        indices = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(self.device)
        batch.repeat(rows, indices)
        return batch, logits_BV[indices]

    def step(self, batch: Batch) -> torch.Tensor:
        """The logits after each row's last token, [B, V], float32; valid until the next step."""
        batch.ensure_capacity()
        batch.steps += 1
        if batch.replay is not None:
            return batch.replay.step(batch)
        logits_BV = self._forward(batch, new_tokens=1)
        if self.recorder is not None and batch.joinable and batch.steps == RECORDED_STEP:
            batch.replay = self.recorder.record(batch, logits_BV)
            if batch.replay is None:
                say(f"decoding steps are not replayed as CUDA graphs: {self.recorder.failure}")
                self.recorder = None
        return logits_BV

    @torch.no_grad()
    def _forward(self, batch: Batch, new_tokens: int | None) -> torch.Tensor:
        """Feed the last `new_tokens` columns, or all of them if None, to the model; returns the last column's logits, [B, V]."""
        mask = batch.mask
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            counts = mask.sum(-1, keepdim=True) if new_tokens else mask.cumsum(-1).clamp(min=1)
            options["position_ids"] = counts - 1
        inputs = self.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=new_tokens, past_key_values=batch.cache, attention_mask=mask,
            is_first_iteration=new_tokens is None, use_cache=True, **options,
        )  # fmt: skip
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        out = self.forward(**inputs)
        cache = getattr(out, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise NoCacheError(type(self.model).__name__)
        if cache is not batch.cache:
            batch.adopt_cache(cache)
        logits_BV: torch.Tensor = out.logits[:, -1].float()
        return logits_BV


def same_logits(alone_V: torch.Tensor, beside_V: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a row's logits alone and in a batch, by a model in this dtype, differ by no more than rounding."""
    tolerance = LOGITS_TOLERANCE if dtype == torch.float32 else HALF_LOGITS_TOLERANCE
    alone_V, beside_V = alone_V.float(), beside_V.float()
    return bool((alone_V - beside_V).abs().max() <= tolerance * alone_V.abs().max())


def most_likely(logits_BV: torch.Tensor, rows: Sequence[Row | None] = ()) -> torch.Tensor:
    """The most likely token of each row, [B]; FAILED where the largest logit is NaN or infinite."""
    best_B = logits_BV.argmax(-1)  # NaN counts as the largest
    return best_B.where(logits_BV.gather(-1, best_B[:, None])[:, 0].isfinite(), FAILED)


def greedy(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_rows: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    repetition_penalty: float,
    pads: bool = True,
    group: int = 1,
    choose: Callable[[torch.Tensor, Sequence[Row | None]], torch.Tensor] = most_likely,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[Row]:
    """(index in `prompts`, its greedy continuation up to and including the first stop token), in the order they finish.

    `choose` takes the logits, [B, V], and the rows, and returns each row's next token, [B], or FAILED: by default the most likely
    one. At most `max_rows` prompts are in the batch at once, and they start in their order; without `pads` those in a batch have
    the same length, and start together. Each `group` of prompts is the same one over and over, which is read once for those that
    start together. `ends` says of a continuation so far whether it ends there, as behind a stop text. Raises PreflightError for logits that are not finite.
    """
    processor = RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty != 1 else None
    batch: Batch | None = None
    started = 0

    def advance(rows: Batch, logits_BV: torch.Tensor) -> list[Row]:
        """Append each row's next token; removes and returns the rows that this finishes."""
        if processor:
            # padding is replaced by the row's last token, so that only its own tokens are penalized
            context_BW = rows.ids.where(rows.mask.bool(), rows.ids[:, -1:])
            logits_BV = processor(context_BW, logits_BV)
        tokens_B = choose(logits_BV, rows.rows)
        finished: list[int] = []
        for row_id, (row, token) in enumerate(zip(rows.rows, tokens_B.tolist(), strict=True)):
            if row is not None:
                if token == FAILED:
                    raise PreflightError(
                        f"the model's logits are not finite for prompt {row[0] + 1} of {len(prompts)}, so there is no most "
                        f"likely token: its weights are damaged, or too large for {decoder.model.dtype}; type "
                        "model.dtype=float32, or choose another checkpoint"
                    )
                row[1].append(token)
                if token in stop_ids or len(row[1]) == max_new_tokens or (ends is not None and ends(row[1])):
                    finished.append(row_id)
        rows.append(tokens_B.clamp(min=0))  # rows that have finished may have FAILED
        continuations = [rows.rows[row_id] for row_id in finished]
        rows.remove(finished)
        return continuations

    while started < len(prompts) or batch:
        free = max_rows - batch.num_active if batch else max_rows
        # prompts are read an eighth of the rows at a time: reading one costs about as much as a step of all rows; and for a
        # group at once, unless more than half of the rows would wait for that
        wait = free < min(max(max_rows // 8, min(group, max_rows // 2), 1), len(prompts) - started)
        if batch is None or (started < len(prompts) and batch.joinable and pads and not wait):
            firsts, end = next_to_read(prompts, started, min(started + free, len(prompts)), pads, group)
            new_rows: list[Row] = [(index, []) for index in range(started, end)]
            counts = [following - first for first, following in pairwise([*firsts, end])]
            new_batch, logits_BV = decoder.prefill(new_rows, [prompts[first] for first in firsts], counts)
            started = end
            yield from advance(new_batch, logits_BV)
            if batch is None:
                batch = new_batch
            elif new_batch.rows:
                batch.join(new_batch)
        else:
            yield from advance(batch, decoder.step(batch))
        if not batch.num_active:
            batch = None


def next_to_read(
    prompts: Sequence[Sequence[int]], started: int, most: int, pads: bool, group: int
) -> tuple[list[int], int]:
    """Of the prompts that one prefill reads, the first of each group, and where the rest begins, at most at `most`.

    The last group is whole, unless it is the only one.
    """
    firsts = [index for index in range(started, most) if index == started or index % group == 0]
    count = prefill_count([prompts[index] for index in firsts], pads)
    end = firsts[count] if count < len(firsts) else most
    if (whole := end // group * group) > started:
        end = whole
    return [first for first in firsts if first < end], end


def prefill_count(prompts: Sequence[Sequence[int]], pads: bool = True) -> int:
    """How many of the first prompts, at least one, fit into one prefill of PREFILL_TOKENS; of one length unless it `pads`."""
    longest = 0
    for count, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if count and (longest * (count + 1) > PREFILL_TOKENS or not (pads or len(prompt) == len(prompts[0]))):
            return count
    return len(prompts)
