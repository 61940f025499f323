"""The engine gives each request what `generate` gives it alone, however requests come together."""

import logging
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


def counted(model: Any, words: list[int], penalty: float, room: int = 12) -> list[int]:
    """Greedy decoding in which a token loses `penalty` for each time that it was generated."""
    generated: list[int] = []
    while len(generated) < room and generated[-1:] != [STOP]:
        logits = model(torch.tensor([[*words, *generated]])).logits[0, -1]
        for token in generated:
            logits[token] -= penalty
        generated.append(int(logits.argmax()))
    return generated


@pytest.mark.parametrize("temperature", [1e-7, 2e-38, 1e-45, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama")
    words = prompt("Llama", 1)
    plain = Asked(words, temperature=temperature, top_p=0.7, top_k=50, seed=1)
    penalized = Asked(words, temperature=temperature, frequency_penalty=1.9, top_p=0.7, top_k=50)
    for one in (plain, penalized):
        engine.submit(one.request)
    engine.start()
    with torch.no_grad():
        assert plain.answer() == alone(model, words)
        assert penalized.answer() == counted(model, words, 1.9) != plain.answer()
    engine.close()


SAMPLINGS = [
    {}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.3, "top_p": 0.5, "top_k": 7}, {"frequency_penalty": 2.0},
    {"repetition_penalty": 1.2}, {"temperature": 2.0, "presence_penalty": -2.0, "repetition_penalty": 100.0},
]  # fmt: skip


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The engine's log, whatever libraries did to the logging of this process."""
    logger = logging.Logger("engine")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr("glmtuner.serving.engine.log", logger)
    return caplog


@pytest.mark.parametrize("name", ["Llama", "Mistral"])  # the cache of the second cannot be joined row by row
def test_logits_that_are_not_finite_end_their_own_request_only(name: str, logged: pytest.LogCaptureFixture) -> None:
    model = built(name)
    poison = 9  # no prompt has this token, and no answer
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan  # as an overflow: its keys and values are NaN, too
        model.lm_head.weight[poison] = 0
    engine = engine_of(model, name, rows=8)
    good = [Asked(prompt(name, number), room=5 + number) for number in range(24)]
    bad = [Asked([20, poison, 21] * (1 + number), **sampling) for number, sampling in enumerate(SAMPLINGS)]
    for number, one in enumerate(good):
        engine.submit(one.request)
        if number % 4 == 1:
            engine.submit(bad[number // 4].request)
    engine.start()
    for number, one in enumerate(good):
        assert one.answer() == alone(model, prompt(name, number), 5 + number) and one.reason in ("stop", "length")
    for one in bad:
        assert one.answer() == [] and one.reason == "error"
    engine.close()
    told = [record for record in logged.records if "not finite" in record.message]
    assert len(told) == len(bad) and not any(record.exc_info for record in logged.records)


def test_an_error_in_one_request_s_own_code_ends_it_alone() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama", rows=4)
    good = [Asked(prompt("Llama", number), room=20) for number in range(6)]

    def failing(*given: Any) -> Any:
        raise RuntimeError("a tokenizer that cannot decode this")

    in_token, in_end, in_sampling = Asked([30, 31]), Asked([32, 33]), Asked([34, 35], temperature=1.0, top_p=-1.0)
    in_token.request.on_token = failing
    in_end.request.on_end = failing
    for one in (good[0], in_token, good[1], in_end, good[2], in_sampling, *good[3:]):
        engine.submit(one.request)
    engine.start()
    for number, one in enumerate(good):
        assert one.answer() == alone(model, prompt("Llama", number), 20)
    for one in (in_token, in_sampling):
        assert one.done.wait(60) and one.reason == "error"
    engine.close()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "ChatGLM"])
def test_a_paused_request_makes_room_and_then_goes_on(name: str) -> None:
    model = built(name)
    engine = engine_of(model, name, rows=1)
    paused = Asked(prompt(name, 4), room=30)
    paused.request.paused = True  # from its first token on
    others = [Asked(prompt(name, number), room=5) for number in range(3)]
    dropped = Asked(prompt(name, 5), room=30)
    dropped.request.paused = True
    for one in (paused, dropped, *others):
        engine.submit(one.request)
    engine.start()
    for number, one in enumerate(others):  # the only row is theirs
        assert one.answer() == alone(model, prompt(name, number), 5)
    assert not paused.done.is_set() and len(paused.request.generated) == 1
    dropped.request.cancelled = True
    paused.request.paused = False
    engine.wake()
    assert paused.answer() == alone(model, prompt(name, 4), 30)
    assert dropped.done.wait(60) and dropped.reason == "cancelled"
    last = Asked(prompt(name, 6), room=100)
    last.request.paused = True
    engine.submit(last.request)
    engine.close()
    assert last.done.wait(60) and last.reason == "cancelled"


def test_requests_are_queued_together_or_not_at_all() -> None:
    engine = engine_of(built("Llama"), "Llama", waiting=4)
    engine.submit(*(Asked([20]).request for _ in range(3)))
    with pytest.raises(QueueFullError):
        engine.submit(*(Asked([20]).request for _ in range(2)))
    assert len(engine.waiting) == 3
    engine.submit(Asked([20]).request)


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
    assert long[0].done.wait(60) and long[0].reason in ("cancelled", "stop")
    whole, forward = {"left": 3}, model.forward

    def failing(*given: Any, **options: Any) -> Any:
        whole["left"] -= 1
        if whole["left"] == 0:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return forward(*given, **options)

    model.forward = failing
    assert long[1].done.wait(60) and long[1].reason in ("error", "stop")
    assert waiting[0].done.wait(60) and waiting[1].done.wait(60)
    model.forward = forward
    after = Asked(prompt("Llama", 3))
    engine.submit(after.request)
    assert after.answer() == alone(model, prompt("Llama", 3))
    last = Asked(prompt("Llama", 1), room=100_000)
    engine.submit(last.request)
    engine.close()
    assert last.done.wait(60) and last.reason in ("cancelled", "stop")


def test_an_answer_begins_with_one_of_the_given_texts_and_goes_on_as_it_likes() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama")
    words = prompt("Llama", 1)
    begins = ((11, 12, 13), (11, 12, 14, 15), (20,))
    asked = [Asked(words, temperature=temperature, seed=seed) for seed, temperature in enumerate([0.0, *[50.0] * 12])]
    asked += [Asked(words), Asked(words, repetition_penalty=1.7)]
    for one in asked[:-2]:
        one.request.begins = begins
    for one in asked:
        engine.submit(one.request)
    engine.start()
    found = [one.answer() for one in asked]
    engine.close()
    starts = [next(begin for begin in begins if tuple(answer[: len(begin)]) == begin) for answer in found[:-2]]
    assert len({*starts}) > 1 and len({tuple(answer) for answer in found[:-2]}) > 3
    assert found[0][len(starts[0]) :] == alone(model, [*words, *starts[0]], 12 - len(starts[0]))
    assert found[-2] == alone(model, words) and found[-1] == alone(model, words, repetition_penalty=1.7)


def test_a_beginning_that_is_cut_off_by_the_limit_is_no_error() -> None:
    model = built("Llama")
    engine = engine_of(model, "Llama")
    one = Asked(prompt("Llama", 1), room=2)
    one.request.begins = ((11, 12, 13),)
    engine.submit(one.request)
    engine.start()
    assert one.answer() == [11, 12] and one.reason == "length"
    engine.close()
