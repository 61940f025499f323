"""The engine gives each request what `generate` gives it alone, however requests come together."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small_models import MODELS, STOP, alone, built, prompt

from glmtuner.errors import ConfigError
from glmtuner.inference.decoding import PREFILL_TOKENS
from glmtuner.models.prefix import add_prefix
from glmtuner.serving.engine import Engine, QueueFullError, Request, Sampling


def engine_of(model: Any, name: str, rows: int = 32, waiting: int = 1000) -> Engine:
    found = [SimpleNamespace(input_ids=words) for words in sorted((prompt(name, 0), prompt(name, 1)), key=len)]
    encode = SimpleNamespace(encode=lambda tokenizer, conversations: found)
    finished = SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=3), stops=(STOP,), template=encode)
    return Engine(finished, rows, waiting)  # type: ignore[arg-type]


class Asked:
    """A request and what came of it."""

    def __init__(self, words: list[int], room: int = 12, **sampling: Any) -> None:
        self.tokens: list[int] = []
        self.reason = ""
        self.done = threading.Event()
        self.request = Request(
            words, room, Sampling(**{"temperature": 0.0, **sampling}), on_token=self.take, on_end=self.end
        )  # fmt: skip

    def take(self, token: int) -> bool:
        self.tokens.append(token)
        return True

    def end(self, reason: str) -> None:
        assert not self.reason, "a request ends once"
        self.reason = reason
        self.done.set()

    def answer(self) -> list[int]:
        assert self.done.wait(60)
        return self.request.generated


@pytest.mark.parametrize("name", MODELS)
def test_batched_answers_are_those_of_single_prompts(name: str) -> None:
    model = built(name)
    engine = engine_of(model, name, rows=6)
    asked = [Asked(prompt(name, number), room=3 + number % 10) for number in range(20)]
    for one in asked[:9]:
        engine.submit(one.request)
    engine.start()
    for one in asked[9:]:  # these come while others are answered
        engine.submit(one.request)
        asked[3].done.wait(0.01)
    try:
        for number, one in enumerate(asked):
            assert one.answer() == alone(model, prompt(name, number), 3 + number % 10), number
            assert one.reason == ("stop" if one.request.generated[-1] == STOP else "length")
        assert engine.largest_batch == (1 if name == "Bloom" else 6)  # its own code gives NaN for padded prompts
    finally:
        engine.close()


def test_a_prefix_is_seen_by_every_row() -> None:
    from glmtuner.families.family import family_named

    model = built("ChatGLM2")
    add_prefix(model, family_named("chatglm2"), tokens=5, projection=False, dropout=0.0)
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    model.double()
    engine = engine_of(model, "ChatGLM2")
    asked = [Asked(prompt("ChatGLM2", number)) for number in range(8)]
    for one in asked:
        engine.submit(one.request)
    engine.start()
    try:
        for number, one in enumerate(asked):
            assert one.answer() == alone(model, prompt("ChatGLM2", number))
        assert engine.largest_batch > 1
    finally:
        engine.close()


def test_each_request_is_sampled_by_its_own_values() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama")
    words = prompt("Llama", 1)
    asked = {
        "greedy": Asked(words),
        "penalized": Asked(words, repetition_penalty=1.7),
        "seeded": Asked(words, temperature=1.5, seed=11),
        "again": Asked(words, temperature=1.5, seed=11),
        "other": Asked(words, temperature=1.5, seed=12),
        "nucleus": Asked(words, temperature=2.0, top_p=1e-6),
        "single": Asked(words, temperature=2.0, top_k=1),
        "never twice": Asked(words, frequency_penalty=1000.0, room=40),
        "nor so": Asked(words, presence_penalty=1000.0, room=40),
    }
    for one in asked.values():
        engine.submit(one.request)
    engine.start()
    found = {name: one.answer() for name, one in asked.items()}
    engine.close()
    assert found["greedy"] == found["nucleus"] == found["single"] == alone(model, words)
    assert found["penalized"] == alone(model, words, repetition_penalty=1.7)
    assert found["seeded"] == found["again"] != found["other"]
    for name in ("never twice", "nor so"):
        assert len(set(found[name])) == len(found[name])


def test_sampled_tokens_are_drawn_as_often_as_the_model_says() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama", rows=64)
    words = prompt("Llama", 5)
    asked = [Asked(words, room=1, temperature=2.0, top_k=5) for _ in range(600)]
    for one in asked:
        engine.submit(one.request)
    engine.start()
    drawn = torch.bincount(torch.tensor([one.answer()[0] for one in asked]), minlength=400) / len(asked)
    engine.close()
    logits = model(torch.tensor([words])).logits[0, -1]
    best = logits.topk(5)
    wanted = torch.zeros(400, dtype=torch.double).scatter(0, best.indices, (best.values / 2.0).softmax(-1))
    assert (drawn - wanted).abs().max() < 0.09  # four standard deviations of a share of 600


def test_a_model_without_a_cache_of_its_steps_is_refused() -> None:
    config = transformers.Mamba2Config(
        hidden_size=32, num_hidden_layers=1, vocab_size=400, head_dim=8, num_heads=8, state_size=8, n_groups=1
    )
    with pytest.raises(ConfigError, match="Mamba2ForCausalLM returns no transformers Cache"):
        engine_of(transformers.Mamba2ForCausalLM(config).eval(), "Mamba2").start()


def test_long_prompts_are_read_a_few_at_a_time() -> None:
    engine = engine_of(built("Llama"), "Llama")
    for length in (PREFILL_TOKENS // 2, PREFILL_TOKENS // 2, 10, PREFILL_TOKENS * 2, 10):
        engine.submit(Asked([20] * length).request)
    taken = []
    while engine.waiting:
        taken.append([len(row.request.prompt) for row in engine._admit()])
    assert taken == [[PREFILL_TOKENS // 2] * 2, [10], [PREFILL_TOKENS * 2], [10]]


def test_busy_cancelled_failed_and_closed() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama", rows=2, waiting=4)
    long = [Asked(prompt("Llama", number), room=10_000) for number in range(2)]
    waiting = [Asked(prompt("Llama", number), room=10_000) for number in range(2)]
    for one in (*long, *waiting):
        engine.submit(one.request)
    with pytest.raises(QueueFullError):
        engine.submit(Asked([20, 21]).request)
    engine.start()
    long[0].request.cancelled = True
    waiting[1].request.cancelled = True
    assert long[0].done.wait(30) and long[0].reason in ("cancelled", "stop")
    whole, forward = {"left": 3}, model.forward

    def failing(*given: Any, **options: Any) -> Any:
        whole["left"] -= 1
        if whole["left"] == 0:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return forward(*given, **options)

    model.forward = failing
    assert long[1].done.wait(30) and long[1].reason in ("error", "stop")
    assert waiting[0].done.wait(30) and waiting[1].done.wait(30)
    model.forward = forward
    after = Asked(prompt("Llama", 3))
    engine.submit(after.request)
    assert after.answer() == alone(model, prompt("Llama", 3))
    last = Asked(prompt("Llama", 1), room=100_000)
    engine.submit(last.request)
    engine.close()
    assert last.done.wait(1) and last.reason in ("cancelled", "stop")
