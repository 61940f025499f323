"""Replayed steps give the answers of `generate`; here every replay computes the step anew, on the buffers that a graph would."""

from functools import partial
from typing import Any

import pytest
import torch
from small_models import MODELS, STOP, alone, built, prompt

from glmtuner.inference import decoding
from glmtuner.inference.batch import SPARE_COLUMNS
from glmtuner.inference.decoding import Decoder
from glmtuner.inference.generate import Decoding, answers, until_stop
from glmtuner.inference.replay import Recorder, Replay, can_replay

PAD = 3
REPLAYED = ("Llama", "Glm", "GPT2", "ChatGLM", "ChatGLM2")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every replayed step; decoders replay while this is used."""
    seen: list[int] = []
    step = Replay.step

    def counted(self: Replay, batch: Any) -> Any:
        seen.append(len(batch.rows))
        return step(self, batch)

    monkeypatch.setattr(Replay, "step", counted)
    monkeypatch.setattr(decoding, "Decoder", partial(Decoder, replays=True))
    return seen


def answered(model: Any, prompts: list[list[int]], rows: int, room: int, stops: tuple[int, ...]) -> list[list[int]]:
    wanted = Decoding(max_new_tokens=room, num_beams=1, repetition_penalty=1.0, stop_ids=stops, pad_id=PAD)
    found = dict(answers(model, prompts, wanted, rows))
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_generate(name: str, steps: list[int]) -> None:
    model, room = built(name), 2 * SPARE_COLUMNS + 20  # so that the buffers are filled, moved and made anew
    prompts = [prompt(name, number) for number in range(14)]
    whole = [alone(model, words, room) for words in prompts]
    stops = (STOP, *(tokens[9 * number % min(70, len(tokens))] for number, tokens in enumerate(whole) if number % 2))
    wanted = [until_stop(tokens, stops) for tokens in whole]
    assert len({len(tokens) for tokens in wanted}) > 3
    for rows in (1, 3, 8):
        steps.clear()
        assert answered(model, prompts, rows, room, stops) == wanted, rows
        assert bool(steps) is (name in REPLAYED)
    if name in REPLAYED:
        assert len(set(steps)) > 2  # rows joined and left between them


def test_a_model_that_would_give_other_logits_goes_on_without(
    steps: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built("Glm")
    prompts = [prompt("Glm", number) for number in range(5)]
    wanted = [until_stop(alone(model, words, 30), [STOP]) for words in prompts]
    forward = Replay._forward
    monkeypatch.setattr(Replay, "_forward", lambda self, batch: 1.1 * forward(self, batch))
    assert answered(model, prompts, 3, 30, (STOP,)) == wanted
    assert len(steps) == 1
    printed = capsys.readouterr().out
    assert "not replayed as CUDA graphs" in printed and "logits" in printed and "%" in printed


def test_a_model_that_cannot_be_recorded_goes_on_without(
    steps: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built("ChatGLM")
    prompts = [prompt("ChatGLM", number) for number in range(5)]
    wanted = [until_stop(alone(model, words, 30), [STOP]) for words in prompts]

    def refused(self: Replay, batch: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(Replay, "_forward", refused)
    assert answered(model, prompts, 3, 30, (STOP,)) == wanted
    printed = capsys.readouterr().out
    assert "not replayed as CUDA graphs" in printed
    assert "RuntimeError: operation not permitted when stream is capturing" in printed


def test_rows_without_a_token_stay_numbers(steps: list[int]) -> None:
    """A row that has left keeps its place in the buffers; what is computed for it must not spoil who comes after."""
    model = built("Llama").float()
    decoder = Decoder(model, PAD, replays=True)
    batch, logits = decoder.prefill(range(6), [prompt("Llama", number) for number in range(6)])
    for step in range(12):
        batch.append(logits.argmax(-1))
        if step == 6:
            batch.remove([0, 1, 2, 3])
        logits = decoder.step(batch)
    assert len(steps) == 12 - 2 and steps[-1] == 2
    assert all(torch.isfinite(buffer.float()).all() for buffer in batch._all_buffers())


def test_what_may_be_recorded() -> None:
    model = built("Llama")
    assert can_replay(model, model) and Decoder(model, PAD).recorder is None  # on a CPU nothing is, unless asked
    assert isinstance(Decoder(model, PAD, replays=True).recorder, Recorder)
    model.config._attn_implementation = "segments|sdpa"
    assert can_replay(model, model)
    model.config._attn_implementation = "eager"
    assert not can_replay(model, model)
    model.config._attn_implementation = "sdpa"
    model.quantization_method = "bitsandbytes"
    assert not can_replay(model, model)
    del model.quantization_method
    model.prefix_encoder = torch.nn.Identity()
    assert not can_replay(model, model)
