"""Log-likelihoods of continuations, without padding and without the logits of their contexts.

The options of a question follow the same text, and so do all questions of a few-shot task behind their examples: rows with a
common beginning are segments of one row, and compute it once (kernels/common_beginnings.py). Logits are computed of the tokens that
predict a continuation only.

Shape letters: R rows, T tokens of the longest row, K tokens whose logits are computed, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from glmtuner.console import say
from glmtuner.data.collate import Collator
from glmtuner.kernels.choose import choose_optimizations, short_samples
from glmtuner.kernels.common_beginnings import SHORTEST, SharedRows, keep_beginnings, shares_beginnings
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.kernels.segment_attention import position_function, takes_segments
from glmtuner.models.unwrap import unwrapped
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_CPU, TOKENS_GPU = 2048, 16384  # that a forward pass computes, padding included where there is some
REACH = 8  # times as many tokens may be attended to: keys of common beginnings are copied for each row
LOGITS_BYTES_CPU, LOGITS_BYTES_GPU = 2**26, 2**29  # of a forward pass, in float32


class Continuation(NamedTuple):
    """Token ids, and those that are scored behind them. Neither is empty."""

    context: Sequence[int]
    target: Sequence[int]


class Likelihood(NamedTuple):
    """The sum of the log-probabilities of a continuation's tokens, in nats, and whether each of them is the most likely one."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Row:
    """What a model reads for continuations that differ in their last token only, or are the ends of one row."""

    ids: tuple[int, ...]
    requests: tuple[tuple[int, tuple[int, ...]], ...]  # (index of the continuation, its tokens)

    @property
    def kept(self) -> int:
        """Of how many of its last tokens the logits are needed."""
        return max(len(target) for _, target in self.requests)


def rows_of(continuations: Sequence[Continuation], longest: int) -> list[Row]:
    """Each distinct row once, those with a common beginning beside each other; rows are cut on the left to `longest` tokens."""
    requests: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, (context, target) in enumerate(continuations):
        ids = (*context, *target)[-(longest + 1) : -1]
        requests.setdefault(ids, []).append((index, tuple(target)))
    return [Row(ids, tuple(requests[ids])) for ids in sorted(requests)]


