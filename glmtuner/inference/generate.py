"""Answers to many prompts in batches, and the text of an answer while its tokens are generated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, cast

from glmtuner.distributed import accelerator
from glmtuner.inference.detokenize import decode_answer
from glmtuner.templates.tool_calls import Syntax

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How evaluation and prediction decode: never by sampling, so that scores are reproducible."""

    max_new_tokens: int
    num_beams: int
    repetition_penalty: float
    stop_ids: tuple[int, ...]
    pad_id: int


# Default limits of rows per batch: with more rows the first answers come later. A CPU core answered a tenth
# faster with 64 than with 32, and no faster with 96;
# a GPU answered 3.5 times as fast with 128 as with 32 (docs/performance.md).
MAX_ROWS_CPU, MAX_ROWS_GPU = 64, 128


def rows_that_fit(model: "PreTrainedModel", tokens: int, max_rows: int | None = None) -> int:
    """How many rows of `tokens` tokens have room for their keys and values in half of the free memory.

    At least 1 and at most `max_rows`, by default MAX_ROWS_GPU on a GPU and MAX_ROWS_CPU elsewhere.
    """
    config = model.config.get_text_config()
    # layers that keep a state need less; RWKV and Mamba have no heads
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    row_bytes: int = 2 * config.num_hidden_layers * groups * head_dim * model.dtype.itemsize * tokens
    default = MAX_ROWS_GPU if accelerator.has_memory(model.device) else MAX_ROWS_CPU
    most = max(accelerator.free_memory(model.device) // 2 // row_bytes, 1)
    return min(most, default if max_rows is None else max_rows)


def answers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index in `prompts`, token ids of its answer without the stop token), in the order in which answers finish.

    `ends` says of an answer's tokens so far whether it ends there; `generate` does not ask it, and goes on to a stop token.

    Greedy answers use continuous batching and start in the order of their prompts. Beam search, and models that return no
    transformers Cache, go through `generate`, the longest prompts first. Where ranks hold shards of the model, each answers its own
    prompts, and all must iterate to the end.
    """
    from glmtuner.inference.decoding import NoCacheError
    from glmtuner.inference.in_step import in_step

    was_training = model.training
    model.eval()
    try:
        sequences: Iterator[tuple[int, list[int]]]
        with in_step(model, prompts, decoding.pad_id):
            try:
                if decoding.num_beams > 1:
                    sequences = _generated(model, prompts, decoding, batch_size)
                else:
                    sequences = _continuously_batched(model, prompts, decoding, batch_size, ends)
            except NoCacheError:
                sequences = _generated(model, prompts, decoding, batch_size)
            for index, tokens in sequences:
                yield index, until_stop(tokens, decoding.stop_ids)
    finally:
        model.train(was_training)


def _continuously_batched(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers by continuous batching; without padding where it changes the model's logits.

    Raises NoCacheError before the first answer.
    """
    from glmtuner.inference.decoding import Decoder, greedy

    decoder = Decoder(model, decoding.pad_id)
    order: Sequence[int] = range(len(prompts))
    pads = True
    if prompts and batch_size == 1:
        decoder.prefill([0], [min(prompts, key=len)])  # is there a cache?
    elif prompts:
        short, long = min(prompts, key=len), max(prompts, key=len)
        pads = decoder.padding_invariant(short, long)
        if not pads:
            if not decoder.batch_invariant(short, long[: len(short)]):
                batch_size = 1
            _say_unpadded(model, batch_size)
            order = by_length(prompts)
    answered = greedy(
        decoder,
        [prompts[index] for index in order],
        max_rows=batch_size,
        max_new_tokens=decoding.max_new_tokens,
        stop_ids=decoding.stop_ids,
        repetition_penalty=decoding.repetition_penalty,
        pads=pads,
        ends=ends,
    )
    return ((order[place], tokens) for place, tokens in answered)


