"""The next tokens of many prompts at once, as rows of one batch that join and leave it between two tokens.

This is continuous batching (Yu et al., Orca, OSDI 2022). Each row ends in the last column (left padding), so all rows get
their next token in one column. Keys and values stand in buffers with room for more columns: a token is written into them,
where transformers' cache copies itself for every token.
Caches that are more than keys and values of every token (sliding windows, linear attention) cannot be joined row by row;
such rows start together, and a row that is done stays in the batch until all are.

A step of a large model is a thousand small kernels and more, and starting them one by one from Python takes longer than a GPU
takes to run them. So where a batch's buffers stay the same, a step is recorded as a CUDA graph and replayed
(glmtuner/inference/replay.py).

Shape letters: B rows, W columns in use, R rows and C columns of a buffer, G key-value heads, D head dimension, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import Cache

from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.inference.batch import Batch
from glmtuner.inference.replay import Recorder, can_replay
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PREFILL = 8192  # prompt tokens, padding counted, that are read in one step: it bounds memory, and how long others wait
PADDED = 0.05  # the largest difference that padding may make, as a share of the largest logit: rounding makes less
FIRST_RECORDED = 3  # step on the same buffers that is recorded: many batches end sooner


class NoCache(ConfigError):
    """The model gives no transformers Cache for its next step."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} gives no transformers Cache for its next step, so it cannot be served; chat can")


class Decoder:
    """A model that reads prompts and gives the logits behind them, and behind every further token of a batch.

    `replays` says whether steps are recorded and replayed; where nothing is said, they are on a GPU.
    """

    def __init__(self, model: "PreTrainedModel", pad_id: int, replays: bool | None = None) -> None:
        # an adapter's layers stand in the base model itself; PEFT's wrapper adds nothing to its forward pass
        self.model: Any = unwrapped(model)
        # weights shared out by torch are gathered by the module that was given to it
        self.forward: Any = model if isinstance(model, FSDPModule) else self.model
        self.accepted = inspect.signature(self.model.forward).parameters
        self.pad_id = pad_id
        wanted = self.device.type == "cuda" if replays is None else replays
        self.recorder = Recorder(self.model, self.accepted) if wanted and can_replay(model, self.model) else None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def padding_invariant(self, short: Sequence[int], long: Sequence[int]) -> bool:
        """Whether the model answers the shorter prompt alike beside the longer one (transformers' Bloom gives NaN).

        Raises ConfigError for a model that keeps no cache between steps.
        """
        alone, beside = self.prefill([0], [short])[1][0], self.prefill([0, 1], [short, long])[1][0]
        return bool((alone - beside).abs().max() <= PADDED * alone.abs().max())

    def prefill(self, rows: Sequence[Any], prompts: Sequence[Sequence[int]]) -> tuple[Batch, torch.Tensor]:
        """A batch of these rows, and the logits behind their prompts, [B, V]."""
        batch = Batch(rows, prompts, self.pad_id, self.device)
        return batch, self._forward(batch, new=None)

    def step(self, batch: Batch) -> torch.Tensor:
        """The logits behind each row's last token, [B, V]."""
        batch.make_room()
        batch.steps += 1
        if batch.replay is not None:
            return batch.replay.step(batch)
        logits_BV = self._forward(batch, new=1)
        if self.recorder is not None and batch.joinable and batch.steps == FIRST_RECORDED:
            batch.replay = self.recorder.recorded(batch, logits_BV)
            if batch.replay is None:
                say(f"steps of generation are not replayed as CUDA graphs: {self.recorder.refused}")
                self.recorder = None
        return logits_BV

    @torch.no_grad()
    def _forward(self, batch: Batch, new: int | None) -> torch.Tensor:
        """The last `new` tokens are read, all of them when None."""
        mask = batch.mask
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            counted = mask.sum(-1, keepdim=True) if new else mask.cumsum(-1).clamp(min=1)
            options["position_ids"] = counted - 1
        inputs = self.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=new, past_key_values=batch.cache, attention_mask=mask,
            is_first_iteration=new is None, use_cache=True, **options,
        )  # fmt: skip
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        out = self.forward(**inputs)
        cache = getattr(out, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise NoCache(type(self.model).__name__)
        if cache is not batch.cache:
            batch.keep(cache)
        return out.logits[:, -1].float()


def greedy(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    room: int,
    stops: Sequence[int],
    repetition_penalty: float,
) -> Iterator[tuple[int, list[int]]]:
    """(place in `prompts`, the likeliest tokens behind it up to and with the first of `stops`), as they are done.

    At most `rows` prompts are answered at once and `room` tokens generated for each; they start in their order.
    """
    processor = RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty != 1 else None
    batch: Batch | None = None
    begun = 0

    def chosen(group: Batch, logits_BV: torch.Tensor) -> list[tuple[int, list[int]]]:
        if processor:
            # a row's padding counts as its last token, so that nothing but its own tokens is penalized
            logits_BV = processor(group.ids.where(group.mask.bool(), group.ids[:, -1:]), logits_BV)
        tokens_B = logits_BV.argmax(-1)
        done: list[int] = []
        for place, (row, token) in enumerate(zip(group.rows, tokens_B.tolist(), strict=True)):
            if row is not None:
                row[1].append(token)
                if token in stops or len(row[1]) == room:
                    done.append(place)
        group.widen(tokens_B)
        ended = [group.rows[place] for place in done]
        group.leave(done)
        return ended

    while begun < len(prompts) or batch:
        free = rows - batch.live if batch else rows
        # prompts are read an eighth of the rows at a time: one by one, each would cost what a step of all rows does
        waits = free < min(max(rows // 8, 1), len(prompts) - begun)
        if begun < len(prompts) and (batch is None or (batch.joinable and not waits)):
            count = prefill_count(prompts[begun : begun + free])
            group = [(place, []) for place in range(begun, begun + count)]
            begun += count
            read, logits_BV = decoder.prefill(group, prompts[group[0][0] : begun])
            yield from chosen(read, logits_BV)
            if batch is None:
                batch = read
            elif read.rows:
                batch.join(read)
        else:
            yield from chosen(batch, decoder.step(batch))
        if not batch.live:
            batch = None


def prefill_count(prompts: Sequence[Sequence[int]]) -> int:
    """How many of these prompts, at least one, are read together."""
    longest = 0
    for count, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if count and longest * (count + 1) > PREFILL:
            return count
    return len(prompts)
