"""Answers to many prompts in batches, and the text of an answer while its tokens are generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

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
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes: int = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * tokens
    if model.device.type == "cuda":
        # memory that torch has reserved and does not use is free, too
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free_bytes, default = torch.cuda.mem_get_info(model.device)[0] + unused, MAX_ROWS_GPU
    else:
        import psutil

        free_bytes, default = psutil.virtual_memory().available, MAX_ROWS_CPU
    return min(max(free_bytes // 2 // row_bytes, 1), default if max_rows is None else max_rows)


def answers(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(index in `prompts`, token ids of its answer without the stop token), in the order in which answers finish.

    Greedy answers use continuous batching and start in the order of their prompts. Beam search, and models that return no
    transformers Cache, go through `generate`, the longest prompts first.
    """
    from torch.distributed.fsdp import FSDPModule

    from glmtuner.inference.decoding import NoCacheError

    was_training = model.training
    model.eval()
    try:
        sequences: Iterator[tuple[int, list[int]]]
        try:
            if decoding.num_beams > 1:
                sequences = _generated(model, prompts, decoding, batch_size)
            else:
                sequences = _continuously_batched(model, prompts, decoding, batch_size)
        except NoCacheError:
            sequences = _generated(model, prompts, decoding, batch_size)
        for index, tokens in sequences:
            yield index, until_stop(tokens, decoding.stop_ids)
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()  # without a backward pass FSDP leaves the root module's weights gathered


def _continuously_batched(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers by continuous batching; one at a time where padding changes the model's logits.

    Raises NoCacheError before the first answer.
    """
    from glmtuner.inference.decoding import Decoder, greedy

    decoder = Decoder(model, decoding.pad_id)
    if prompts:
        short, long = min(prompts, key=len), max(prompts, key=len)
        if not decoder.padding_invariant(short, long):
            batch_size = 1
    return greedy(
        decoder,
        prompts,
        max_rows=batch_size,
        max_new_tokens=decoding.max_new_tokens,
        stop_ids=decoding.stop_ids,
        repetition_penalty=decoding.repetition_penalty,
    )


def _generated(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Answers by `generate`, batch by batch; left-padded, since tokens would follow right padding (LLaMA-Factory#10611)."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = continuations(
            model,
            [prompts[index] for index in indices],
            max_new_tokens=decoding.max_new_tokens,
            stop_ids=decoding.stop_ids,
            pad_id=decoding.pad_id,
            num_beams=decoding.num_beams,
            repetition_penalty=decoding.repetition_penalty,
            do_sample=False,
        )
        yield from zip(indices, batch, strict=True)


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

    `decoding` holds fields of transformers' GenerationConfig. Samples are drawn from the whole vocabulary, with torch's
    global random state.
    """
    import torch
    from transformers import GenerationConfig

    if decoding["do_sample"]:
        decoding |= {"top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad_id, use_cache=True, **decoding
    )
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
            sequences = generator_of(model).generate(
                input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
    finally:
        model.train(was_training)
    rows: list[list[int]] = []
    for tokens in sequences[:, width:].tolist():
        rows.append(tokens[: len(until_stop(tokens, stop_ids)) + 1])
    return rows


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
