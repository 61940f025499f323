"""What the engine's tokens become, and when an answer is paused."""

from types import SimpleNamespace
from typing import Any

import pytest

from glmtuner.serving import calls
from glmtuner.serving.calls import Call, Choice, Delta
from glmtuner.serving.prompt import Prompt
from glmtuner.templates.tool_calls import SYNTAXES


class Characters:
    """A tokenizer with a token for each character."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012  # there are none
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


class Broken(Characters):
    """One whose tokens cannot be decoded."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        raise ZeroDivisionError


def choice(stops: list[str], tokenizer: Any = None, thinks: bool = False, **prompt: Any) -> tuple[Choice, list[Delta]]:
    found: list[Delta] = []
    template = SimpleNamespace(renders_reasoning=thinks, syntax=lambda tokenizer: prompt.get("syntax"))
    finished: Any = SimpleNamespace(stops=(0,), tokenizer=tokenizer or Characters(), template=template)
    asked = Prompt([ord(letter) for letter in prompt.pop("said", "?")], **prompt)
    return Choice(3, finished, asked, stops, found.append), found


def written(one: Choice, text: str, reason: str = "stop") -> None:
    """Give the choice these characters, up to the first that ends it."""
    all(one.on_token(ord(letter)) for letter in text)
    one.on_end(reason)


def joined(found: list[Delta]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """The thought, the text, the calls and the finish reason of all deltas."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for delta in found for call in delta.calls]
    return (
        "".join(each.reasoning for each in found),
        "".join(each.text for each in found),
        calls,
        found[-1].finish_reason,
    )


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
    for reason, told in (("stop", "error"), ("error", "error"), ("cancelled", "cancelled")):
        one, found = choice([], Broken())
        one.answer.text.tokens.append(1)
        one.on_end(reason)
        assert found == [Delta(3, "", told)]


def test_an_answer_is_paused_while_its_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_UNSENT", 4)
    requests: Any = [SimpleNamespace(paused=False, cancelled=False, generated=[]) for _ in range(2)]
    call = Call(SimpleNamespace(service_tier=None), Prompt([1]), 0.0, requests)  # type: ignore[arg-type]
    for unsent in range(1, 5):
        call.emitted()
        assert [request.paused for request in requests] == [unsent == 4] * 2
    assert not call.taken() and requests[0].paused
    assert call.taken() and not requests[0].paused  # half of them are sent
    assert not call.taken()


TWO = {  # two calls and what stands before them, as official templates write them
    "glm4": 'f\n{"a": 1}<|assistant|>f\n{"a": 2}',
    "glm4.5": "\nsay\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    "\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    "glm4.7": "say<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    "<tool_call>f<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>",
    "hermes": 'say\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    '\n<tool_call>\n{"name": "f", "arguments": {"a": 2}}\n</tool_call>',
    "mistral_nemo": '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "call00001"}, '
    '{"name": "f", "arguments": {"a": 2}, "id": "call00001"}]',
}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("name", TWO)
def test_calls_have_ids_of_their_own_and_end_an_answer_that_may_have_one(name: str) -> None:
    asked: dict[str, Any] = {"syntax": SYNTAXES[name], "tools": (TOOL,)}
    one, found = choice([], **asked, call_ids=frozenset({"call00001"}))
    written(one, TWO[name])
    _, text, calls, reason = joined(found)
    assert calls == [("f", '{"a": 1}'), ("f", '{"a": 2}')] and reason == "tool_calls"
    assert text == ("say" if "say" in TWO[name] else "")
    made = [call for delta in found for call in delta.calls]
    assert [call["index"] for call in made] == [0, 1] and len({"call00001", *(call["id"] for call in made)}) == 3
    assert all(len(call["id"]) == 9 for call in made)
    one, found = choice([], **asked, parallel=False)
    written(one, TWO[name])
    assert joined(found)[2:] == ([("f", '{"a": 1}')], "tool_calls")
    one, found = choice([], **asked)
    written(one, TWO[name][:-2], "length")  # cut off: what is whole is a call, and the rest is text
    assert found[-1].finish_reason == "length" and len(joined(found)[2]) == (0 if "[" in TWO[name][0] else 1)


def test_a_stop_text_ends_the_text_and_is_not_looked_for_in_thoughts_and_calls() -> None:
    one, found = choice(["1"], thinks=True, syntax=SYNTAXES["glm4.7"], tools=(TOOL,))
    written(one, "<think>1 2</think>say" + TWO["glm4.7"][3:])
    assert joined(found) == ("1 2", "say", [("f", '{"a": 1}'), ("f", '{"a": 2}')], "tool_calls")
    one, found = choice(["1"], thinks=True, said="<think>", syntax=SYNTAXES["glm4.7"], tools=(TOOL,))
    written(one, "1</think>say 1<tool_call>f</tool_call>")
    assert joined(found) == ("1", "say", [], "stop")


def test_without_a_syntax_calls_are_text_and_without_thoughts_they_are_too() -> None:
    for name, text in TWO.items():
        one, found = choice([])
        written(one, text)
        assert joined(found) == ("", text.strip(), [], "stop"), name
    one, found = choice([])
    written(one, "<think>a</think>b")
    assert joined(found)[:2] == ("", "<think>a</think>b")
