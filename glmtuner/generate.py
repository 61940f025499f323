"""Greedy or beam answers to many prompts: left-padded batches of similar length, handed out as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How evaluation and prediction decode: never by sampling, so that scores repeat."""

    max_new_tokens: int
    num_beams: int
    repetition_penalty: float
    stop_ids: tuple[int, ...]
    pad_id: int


def answers(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(place in `prompts`, token ids of the answer without its stop token), the longest prompts first.

    Each batch is padded on the left: padding on the right would be generated behind (LLaMA-Factory#10611).
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        repetition_penalty=decoding.repetition_penalty,
        do_sample=False,
        eos_token_id=list(decoding.stop_ids),
        pad_token_id=decoding.pad_id,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = max(len(prompts[place]) for place in places)
            input_ids = torch.full((len(places), width), decoding.pad_id, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            for row, place in enumerate(places):
                tokens = torch.tensor(prompts[place], dtype=torch.long)
                input_ids[row, width - len(tokens) :] = tokens
                mask[row, width - len(tokens) :] = 1
            assert bool(mask[:, -1].all()), "prompts are padded on the left"
            with torch.no_grad():
                out = model.generate(
                    input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
                )
            for place, row in zip(places, out[:, width:].tolist(), strict=True):
                yield place, until_stop(row, decoding.stop_ids)
    finally:
        model.train(was_training)


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return list(tokens[: ends[0]] if ends else tokens)
