"""Sampled answers: drawn from whole distributions, whatever else is in the batch, and with a prompt read once for its group."""

from functools import wraps
from random import Random
from typing import Any

import pytest
import torch
from small_models import MODELS, STOP, built, prompt

from glmtuner.inference.decoding import FAILED, Decoder, next_to_read
from glmtuner.inference.sampling import Draws, Sampler

PAD = 3
STOPS = (STOP, *range(10, 400, 16))  # so many that answers differ in length
GROUP = 3


def states(count: int) -> list[Random]:
    return [Random(f"state {number}") for number in range(count)]


def by_hand(model: Any, words: list[int], state: Random, room: int = 8) -> list[int]:
    """An answer drawn token by token by the inverse of the cumulative distribution, without cache, padding and batch."""
    answer: list[int] = []
    while len(answer) < room and not (answer and answer[-1] in STOPS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*words, *answer]])).logits[0, -1]
        share, total = state.random(), 0.0
        for token, probability in enumerate(torch.softmax(logits.double() / 0.8, -1).tolist()):
            total += probability
            if total > share:
                answer.append(token)
                break
    return answer


def sampler(model: Any, rows: int) -> Sampler:
    return Sampler(model, max_new_tokens=8, stop_ids=STOPS, pad_id=PAD, temperature=0.8, max_rows=rows)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_prompt_alone_and_a_groups_prompt_is_read_once(name: str) -> None:
    model = built(name)
    prompts = [prompt(name, number) for number in range(4) for _ in range(GROUP)]
    wanted = [by_hand(model, words, state) for words, state in zip(prompts, states(12), strict=True)]
    assert len({tuple(answer) for answer in wanted}) > 9 and len({len(answer) for answer in wanted}) > 2
    read: list[tuple[int, int]] = []
    forward = model.forward

    @wraps(forward)  # the decoder reads from its signature what it takes
    def spied(**given: Any) -> Any:
        read.append(tuple(given["input_ids"].shape))
        return forward(**given)

    for rows in (2, 20):
        made = sampler(model, rows)
        assert (
            made.answers(prompts[:GROUP], states(GROUP), group=GROUP) == wanted[:GROUP]
        )  # tries padding and repetition
        assert made.repeats
        model.forward = spied
        assert made.answers(prompts, states(12), group=GROUP) == wanted, rows
        model.forward = forward
        if rows == 20:
            assert sum(count for count, width in read if width > 1) == 4
        read.clear()


def test_a_prompt_is_read_for_each_answer_where_repeating_it_would_change_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built("Llama")
    prompts = [prompt("Llama", number) for number in range(2) for _ in range(GROUP)]
    monkeypatch.setattr(Decoder, "repeat_invariant", lambda self, words: False)
    found = sampler(model, 8).answers(prompts, states(6), group=GROUP)
    assert found == [by_hand(model, words, state) for words, state in zip(prompts, states(6), strict=True)]
    assert "the answers of LlamaForCausalLM change where a prompt is read once for several" in capsys.readouterr().out


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, -torch.inf, 0.5, -1.0, 0.0, -torch.inf])
    count, temperature = 6_000, 0.7
    made = Draws([Random(number) for number in range(count)], temperature)
    tokens = made(logits.expand(count, -1), [(number, []) for number in range(count)])
    shares = torch.bincount(tokens, minlength=6) / count
    wanted = torch.softmax(logits / temperature, -1)
    assert (shares[wanted == 0] == 0).all()
    assert (shares - wanted).abs().max() < 0.025  # four standard deviations
    again = Draws([Random(number) for number in range(count)], temperature)
    places = torch.randperm(count)
    assert torch.equal(again(logits.expand(count, -1), [(int(place), []) for place in places]), tokens[places])


def test_a_word_at_the_end_of_a_large_vocabulary_is_drawn_as_often_as_one_at_its_beginning() -> None:
    """Sums of float32 over 150,000 words would be off by more than one of these words has."""
    logits = torch.zeros(1, 150_000)
    for share, token in ((0.0, 0), (0.5, 75_000), (1 - 1e-6, 149_999), (0.999985, 149_997)):
        state = Random(0)
        state.random = lambda share=share: share  # type: ignore[method-assign]
        assert Draws([state], 1.0)(logits, [(0, [])]).tolist() == [token]


def test_logits_that_are_not_finite_fail_and_leave_the_other_rows_alone() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    found = Draws(states(2), 1.0)(logits, [(0, []), (1, []), None]).tolist()
    assert found[1] == FAILED and found[0] in range(5) and found[2] == 0


@pytest.mark.parametrize(
    ("started", "most", "firsts", "end"),
    [
        (0, 12, [0, 4, 8], 12), (0, 11, [0, 4], 8), (0, 4, [0], 4), (0, 3, [0], 3), (3, 4, [3], 4), (3, 9, [3, 4], 8), (8, 12, [8], 12),
    ],
)  # fmt: skip
def test_groups_start_together_where_they_can(started: int, most: int, firsts: list[int], end: int) -> None:
    prompts = [[number // 4] * 3 for number in range(12)]
    assert next_to_read(prompts, started, most, True, 4) == (firsts, end)
