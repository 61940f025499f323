"""Tools and reasoning by `serve` and `chat`: the official client asks a tiny model that has learned conversations by heart.

What the model has learned is what transformers renders with the official templates, so that its answers are in the syntax that
the published models write; GLM-4's is asked by our own template. GLM-4.7 by default, Qwen3, Llama 3.1 and GLM-4's own jinja by
`make test-heavy`, GLM-4, GLM-4.5 and Mistral by `make test-matrix`.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from listening import official_client
from official_templates import Official, official
from openai import OpenAI
from transformers import LlamaConfig, LlamaForCausalLM

from glmtuner.cli import chat
from glmtuner.config.groups import Generation
from glmtuner.inference.conversation import Conversation
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.jinja import TokenizersOwn

FAMILIES = ("glm4", "glm-4.5", "glm-4.7", "glm-4-9b-chat", "qwen3", "mistral-7b-instruct-v0.3", "llama-3.1-instruct")
ONE_CALL = {"llama-3.1-instruct"}  # in a turn
THINK = {"glm-4.5", "glm-4.7", "qwen3"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TOOLS: Any = [WEATHER, TIME]
BEIJING, SHANGHAI = {"city": "北京", "days": 3}, {"city": "上海", "days": 1}
THOUGHT = "6*7, 试试"


def choices(names: Iterable[str]) -> list[Any]:
    """Parameters of these families; one is tried by default, three by `make test-heavy`."""
    marks: dict[str, Any] = {
        "glm-4.7": (),
        **dict.fromkeys(("glm-4-9b-chat", "llama-3.1-instruct", "qwen3"), pytest.mark.heavy),
    }
    return [pytest.param(name, marks=marks.get(name, (pytest.mark.heavy, pytest.mark.matrix))) for name in names]


def called(*arguments: dict[str, Any], as_text: bool = False) -> dict[str, Any]:
    calls = [
        {
            "id": f"call0000{number}", "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps(each, ensure_ascii=False) if as_text else each},
        }
        for number, each in enumerate(arguments)
    ]  # fmt: skip
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call0000{number}"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def learned(name: str) -> list[tuple[list[dict[str, Any]], list[Any], bool]]:
    """(conversation, tools, is it asked with thinking?) of all that the model learns but its malformed call."""
    answer = {"role": "assistant", "content": "晴, 25 度"}
    found: list[tuple[list[dict[str, Any]], list[Any], bool]] = [
        ([user("1+1?"), {"role": "assistant", "content": "two"}], TOOLS, False),
        ([user("北京?"), called(BEIJING)], TOOLS, False),
        ([user("北京?"), called(BEIJING), result("晴 25"), answer], TOOLS, False),
    ]
    if name not in ONE_CALL:
        both = called(BEIJING, SHANGHAI)
        said = {"role": "assistant", "content": "都是晴天"}
        found += [
            ([user("两地?"), both], TOOLS, False),
            ([user("两地?"), both, result("晴 25"), result("晴 19", 1), said], TOOLS, False),
        ]
    if name in THINK:
        found += [([user("6*7?"), {"role": "assistant", "content": "四十二", "reasoning_content": THOUGHT}], [], True)]
        found += [([user("想想北京?"), {**called(BEIJING), "reasoning_content": "要查天气"}], TOOLS, True)]
    return found


@cache
def template_of(name: str) -> Official:
    return official(SHARED[0], "glm-4-9b-chat-1m-hf" if name == "glm4" else name)


SHARED: list[Path | None] = []


@pytest.fixture(scope="module", params=choices(FAMILIES))
def family(request: pytest.FixtureRequest, shared: Path | None) -> str:
    SHARED[:] = [shared]
    template_of(request.param)
    return str(request.param)


MALFORMED = {  # a call that breaks off before the stop token
    "glm4": 'get_weather\n{"city": ',
    "glm-4-9b-chat": 'get_weather\n{"city": ',
    "glm-4.5": "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京",
    "glm-4.7": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>北京",
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": {"city": ',
    "mistral-7b-instruct-v0.3": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": ',
    "llama-3.1-instruct": '{"name": "get_weather", "parameters": {"city": ',
}


@pytest.fixture(scope="module")
def finished(family: str) -> Any:
    """A loaded run whose model has learned by heart what transformers renders of the conversations."""
    template = template_of(family)
    assert ("reasoning_content" in template.source) == (family in THINK)
    records = learned(family)
    texts = [json.dumps([messages, tools], ensure_ascii=False) for messages, tools, _ in records]
    tokenizer = template.tokenizer([*texts, template.source])
    of_glm = [stop for stop in ("<|user|>", "<|observation|>") if stop in template.stops]
    stops = of_glm or template.stops[:1] * 2  # of answers, and of calls
    rows = []
    for messages, tools, thinks in records:
        options = {"enable_thinking": thinks} if "enable_thinking" in template.source else {}
        behind = template.behind(messages, tools, **options)
        assert behind.strip(), messages
        stop = stops[1 if "tool_calls" in messages[-1] else 0]
        rows.append((template.prompt(messages[:-1], tools, **options), behind + stop))
    options = {"enable_thinking": False} if "enable_thinking" in template.source else {}
    rows.append((template.prompt([user("坏了?")], TOOLS, **options), MALFORMED[family] + template.stops[0]))
    model = learned_by_heart(tokenizer, rows)
    run = SimpleNamespace(generation=Generation(do_sample=False))
    return SimpleNamespace(
        run=run, model=model, tokenizer=tokenizer,
        template=TEMPLATES["glm4"] if family == "glm4" else TokenizersOwn(source=template.source, fitting=True),
        stops=tuple(sorted(tokenizer.convert_tokens_to_ids(stop) for stop in template.stops)),
    )  # fmt: skip


def learned_by_heart(tokenizer: Any, rows: list[tuple[str, str]]) -> LlamaForCausalLM:
    """A tiny model that answers each prompt with its text."""
    torch.manual_seed(0)
    encoded = [
        tuple(tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, behind))
        for prompt, behind in rows
    ]
    width = max(len(prompt) + len(behind) for prompt, behind in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, behind) in enumerate(encoded):
        ids[row, : len(prompt) + len(behind)] = torch.tensor(prompt + behind)
        labels[row, len(prompt) : len(prompt) + len(behind)] = torch.tensor(behind)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 2e-3:
            break
    assert loss < 0.02, loss
    return model.eval()


@pytest.fixture(scope="module")
def client(finished: Any) -> Iterator[OpenAI]:
    """The official client of a server of the model."""
    if finished.tokenizer.pad_token_id is None:
        finished.tokenizer.pad_token = finished.tokenizer.convert_ids_to_tokens(finished.stops[0])
    with official_client(finished) as made:
        yield made


def ask(client: OpenAI, messages: list[Any], thinking: bool | None = None, **asked: Any) -> Any:
    """The first choice, of a whole answer."""
    extra = {} if thinking is None else {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}
    asked = {"tools": TOOLS, "max_tokens": 150, **asked, **extra}
    return client.chat.completions.create(model="m", messages=messages, **asked).choices[0]


def streamed(client: OpenAI, messages: list[Any], thinking: bool | None = None, **asked: Any) -> dict[str, Any]:
    """What the deltas of a streamed answer add up to, as clients join them."""
    extra = {} if thinking is None else {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}
    asked = {"tools": TOOLS, "max_tokens": 150, **asked, **extra}
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}, "reasons": [], "deltas": 0}
    for chunk in client.chat.completions.create(model="m", messages=messages, stream=True, **asked):
        (choice,) = chunk.choices
        found["content"] += choice.delta.content or ""
        found["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
        for part in choice.delta.tool_calls or ():
            if part.id:  # the first delta of a call
                assert part.index == len(found["calls"]) and part.type == "function" and part.function.name
                found["calls"][part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            else:
                assert part.function.name is None and part.function.arguments
            found["calls"][part.index]["arguments"] += part.function.arguments
            found["deltas"] += 1
        if choice.finish_reason:
            found["reasons"].append(choice.finish_reason)
    return found


def off(family: str) -> bool | None:
    """What asks for an answer without a thought."""
    return False if "enable_thinking" in template_of(family).source else None


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]


def results_of(message: Any, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(message.tool_calls, texts, strict=True)
    ]


def test_a_call_its_result_and_the_answer(family: str, client: OpenAI) -> None:
    asked: list[Any] = [user("北京?")]
    choice = ask(client, asked, off(family))
    assert calls_of(choice) == [("get_weather", BEIJING)]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    # as clients send it back: the message as it came, and its result
    follow = [*asked, choice.message, *results_of(choice.message, ["晴 25"])]
    answer = ask(client, follow, off(family))
    assert answer.message.content == "晴, 25 度" and answer.finish_reason == "stop" and not answer.message.tool_calls

    parts = streamed(client, asked, off(family))
    assert parts["content"] == "" and parts["reasons"] == ["tool_calls"] and parts["deltas"] >= 2
    (call,) = parts["calls"].values()
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", BEIJING)
    assert call["id"] != choice.message.tool_calls[0].id or family.startswith("mistral")
    function = {"name": call["name"], "arguments": call["arguments"]}
    sent = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
    }
    follow = [
        *asked,
        sent,
        {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "晴 25"}]},
    ]
    again = streamed(client, follow, off(family))
    assert again["content"] == "晴, 25 度" and again["reasons"] == ["stop"] and not again["calls"]


def test_an_answer_is_sent_back_as_the_client_put_it_together_from_a_stream(family: str, client: OpenAI) -> None:
    asked: list[Any] = [user("北京?")]
    thinking = off(family)
    extra = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    with client.chat.completions.stream(
        model="m", messages=asked, tools=TOOLS, max_tokens=150, extra_body=extra
    ) as events:
        choice = events.get_final_completion().choices[0]
    assert calls_of(choice) == [("get_weather", BEIJING)] and choice.finish_reason == "tool_calls"
    results = [{**each, "name": "get_weather"} for each in results_of(choice.message, ["晴 25"])]
    for sent in (choice.message, choice.message.model_dump()):
        assert ask(client, [*asked, sent, *results], thinking).message.content == "晴, 25 度"


@pytest.mark.parametrize("family", choices(name for name in FAMILIES if name not in ONE_CALL), indirect=True)
def test_two_calls_at_once(family: str, client: OpenAI) -> None:
    asked: list[Any] = [user("两地?")]
    choice = ask(client, asked, off(family))
    assert calls_of(choice) == [("get_weather", BEIJING), ("get_weather", SHANGHAI)]
    ids = [call.id for call in choice.message.tool_calls]
    assert len({*ids}) == 2
    results = results_of(choice.message, ["晴 25", "晴 19"])
    for given in (results, results[::-1]):  # in whatever order they come, they are read as they were learned
        assert ask(client, [*asked, choice.message, *given], off(family)).message.content == "都是晴天"
    parts = streamed(client, asked, off(family))
    assert [json.loads(call["arguments"]) for call in parts["calls"].values()] == [BEIJING, SHANGHAI]
    for one in (ask(client, asked, off(family), parallel_tool_calls=False),):
        assert calls_of(one) == [("get_weather", BEIJING)] and one.finish_reason == "tool_calls"
    assert len(streamed(client, asked, off(family), parallel_tool_calls=False)["calls"]) == 1


@pytest.mark.parametrize("family", choices(name for name in FAMILIES if name in THINK), indirect=True)
def test_a_thought_apart_from_the_answer_and_from_calls(family: str, client: OpenAI) -> None:
    choice = ask(client, [user("6*7?")], True, tools=None)
    assert choice.message.content == "四十二" and choice.message.reasoning_content == THOUGHT
    parts = streamed(client, [user("6*7?")], True, tools=None)
    assert parts["content"] == "四十二" and parts["reasoning_content"] == THOUGHT and parts["reasons"] == ["stop"]
    choice = ask(client, [user("想想北京?")], True)
    assert choice.message.reasoning_content == "要查天气" and calls_of(choice) == [("get_weather", BEIJING)]
    # it is sent back with its result: the prompt has the thought, as the official template keeps it between calls
    follow = [user("想想北京?"), choice.message, *results_of(choice.message, ["晴 25"])]
    assert ask(client, follow, True).finish_reason
    cut = ask(client, [user("6*7?")], True, tools=None, max_tokens=3)
    assert cut.message.content == "" and cut.finish_reason == "length"
    assert THOUGHT.startswith(getattr(cut.message, "reasoning_content", ""))


def test_a_malformed_call_is_text(family: str, client: OpenAI) -> None:
    choice = ask(client, [user("坏了?")], off(family))
    assert choice.message.content == MALFORMED[family].strip() and not choice.message.tool_calls
    assert choice.finish_reason == "stop"
    assert streamed(client, [user("坏了?")], off(family))["content"] == MALFORMED[family].strip()


def test_the_choice_of_tools(family: str, client: OpenAI) -> None:
    plain = [user("1+1?")]
    assert ask(client, plain, off(family)).message.content == "two"
    assert ask(client, plain, off(family), tool_choice="auto").message.content == "two"
    # what the model writes unasked is text where no call is looked for
    none = ask(client, [user("北京?")], off(family), tool_choice="none")
    assert not none.message.tool_calls and none.finish_reason in ("stop", "length")
    for name in ("get_time", "get_weather"):
        named = {"type": "function", "function": {"name": name}}
        for temperature in (0, 1.5):
            choice = ask(client, plain, off(family), tool_choice=named, temperature=temperature, seed=1, max_tokens=60)
            assert f"{name}" in f"{choice.message.content} {calls_of(choice)}"  # be the call well-formed or not
            assert len(choice.message.tool_calls or ()) <= 1
    choice = ask(
        client, [user("北京?")], off(family), tool_choice={"type": "function", "function": {"name": "get_weather"}}
    )
    assert calls_of(choice) == [("get_weather", BEIJING)] and choice.finish_reason == "tool_calls"
    choice = ask(client, plain, off(family), tool_choice="required", max_tokens=60)
    assert "get_" in f"{choice.message.content} {calls_of(choice)}" and choice.message.content != "two"


def test_a_prompt_is_that_of_transformers(family: str, client: OpenAI, finished: Any) -> None:
    """Also with arguments as JSON text and null content."""
    from glmtuner.serving.prompt import prompt_of, tools_of, turns_of
    from glmtuner.serving.protocol import parse_request

    template = template_of(family)
    for messages, tools, thinks in learned(family):
        sent = [
            {**turn, "content": None, "tool_calls": called(*[call["function"]["arguments"] for call in turn["tool_calls"]], as_text=True)["tool_calls"]}
            if "tool_calls" in turn
            else turn
            for turn in messages[:-1]
        ]  # fmt: skip
        options = {"enable_thinking": thinks} if "enable_thinking" in template.source else {}
        body = {
            "model": "m",
            "messages": sent,
            "tools": tools,
            **({"chat_template_kwargs": options} if options else {}),
        }
        chat_request = parse_request(json.dumps(body).encode(), 100)
        prompt = prompt_of(chat_request, turns_of(chat_request), tools_of(chat_request), finished)
        assert finished.tokenizer.decode(prompt.ids) == template.prompt(messages[:-1], tools, **options)


@pytest.mark.parametrize(
    ("messages", "asked", "told"),
    [
        ([result("x")], {}, "'messages.0.tool_call_id'"),
        ([user("a"), called({}, as_text=True), user("b")], {}, "'messages.1.tool_calls'"),
        ([user("a"), called({}, {}, as_text=True), result("x")], {}, "call00001"),
        ([user("a"), called({}, as_text=True), result("x"), result("x")], {}, "'messages.3.tool_call_id'"),
        ([user("a"), called({}, as_text=True), result("x", 1)], {}, "'messages.2.tool_call_id'"),
        ([user("a")], {"tools": [WEATHER, WEATHER]}, "'tools.1.function.name'"),
        ([user("a")], {"tool_choice": {"type": "function", "function": {"name": "other"}}}, "'tool_choice.function.name'"),
        ([user("a")], {"tools": None, "tool_choice": "required"}, "'tool_choice'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_told(
    client: OpenAI, messages: list[Any], asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        ask(client, messages, **asked)
    assert caught.value.code == "invalid_tools"


def test_chat_shows_thoughts_and_calls_apart(
    family: str, finished: Any, client: OpenAI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = finished.template
    conversation = Conversation(SimpleNamespace(**{**vars(finished), "template": template.asking(False)}))  # type: ignore[arg-type]
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    for line in (f"/tools {tmp_path}/tools.json", "北京?", "晴 25"):
        assert chat.answer_line(conversation, line)
    assert capsys.readouterr().out.splitlines() == [
        "(tools: get_weather, get_time)",
        '-> get_weather({"city": "北京", "days": 3})',
        "(type the result of get_weather on the next line)",
        "晴, 25 度",
    ]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    assert conversation.turns[2].call_id == conversation.turns[1].tool_calls[0].id
    if family not in ONE_CALL:
        conversation.turns = []
        for line in ("两地?", "晴 25", "晴 19"):
            assert chat.answer_line(conversation, line)
        assert capsys.readouterr().out.splitlines() == [
            '-> get_weather({"city": "北京", "days": 3})',
            '-> get_weather({"city": "上海", "days": 1})',
            "(type the results of get_weather, get_weather on the next 2 lines, in this order)",
            "(type the result of get_weather on the next line)",
            "都是晴天",
        ]
    if family in THINK:
        thinking = Conversation(SimpleNamespace(**{**vars(finished), "template": template.asking(True)}))  # type: ignore[arg-type]
        assert chat.answer_line(thinking, "6*7?")
        assert capsys.readouterr().out.splitlines() == [f"(thinking) {THOUGHT}", "四十二"]
        assert thinking.turns[-1].reasoning == THOUGHT and thinking.turns[-1].content == "四十二"