def by_length(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The indices of the prompts, the longest first."""
    return sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))


def _say_unpadded(model: "PreTrainedModel", batch_size: int) -> None:
    from glmtuner.console import say
    from glmtuner.models.unwrap import unwrapped

    together = "only prompts of the same number of tokens are answered together"
    name = type(unwrapped(model)).__name__
    say(
        f"padding changes the answers of {name}: {together}"
        if batch_size > 1
        else f"other rows of a batch change the answers of {name}: prompts are answered one by one"
    )


def _generated(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Answers by `generate`, batch by batch; left-padded, since tokens would follow right padding (LLaMA-Factory#10611).

    Where padding changes the answers, the prompts of a batch have the same length.
    """
    order, start, pads = by_length(prompts), 0, True
    if batch_size > 1 and prompts:
        short, long = prompts[order[-1]], prompts[order[0]]
        pads = _generates_same(model, short, long, decoding.pad_id)
        if not pads:
            if not _generates_same(model, short, long[: len(short)], decoding.pad_id):
                batch_size = 1
            _say_unpadded(model, batch_size)
    while start < len(order):
        indices = order[start : start + batch_size]
        if not pads:
            indices = [index for index in indices if len(prompts[index]) == len(prompts[indices[0]])]
        start += len(indices)
        batch = _continued(
            model,
            [prompts[index] for index in indices],
            decoding.pad_id,
            decoding.stop_ids,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            repetition_penalty=decoding.repetition_penalty,
            do_sample=False,
        )
        yield from zip(indices, batch, strict=True)


def _generates_same(model: "PreTrainedModel", prompt: Sequence[int], other: Sequence[int], pad_id: int) -> bool:
    """Whether `generate` gives the prompt the same logits beside another, behind the prompt and one token further."""
    from glmtuner.inference.decoding import same_logits
    from glmtuner.models.mixing_layers import masks_padding
    from glmtuner.models.unwrap import unwrapped

    base = unwrapped(model)
    if len(prompt) != len(other) and not masks_padding(base):
        return False
    alone, beside = (
        _sequences(model, prompts, pad_id, max_new_tokens=2, do_sample=False, eos_token_id=-1, output_logits=True,
                   return_dict_in_generate=True).logits
        for prompts in ([prompt], [prompt, other])
    )  # fmt: skip
    return all(same_logits(one[0], two[0], base.dtype) for one, two in zip(alone, beside, strict=True))


def continuations(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    **decoding: Any,
) -> list[list[int]]:
    """The token ids that the model generates after each prompt of one batch, up to and including the first stop token.

    Layers that keep a state may change with the batch: then the prompts go in batches of one length, or one by one. `decoding`
    holds fields of transformers' GenerationConfig. Samples are drawn from the whole vocabulary, with torch's global random state.
    """
    from glmtuner.models.mixing_layers import is_recurrent
    from glmtuner.models.unwrap import unwrapped

    if decoding["do_sample"]:
        decoding |= {"top_k": 0, "top_p": 1.0}
    order = by_length(prompts)
    batches = [list(range(len(prompts)))]
    if len(order) > 1 and is_recurrent(unwrapped(model)):
        short, long = prompts[order[-1]], prompts[order[0]]
        if not _generates_same(model, short, long, pad_id):
            groups = groupby(order, key=lambda index: len(prompts[index]))
            batches = [list(indices) for _, indices in groups]
            if not _generates_same(model, short, long[: len(short)], pad_id):
                batches = [[index] for index in order]
    rows: dict[int, list[int]] = {}
    for indices in batches:
        batch = [prompts[index] for index in indices]
        found = _continued(model, batch, pad_id, stop_ids, max_new_tokens=max_new_tokens, **decoding)
        rows.update(zip(indices, found, strict=True))
    return [rows[index] for index in range(len(prompts))]


def _continued(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], pad_id: int, stop_ids: Sequence[int], **decoding: Any
) -> list[list[int]]:
    """What `generate` adds to each prompt of a batch, up to and including the first stop token."""
    sequences = _sequences(model, prompts, pad_id, eos_token_id=list(stop_ids), **decoding)
    width = max(len(prompt) for prompt in prompts)
    return [tokens[: len(until_stop(tokens, stop_ids)) + 1] for tokens in sequences[:, width:].tolist()]


def _sequences(model: "PreTrainedModel", prompts: Sequence[Sequence[int]], pad_id: int, **decoding: Any) -> Any:
    """What transformers' `generate` returns for prompts of one batch, padded on the left, with these values of its config."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import GenerationConfig

    from glmtuner.models.unwrap import unwrapped

    base = unwrapped(model)
    # RecurrentGemma's layers keep the states themselves, and those of the last text still are in them
    empty_states: Any = getattr(base.base_model, "_setup_cache", None)
    # beams reorder neither these nor a list of states (RWKV's)
    reorders = empty_states is None and (
        "state" not in signature(type(base).forward).parameters or hasattr(base, "_reorder_cache")
    )
    config = GenerationConfig(pad_token_id=pad_id, use_cache=decoding.get("num_beams", 1) == 1 or reorders, **decoding)
    if empty_states is not None:
        empty_states(base.config, len(prompts), base.device, base.dtype)
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    assert bool(mask[:, -1].all()), "prompts are padded on the left"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return generator_of(model).generate(
                input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
                # transformers would keep ranks with shards in step itself, within a call; `in_step` does so over all calls
                **({"synced_gpus": False} if isinstance(model, FSDPModule) else {}),
            )  # fmt: skip
    finally:
        model.train(was_training)


class GeneratingModel(Protocol):
    """A model with transformers' `generate`."""

    def generate(self, **options: Any) -> "torch.Tensor":
        """Prompts and their continuations, [B, W], padded on the right."""