class Scorer:
    """Scores continuations by a model in evaluation mode, in the precision of its weights."""

    def __init__(self, model: "PreTrainedModel", pad_id: int, longest: int) -> None:
        self.model, self.pad_id, self.longest = model, pad_id, longest
        self.base = unwrapped(model)
        self.accepts_places = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        on_gpu = self.base.device.type != "cpu"
        vocabulary = self.base.config.get_text_config().vocab_size
        self.tokens = TOKENS_GPU if on_gpu else TOKENS_CPU
        self.most_kept = max((LOGITS_BYTES_GPU if on_gpu else LOGITS_BYTES_CPU) // (4 * vocabulary), 64)
        self.shortest: int | None = None  # common beginning that is computed once; None: batches are padded

    def choose(self, continuations: Sequence[Continuation]) -> None:
        """Use rows without padding, and common beginnings, if some of the continuations then have the loss that they have alone."""
        samples = [
            {"input_ids": [*context, *target], "labels": [IGNORE_INDEX] * len(context) + [*target]}
            for context, target in continuations
            if len(context) + len(target) <= self.longest
        ]
        if not samples:
            return
        excluded = {path: "" for path in (FastPath.chunked_loss, FastPath.fused_lora)}
        chosen = choose_optimizations(
            self.model, short_samples(samples), Collator(pad_id=self.pad_id), excluded=excluded, by_token=True
        )
        for path in (FastPath.without_padding, FastPath.common_beginnings):
            if path not in chosen.enabled:
                say(f"benchmarks without this optimization: {path.value}: {chosen.left_out[path]}")
        if takes_segments(self.base):
            self.shortest = SHORTEST if shares_beginnings(self.base) else self.longest + 1
        keep_beginnings(self.base)  # what trains next decides for itself

    def scores(self, continuations: Sequence[Continuation]) -> Iterator[tuple[int, Likelihood]]:
        """(index, its likelihood) of each continuation, in the order in which they are computed."""
        rows = rows_of(continuations, self.longest)
        if self.shortest is None:
            rows.sort(key=lambda row: -len(row.ids))
        for batch in self._batches(rows):
            yield from self._scored(batch)

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        batch: list[Row] = []
        own = reach = kept = 0
        for row in rows:
            length = len(row.ids)
            if self.shortest is None:
                new = length if not batch else len(batch[0].ids)
            else:
                common = _common(batch[0].ids, row.ids) if batch else 0
                new = length - common + 1 if common > self.shortest else length
            if batch and (
                own + new > self.tokens or reach + length > REACH * self.tokens or kept + row.kept > self.most_kept
            ):
                yield batch
                batch, own, reach, kept, new = [], 0, 0, 0, length
            batch.append(row)
            own, reach, kept = own + new, reach + length, kept + row.kept
        if batch:
            yield batch

    def _scored(self, batch: Sequence[Row]) -> Iterator[tuple[int, Likelihood]]:
        """The likelihoods of a batch's continuations."""
        inputs, places = self._segments(batch) if self.shortest is not None else self._padded(batch)
        needed = sorted({place for row in places for place in row})
        logits_KV = self._logits(inputs, needed).float()
        normalizer_K = logits_KV.logsumexp(-1)
        best_K = logits_KV.argmax(-1)
        index_of = {place: index for index, place in enumerate(needed)}
        flat: list[int] = []
        targets: list[int] = []
        ends = [0]
        for row, row_places in zip(batch, places, strict=True):
            for _, target in row.requests:
                flat += [index_of[place] for place in row_places[len(row_places) - len(target) :]]
                targets += target
                ends.append(len(targets))
        at, target_N = (torch.tensor(each, device=logits_KV.device) for each in (flat, targets))
        logprobs = (logits_KV[at, target_N] - normalizer_K[at]).double().tolist()
        greedy = (best_K[at] == target_N).tolist()
        numbers = [index for row in batch for index, _ in row.requests]
        for index, start, end in zip(numbers, ends, ends[1:], strict=False):
            yield index, Likelihood(sum(logprobs[start:end]), all(greedy[start:end]))

    def _segments(self, batch: Sequence[Row]) -> tuple[dict[str, Any], list[list[int]]]:
        """The arguments of a forward pass of the rows as segments of one, and where in it the kept tokens of each row are."""
        rows = [torch.tensor(row.ids) for row in batch]
        shared = SharedRows.of(rows, position_function(self.base), shortest=self.shortest)
        places_RT = shared.places(max(map(len, rows)))
        places = [places_RT[index, len(row.ids) - row.kept : len(row.ids)].tolist() for index, row in enumerate(batch)]
        return shared.inputs(self.base.device), places

    def _padded(self, batch: Sequence[Row]) -> tuple[dict[str, Any], list[list[int]]]:
        """The same for rows that are padded on the right."""
        width = max(len(row.ids) for row in batch)
        ids = [[*row.ids, *[self.pad_id] * (width - len(row.ids))] for row in batch]
        mask = [[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch]
        places = [
            [index * width + place for place in range(len(row.ids) - row.kept, len(row.ids))]
            for index, row in enumerate(batch)
        ]
        device = self.base.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }, places

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Any], needed: list[int]) -> torch.Tensor:
        """The logits after the tokens at these places of the flattened batch, [K, V]."""
        at = torch.tensor(needed, device=self.base.device)
        if not self.accepts_places:
            return self.model(**inputs, use_cache=False).logits.flatten(0, 1)[at]
        if self.shortest is not None:
            kept: torch.Tensor = self.model(**inputs, use_cache=False, logits_to_keep=at).logits[0]
            return kept
        width = inputs["input_ids"].shape[1]
        first = min(place % width for place in needed)
        logits_RTV = self.model(**inputs, use_cache=False, logits_to_keep=width - first).logits
        return logits_RTV[at // width, at % width - first]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
