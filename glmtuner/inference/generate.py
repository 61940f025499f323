"""Answers to many prompts, several at once; and the text of an answer as its tokens come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How evaluation and prediction decode: never by sampling, so that scores repeat."""

    max_new_tokens: int
    num_beams: int
    repetition_penalty: float
    stop_ids: tuple[int, ...]
    pad_id: int


# Rows generated at once where nothing is said: with more the first answers come later. Two CPU cores gain little from more
# than 32; a GPU answered 3.5 times as fast with 128 as with 32 (docs/performance.md).
MOST_ROWS, MOST_ROWS_GPU = 32, 128


def rows_that_fit(model: "PreTrainedModel", tokens: int, most: int | None = None) -> int:
    """How many rows of so many tokens have room for their keys and values in half of the free memory.

    At least 1, and at most `most`: MOST_ROWS, or MOST_ROWS_GPU on a GPU, where nothing is given.
    """
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_row = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * tokens
    if model.device.type == "cuda":
        # what torch holds and does not use is free, too
        idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free, usual = torch.cuda.mem_get_info(model.device)[0] + idle, MOST_ROWS_GPU
    else:
        import psutil

        free, usual = psutil.virtual_memory().available, MOST_ROWS
    return min(max(free // 2 // a_row, 1), usual if most is None else most)


def answers(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(place in `prompts`, token ids of the answer without its stop token), as the answers are done.

    Greedy answers begin in the order of their prompts, each as soon as one before it is done. Beams, and models that keep
    no transformers Cache, go through `generate`, the longest prompts first.
    """
    from torch.distributed.fsdp import FSDPModule

    from glmtuner.inference.decoding import NoCache

    was_training = model.training
    model.eval()
    try:
        try:
            found = _decoded(model, prompts, decoding, batch_size) if decoding.num_beams == 1 else None
        except NoCache:
            found = None
        for place, tokens in found or _generated(model, prompts, decoding, batch_size):
            yield place, until_stop(tokens, decoding.stop_ids)
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward pass without a backward one leaves the outermost weights whole


def _decoded(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers by continuous batching; one at a time where padding changes what a model answers."""
    from glmtuner.inference.decoding import Decoder, greedy

    decoder = Decoder(model, decoding.pad_id)
    if prompts:
        short, long = min(prompts, key=len), max(prompts, key=len)
        if not decoder.padding_invariant(short, long):
            batch_size = 1
    return greedy(
        decoder,
        prompts,
        rows=batch_size,
        room=decoding.max_new_tokens,
        stops=decoding.stop_ids,
        repetition_penalty=decoding.repetition_penalty,
    )


def _generated(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """By `generate`, batch by batch; padding on the right would be generated behind (LLaMA-Factory#10611)."""
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = continuations(
            model,
            [prompts[place] for place in places],
            max_new_tokens=decoding.max_new_tokens,
            stop_ids=decoding.stop_ids,
            pad_id=decoding.pad_id,
            num_beams=decoding.num_beams,
            repetition_penalty=decoding.repetition_penalty,
            do_sample=False,
        )
        yield from zip(places, found, strict=True)


def continuations(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    **decoding: Any,
) -> list[list[int]]:
    """What the model writes behind each prompt of one batch, up to and with the first stop token.

    `decoding` are transformers' own values. A sample is drawn from all tokens, with torch's random numbers.
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
            out = model.generate(
                input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
    finally:
        model.train(was_training)
    rows = []
    for tokens in out[:, width:].tolist():
        answer = until_stop(tokens, stop_ids)
        rows.append(tokens[: len(answer) + 1])
    return rows


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return list(tokens[: ends[0]] if ends else tokens)


class AnswerText:
    """The text of an answer whose tokens come one at a time, in pieces that are never taken back.

    All pieces together are what `decode` gives for all tokens, without white space at either end. Held back until more
    is known: half a character, white space that may be the answer's end, and what may be the beginning of one of
    `stops`; the answer ends before the first of those.
    """

    LONGEST = 8  # tokens that one character may be spread over; behind them, bytes that are no text are shown as such

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        # A tokenizer may join a token to the ones before it, so the new text is the difference of two decoded windows.
        self.window, self.read, self.known = 0, 0, ""
        self.held = ""
        self.begun = False
        self.stopped = False

    def put(self, token: int) -> str:
        """The text that can be shown now; `stopped` tells whether a stop text was reached."""
        self.tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest, nothing being held back any more."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text = self._decoded(self.window)
        if not final and text.endswith("\ufffd") and len(self.tokens) - self.read < self.LONGEST:
            return ""
        self.held += text[len(self.known) :]
        self.window, self.read = self.read, len(self.tokens)
        self.known = self._decoded(self.window)
        if self.stopped:
            return ""
        if not self.begun:
            self.held = self.held.lstrip()
            self.begun = bool(self.held)
        ends = [place for place in map(self.held.find, self.stops) if place >= 0]
        if ends:
            self.stopped = True
            shown = self.held[: min(ends)].rstrip()
        else:
            shown = self.held if final else self.held[: len(self.held) - self._may_begin_a_stop()]
            shown = shown.rstrip()
        self.held = self.held[len(shown) :]
        return shown

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters held are the beginning of a stop text."""
        lengths = range(1, max(map(len, self.stops), default=0))
        fits = [
            n for n in lengths if any(stop.startswith(self.held[-n:]) for stop in self.stops) and n <= len(self.held)
        ]
        return max(fits, default=0)

    def _decoded(self, start: int) -> str:
        return self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True)