def generator_of(model: "PreTrainedModel") -> GeneratingModel:
    """The model, typed as one that generates, which transformers' base class is not: its causal LMs are."""
    return cast(GeneratingModel, model)


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:end])


class StopText:
    """Finds the first occurrence of a text in a stream of characters, in constant time for each (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how many of the last characters are the beginning of the text
        # of each prefix: the length of its longest proper suffix that is a prefix, too
        self.fallbacks = [0] * len(text)
        for index in range(1, len(text)):
            self.fallbacks[index] = self._extended(self.fallbacks[index - 1], text[index])

    def feed(self, characters: str) -> int | None:
        """How many of these characters the first occurrence takes to its end; None if it has not ended."""
        for index, character in enumerate(characters):
            self.matched = self._extended(self.matched, character)
            if self.matched == len(self.text):
                return index + 1
        return None

    def _extended(self, length: int, character: str) -> int:
        """The length of the longest prefix that ends with `character`, after a prefix of `length` characters."""
        while length and self.text[length] != character:
            length = self.fallbacks[length - 1]
        return length + (self.text[length] == character)


class TokenText:
    """Incremental detokenization: what tokens add to the text, in pieces that are never taken back.

    An incomplete character is held back until the next tokens decide. Of control tokens the text has `<think>` and the like,
    and those of the tool calls' `syntax`.
    """

    MAX_CHARACTER_TOKENS = (
        8  # tokens that one character may take; later, bytes that are not valid text are shown as such
    )

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", syntax: Syntax | None = None) -> None:
        self.tokenizer, self.syntax = tokenizer, syntax
        self.tokens: list[int] = []
        # A tokenizer may join a token to the ones before it, so new text is the difference of two decoded windows:
        # tokens[prefix_start:] against tokens[prefix_start:read_end], whose text is `prefix_text`.
        self.prefix_start, self.read_end, self.prefix_text = 0, 0, ""

    def put(self, token: int) -> str:
        """Add a token; returns the text that it completes."""
        self.tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """The remaining text."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self.prefix_start)
        unread = len(self.tokens) - self.read_end
        if not final and text.endswith("\ufffd") and unread < self.MAX_CHARACTER_TOKENS:
            return ""
        new = text[len(self.prefix_text) :]
        self.prefix_start, self.read_end = self.read_end, len(self.tokens)
        self.prefix_text = self._decode(self.prefix_start)
        return new

    def _decode(self, start: int) -> str:
        return decode_answer(self.tokenizer, self.tokens[start:], self.syntax)


class TrimmedText:
    """Text that comes in pieces, without the white space at both ends, up to the first of the stop texts `stops`.

    Held back: white space that may be its end, and what may be the beginning of a stop text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = [StopText(stop) for stop in stops]
        self.pending = ""  # text that is not shown yet
        self.started = False
        self.stopped = False

    def add(self, new: str, final: bool = False) -> str:
        """What can be shown now. `stopped` becomes True when a stop text is reached; with `final` nothing is held back."""
        if self.stopped:
            return ""
        if not self.started:
            new = new.lstrip()
            self.started = bool(new)
        known = len(self.pending)
        self.pending += new
        ends = [(stop, stop.feed(new)) for stop in self.stops]
        stop_starts = [known + end - len(stop.text) for stop, end in ends if end is not None]
        if stop_starts:
            self.stopped = True
            shown = self.pending[: min(stop_starts)]
        else:
            possible_stop = 0 if final else max((stop.matched for stop in self.stops), default=0)
            shown = self.pending[: len(self.pending) - possible_stop]
        shown = shown.rstrip()
        self.pending = self.pending[len(shown) :]
        return shown


class AnswerText:
    """The text of an answer in pieces that are never taken back, stripped and up to the first of the stop texts `stops`."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str] = (), syntax: Syntax | None = None
    ) -> None:
        self.text, self.trimmed = TokenText(tokenizer, syntax), TrimmedText(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text is reached."""
        return self.trimmed.stopped

    def put(self, token: int) -> str:
        """Add a token; returns the text that can be shown now."""
        return self.trimmed.add(self.text.put(token))

    def finish(self) -> str:
        """The remaining text; nothing is held back any more."""
        return self.trimmed.add(self.text.finish(), final=True)
