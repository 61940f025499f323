"""What the engine's tokens become, and when an answer is paused."""

from types import SimpleNamespace
from typing import Any

import pytest

from glmtuner.serving import calls
from glmtuner.serving.calls import Call, Choice, Delta


class Characters:
    """A tokenizer with a token for each character."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def choice(stops: list[str], tokenizer: Any = None) -> tuple[Choice, list[Delta]]:
    found: list[Delta] = []
    finished: Any = SimpleNamespace(stops=(0,), tokenizer=tokenizer or Characters())
    return Choice(3, finished, stops, found.append), found


def test_an_answer_ends_once_with_the_reason_why() -> None:
    one, found = choice(["END"])
    assert all(one.on_token(ord(letter)) for letter in "ab EN")
    one.on_end("length")
    assert "".join(delta.text for delta in found) == "ab EN" and found[-1] == Delta(3, " EN", "length")
    one, found = choice(["END"])
    assert [one.on_token(ord(letter)) for letter in "a END"] == [True] * 4 + [False]
    one.on_end("stop")
    assert found == [Delta(3, "a", None), Delta(3, "", "stop")]
    one, found = choice(["\ufffd"])  # held back as the beginning of a character until the end decides
    assert one.on_token(0xFFFD)
    one.on_end("length")
    assert found == [Delta(3, "", "stop")]
    one, found = choice([])
    assert not one.on_token(0)


def test_an_end_that_cannot_be_decoded_is_an_error_and_still_an_end() -> None:
    broken = SimpleNamespace(decode=lambda tokens, skip_special_tokens: 1 // 0)
    for reason, told in (("stop", "error"), ("error", "error"), ("cancelled", "cancelled")):
        one, found = choice([], broken)
        one.on_end(reason)
        assert found == [Delta(3, "", told)]


def test_an_answer_is_paused_while_its_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_UNSENT", 4)
    requests: Any = [SimpleNamespace(paused=False, cancelled=False, generated=[]) for _ in range(2)]
    call = Call(SimpleNamespace(service_tier=None), [1], 0.0, requests)  # type: ignore[arg-type]
    for unsent in range(1, 5):
        call.emitted()
        assert [request.paused for request in requests] == [unsent == 4] * 2
    assert not call.taken() and requests[0].paused
    assert call.taken() and not requests[0].paused  # half of them are sent
    assert not call.taken()
