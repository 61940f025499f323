"""Greedy answers are those of `generate` for each prompt alone, whatever stands beside it in the batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import MODELS, STOP, alone, built, prompt
from transformers import GenerationMixin

from glmtuner.errors import PreflightError
from glmtuner.inference.batch import SPARE_COLUMNS
from glmtuner.inference.decoding import Decoder
from glmtuner.inference.generate import Decoding, answers, until_stop
from glmtuner.models.prefix import add_prefix

PAD = 3
STOPS = (STOP, *range(10, 400, 8))  # so many that answers differ in length


def answered(model: Any, prompts: list[list[int]], rows: int, room: int = 12, **values: Any) -> list[list[int]]:
    decoding = Decoding(
        **{
            "max_new_tokens": room,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "stop_ids": STOPS,
            "pad_id": PAD,
            **values,
        }
    )
    found = dict(answers(model, prompts, decoding, rows))
    assert found.keys() == {*range(len(prompts))}
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_size_gives_what_generate_gives_a_prompt_alone(name: str) -> None:
    model = built(name)
    prompts = [prompt(name, number) for number in range(24)]
    whole = [alone(model, words) for words in prompts]
    stops = (STOP, *(tokens[number % 7] for number, tokens in enumerate(whole) if number % 2))
    wanted = [until_stop(tokens, stops) for tokens in whole]
    assert len({len(tokens) for tokens in wanted}) > 1
    for rows in (1, 3, 8):
        assert answered(model, prompts, rows, stop_ids=stops) == wanted, rows


def test_logits_that_are_not_finite_are_an_error_and_no_answer() -> None:
    model = built("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.inf
    prompts = [prompt("Llama", 0), [20, 9, 21], prompt("Llama", 1)]
    for penalty in (1.0, 1.3):
        with pytest.raises(PreflightError, match=r"not finite for prompt 2 of 3.*float64; type model.dtype=float32"):
            answered(model, prompts, rows=2, repetition_penalty=penalty)


@pytest.mark.parametrize("name", ["Glm", "ChatGLM"])
def test_logits_of_a_row_are_those_of_its_tokens_alone(name: str) -> None:
    model = built(name).float()
    decoder = Decoder(model, PAD)
    prompts = [prompt(name, number) for number in range(6)]
    batch, logits = decoder.prefill(range(3), prompts[:3])
    for step in range(SPARE_COLUMNS + 20):  # so that the buffers are made anew once
        tokens = torch.arange(len(batch.rows)) + 20 + step
        for place, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            if step % 10 == 0:
                ids = torch.tensor([prompts[row]])
                whole = model(input_ids=ids).logits[0, -1]
                torch.testing.assert_close(logits[place], whole, rtol=1e-4, atol=1e-4)
            prompts[row].append(token)
        batch.append(tokens)
        if step in (2, 4):
            batch.remove([0])
        if step in (5, 40):
            joining = [3, 4] if step == 5 else [5]
            joined, _ = decoder.prefill(joining, [prompts[row] for row in joining])
            firsts = torch.tensor([30] * len(joining))
            joined.append(firsts)
            for row in joining:
                prompts[row].append(30)
            batch.join(joined)
        assert batch.mask.sum(-1).tolist() == [len(prompts[row]) for row in batch.rows] == batch.lengths
        assert batch.mask[:, 0].any(), "no column is padding for all"
        assert (batch.ids[batch.mask == 0] == PAD).all(), "nothing is left of a row that stood there"
        logits = decoder.step(batch)
    assert len(batch.rows) == 4


@pytest.mark.parametrize("name", ["Llama", "ChatGLM"])
def test_a_repetition_penalty_is_that_of_generate(name: str) -> None:
    model = built(name)
    prompts = [prompt(name, number) for number in range(9)]
    wanted = [until_stop(alone(model, words, repetition_penalty=1.3), STOPS) for words in prompts]
    assert wanted != [until_stop(alone(model, words), STOPS) for words in prompts]
    assert answered(model, prompts, 4, repetition_penalty=1.3) == wanted


def test_beams_are_those_of_generate() -> None:
    model = built("Llama")
    prompts = [prompt("Llama", number) for number in range(5)]
    wanted = [until_stop(alone(model, words, num_beams=3), [STOP]) for words in prompts]
    assert wanted != [until_stop(alone(model, words), [STOP]) for words in prompts]
    assert answered(model, prompts, 2, num_beams=3, stop_ids=(STOP,)) == wanted


def test_answers_begin_in_order_and_a_free_row_is_taken_at_once() -> None:
    model = built("Glm")
    prompts = [prompt("Glm", number) for number in range(12)]
    read = []
    forward = model.forward

    def spied(**given: Any) -> Any:
        read.append(given["input_ids"].shape)
        return forward(**given)

    model.forward = spied
    decoding = Decoding(max_new_tokens=30, num_beams=1, repetition_penalty=1.0, stop_ids=STOPS, pad_id=PAD)
    lengths = {place: len(tokens) for place, tokens in answers(model, prompts, decoding, 4)}
    steps = [
        rows for rows, width in read[6:] if width == 1
    ]  # a prompt with and without padding, and two steps of each, come first
    assert max(steps) == 4 and steps[:-30] == [4] * len(steps[:-30])
    assert sum(steps) <= sum(lengths.values())  # no row stays in the batch when it is done


def test_no_gradients_and_the_mode_is_as_before() -> None:
    model = built("Llama").train()
    produced = answers(
        model,
        [prompt("Llama", 1)] * 3,
        Decoding(max_new_tokens=3, num_beams=1, repetition_penalty=1.0, stop_ids=(), pad_id=PAD),
        2,
    )
    next(produced)
    assert torch.is_grad_enabled() and not model.training
    assert len(list(produced)) == 2 and model.training


def test_a_model_without_a_cache_goes_through_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Llama")
    words = [prompt("Llama", number) for number in range(3)]
    wanted = answered(model, words, 2)
    called = []
    generate = GenerationMixin.generate
    forward = model.forward

    def without_cache(**given: Any) -> Any:
        return SimpleNamespace(logits=forward(**given).logits)

    def whole(self: Any, *given: Any, **options: Any) -> Any:
        called.append(1)
        model.forward = forward
        return generate(self, *given, **options)

    monkeypatch.setattr(GenerationMixin, "generate", whole)
    model.forward = without_cache
    assert answered(model, words, 2) == wanted and len(called) == 4  # two of them to see what padding changes


def test_a_prefix_and_an_adapter_are_seen_by_every_row(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from glmtuner.families.family import family_named

    model = built("ChatGLM2")
    add_prefix(model, family_named("chatglm2"), tokens=5, projection=False, dropout=0.0)
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    lora: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    lora.double().eval()
    prompts = [prompt("ChatGLM2", number) for number in range(9)]
    assert answered(lora, prompts, 4) == [until_stop(alone(lora, words), STOPS) for words in prompts]


def test_no_prompts_and_no_room_for_more_than_a_token() -> None:
    model = built("Llama")
    assert answered(model, [], 4) == []
    prompts = [prompt("Llama", number) for number in range(5)]
    assert answered(model, prompts, 2, room=1) == [until_stop(alone(model, words, 1), STOPS) for words in prompts]
