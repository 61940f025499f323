"""Rows and served prompts against the official templates, rendered by transformers (../shared/goldens/templates).

Each conversation goes through the project's own encoder, in each mode of data.thinking.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import official_templates
import pytest
from official_templates import MARKUP, MODELS
from transformers.utils.chat_template_utils import render_jinja_template

from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.jinja import TokenizersOwn
from glmtuner.templates.tool_calls import ToolCall

NATIVE = ("glm-4-9b-chat", "glm-4-9b-chat-1m-hf", "glm-z1-9b-0414", "glm-z1-rumination-32b-0414")  # calls are turns
OPENS = {"deepseek-r1-distill": "<think>\n", "glm-z1-9b-0414": "<think>"}  # prompts that open a thought, always
TYPES = ("auto", "empty", "strip")
OTHERWISE = {  # conversations that are not rendered as the official template renders them in the form they are given in
    "content that is null is written as the word None; it is read as empty": {
        "chatglm3-6b": 3, "glm-edge-4b-chat": 3, "glm-4.5": 2, "glm-4.6": 2, "glm-4.7": 2, "glm-4.7-flash": 2, "glm-5": 2,
        "glm-5.1": 2, "glm-5.2": 2, "glm-5.3-flash": 2,
    },
    "arguments that are text are written as a text of JSON inside JSON; they are parsed first": {
        "llama-3.1-instruct": 2, "mistral-7b-instruct-v0.3": 2, "mistral-nemo-instruct-2407": 2, "qwen2.5-instruct": 2,
    },
    "tools or calls in this form are left out; they are given in the form that the template reads": {
        "deepseek-r1-distill": 13, "glm-4-9b-chat": 24, "glm-4-9b-chat-1m-hf": 24, "glm-z1-9b-0414": 16,
        "glm-z1-rumination-32b-0414": 11,
    },
    "GLM-4's form, of which the template leaves out the function's name": {"chatglm3-6b": 6},
    "a call whose text is code, not JSON; such records are refused": {
        "chatglm3-6b": 1, "glm-4-9b-chat": 1, "glm-4-9b-chat-1m-hf": 1, "glm-z1-9b-0414": 1,
        "glm-z1-rumination-32b-0414": 1,
    },
}  # fmt: skip
NO_CONTENT, TEXT_ARGUMENTS, OTHER_FORM, NO_NAME, CODE = OTHERWISE
REASONING = "reasoning_content"


@dataclass(frozen=True)
class Turn:
    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple = ()
    call_id: str = ""


def turns_of(messages: list[dict[str, Any]]) -> list[Turn]:
    """As the records' side makes them: no content is an empty one, and arguments are objects."""
    return [
        Turn(
            message["role"],
            message["content"] or "",
            message.get(REASONING) or "",
            tuple(
                ToolCall(call["function"]["name"], parsed(call["function"]["arguments"]), call.get("id", ""))
                for call in message.get("tool_calls") or ()
            ),
            message.get("tool_call_id", ""),
        )
        for message in messages
    ]


def parsed(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def in_openai_form(case: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation and its tools, of GLM-4's form too, as the records' side makes them; raises ValueError for code."""
    messages, tools = [], []
    for message in case["messages"]:
        tools += message.get("tools", ())
        if "tools" in message and not message["content"]:
            continue
        turn = {key: value for key, value in message.items() if key not in ("tools", "metadata")}
        if "metadata" in message:
            function = {"name": message["metadata"], "arguments": json.loads(message["content"])}
            turn |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
        messages.append(turn | ({"role": "tool"} if turn["role"] == "observation" else {}))
    return messages, [*tools, *case.get("tools", ())]


def as_read(model: str, turns: list[Turn], tools: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The turns in the form that the official template reads, and the tools that stand beside them."""
    if not tools and not any(turn.role == "tool" or turn.tool_calls for turn in turns):
        return as_json(turns), []
    if model == "deepseek-r1-distill":
        read = as_json(turns)
        for turn in read:
            for call in turn.get("tool_calls", ()):
                turn["content"] = None
                call["function"] = {
                    **call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)
                }  # fmt: skip
        return read, tools
    if model not in NATIVE:
        return as_json(turns), tools
    read = []
    for turn in turns:
        if turn.content or not turn.tool_calls:
            role = "observation" if turn.role == "tool" else turn.role
            (text,) = as_json([replace(turn, role=role, tool_calls=())])
            read.append(text)
        for call in turn.tool_calls:
            content = json.dumps(call.arguments, ensure_ascii=False)
            read.append({"role": "assistant", "metadata": call.name, "content": content})
    if "glm-4-" not in model or not tools:
        return read, tools
    system = read.pop(0) if read[0]["role"] == "system" else {"role": "system", "content": ""}
    return [{**system, "tools": tools}, *read], []


@cache
def golden(shared: Path | None, model: str) -> tuple[dict[str, Any], str, Any]:
    template = official_templates.official(shared, model)
    content = json.loads((shared / f"goldens/templates/{model}.json").read_text(encoding="utf-8"))
    return content, template.source, template.tokenizer([])


@pytest.fixture(params=MODELS)
def official(request, shared: Path | None):
    return golden(shared, request.param)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def rendered(source, content, messages, tools, **options) -> str:
    texts, _ = render_jinja_template(
        [messages], tools=tools or None, chat_template=source, **{**content["special_tokens"], **options}
    )
    return texts[0]


def thought_of(turn: Turn) -> str:
    if "</think>" in turn.content and not turn.reasoning.strip():
        return turn.content.split("</think>")[0].split("<think>")[-1].strip("\n")
    return turn.reasoning.strip("\n")


def learned_behind(model: str, prompt: str, full: str, thought: str) -> str | None:
    """What the official rendering puts behind the prompt; None where the system text moves, as Mistral's does."""
    if full.startswith(prompt):
        return full[len(prompt) :]
    base = prompt.rstrip("\n").removesuffix("<think>").rstrip("\n")
    if not full.startswith(base):
        return None
    rest = full[len(base) :].lstrip("\n")
    if rest.startswith("</think>"):
        return rest
    assert prompt.endswith(OPENS[model])
    return f"{thought}\n</think>\n\n{rest}" if model == "deepseek-r1-distill" else f"\n{thought}</think>\n{rest}"


def check(official, turns, tools, options, encoded) -> None:
    """A prompt, or a row: the prompt, what is behind it, and a stop token, by what transformers renders of the turns."""
    content, source, tokenizer = official
    model = content["model"]

    def of(some, *, prompts):
        read, beside = as_read(model, some, tools)
        return rendered(source, content, read, beside, add_generation_prompt=prompts, **options)

    if turns[-1].role != "assistant":
        assert decoded(tokenizer, encoded.input_ids) == of(turns, prompts=True)
        return
    prompt = of(turns[:-1], prompts=True)
    start, end = encoded.answers[-1]
    assert decoded(tokenizer, encoded.input_ids[:start]) == prompt
    behind = learned_behind(model, prompt, of(turns, prompts=False), thought_of(turns[-1]))
    text, stop = decoded(tokenizer, encoded.input_ids[start:end]), decoded(tokenizer, [encoded.stop])
    assert stop in content["stop_tokens"]
    if (
        encoded.unrendered or start == end
    ):  # the template renders nothing of an empty answer, or of one in thought alone
        assert behind is None or not behind.replace(stop, "").strip()
        return
    if behind is None:
        names = [call.name for call in turns[-1].tool_calls]  # Mistral leaves out the text beside them
        assert all(name in text for name in names) if names else text.strip().endswith(turns[-1].content.strip())
    else:
        assert behind.startswith(text) and behind[len(text) :].strip() in ("", stop)
    labels = encoded.labels(every_answer=True)
    assert labels[start : end + 1] == encoded.input_ids[start : end + 1] and len(labels) == end + 1
    assert all(label == IGNORE_INDEX for label in encoded.labels(every_answer=False)[:start])


def difference(case, official, turns, encoded) -> bool:
    """Whether prompt or row differ from the rendering of the conversation in the form in which it is given."""
    _, _, tokenizer = official
    if turns[-1].role != "assistant":
        prompt = decoded(tokenizer, encoded.input_ids)
        exact = case["kwargs"]["add_generation_prompt"]
        return not (prompt == case["rendered"] if exact else prompt.startswith(case["rendered"].rstrip()))
    start, end = encoded.answers[-1]
    if decoded(tokenizer, encoded.input_ids[:start]) != case["prompt_of_last_answer"]:
        return True
    prompt, text = case["prompt_of_last_answer"], decoded(tokenizer, encoded.input_ids[start:end])
    behind = learned_behind(official[0]["model"], prompt, case["rendered"], thought_of(turns[-1]))
    if behind is None:  # the full rendering does not continue the prompt
        return bool(turns[-1].tool_calls) and not encoded.unrendered
    stop = decoded(tokenizer, [encoded.stop])
    return not (behind.startswith(text) and behind[len(text) :].strip() in ("", stop))


def reason(case, model) -> str:
    """Why a conversation is rendered otherwise than the official template renders it in the form in which it is given."""
    calls = [call["function"] for message in case["messages"] for call in message.get("tool_calls") or ()]
    native = any({"metadata", "tools"} & {*message} for message in case["messages"])
    if model in (*NATIVE, "deepseek-r1-distill"):
        return OTHER_FORM
    if native:
        return NO_NAME
    if any(message["content"] is None for message in case["messages"]) and "None" in case["rendered"]:
        return NO_CONTENT
    assert any(isinstance(function["arguments"], str) for function in calls), case["name"]
    return TEXT_ARGUMENTS


def options_of(case) -> dict[str, Any]:
    return {name: value for name, value in case["kwargs"].items() if name != "add_generation_prompt"}


def test_rows_are_the_official_prompt_and_what_stands_behind_it(official):
    """Every conversation behind the prompt of the golden file's own mode, as a run encodes it; what differs is listed."""
    content, source, tokenizer = official
    model, found, refused = content["model"], Counter(), 0
    for case in content["cases"]:
        template = TokenizersOwn(source=source, thinking="empty", options=options_of(case), fitting=True)
        try:
            messages, tools = in_openai_form(case)
        except ValueError:
            found[CODE] += 1
            continue
        turns = turns_of(messages)
        try:
            (encoded,) = template.encode(tokenizer, [turns], [tools])
        except ConfigError as error:
            assert "refuses these turns" in str(error) and "error" in case, case["name"]
            refused += 1
            continue
        check(official, turns, tools, {"enable_thinking": True, **options_of(case)}, encoded)
        if "error" not in case and difference(case, official, turns, encoded):
            found[reason(case, model)] += 1
    assert found == {why: models[model] for why, models in OTHERWISE.items() if model in models}
    assert refused == {"llama-3.1-instruct": 4, "mistral-7b-instruct-v0.3": 4, "mistral-nemo-instruct-2407": 4}.get(
        model, 0
    )


@pytest.mark.parametrize("thinking", TYPES)
def test_rows_of_each_mode_of_data_thinking(official, thinking):
    content, source, tokenizer = official
    for case in content["cases"]:
        options = {name: value for name, value in options_of(case).items() if name != "enable_thinking"}
        template = TokenizersOwn(source=source, thinking=thinking, options=options, fitting=True)
        try:
            messages, tools = in_openai_form(case)
            turns = turns_of(messages)
            (encoded,) = template.encode(tokenizer, [turns], [tools])
        except (ValueError, ConfigError):
            continue  # counted above
        if thinking == "strip":
            turns = [stripped(turn) if turn.role == "assistant" else turn for turn in turns]
        on = thinking == "empty" or (turns[-1].role == "assistant" and bool(thought_of(turns[-1]).strip()))
        asked = turns[-1].role != "assistant"
        mode = {} if asked and thinking == "auto" else {"enable_thinking": on}
        check(official, turns, tools, mode | options, encoded)
        if not asked:
            assert encoded.thinking is (on if "enable_thinking" in source else None), case["name"]


ASKS = (
    "hi",
    "  spaced \n",
    "a\n\nb",
    "<|user|> x",
    '2 < 3 & "q"',
    "</s>",
    "日本 <|im_end|>",
    "<think>",
    "a<tool_call>b",
    "é\u0301",
)
SAYS = ("ok", "好的。", "\n\n lead", "trail \n", '{"k": [1]}', "<|assistant|> word", "with ] and [/INST]")
THOUGHTS = ("because", "想一想", "\nline\n", "  pad  ", "a\n\nb")
ARGUMENTS = (
    {},
    {"city": "北京"},
    {"a": 1, "b": [1, "x"], "c": {"d": None}},
    {"q": 'say "hi"\n'},
    {"f": 1.5, "t": True},
)


def random_turns(rng: Random) -> tuple[list[Turn], list[Any]]:
    turns = [Turn("system", rng.choice(ASKS))] if rng.random() < 0.4 else []
    described = [
        WEATHER,
        {"type": "function", "function": {"name": "f2", "description": "<b> & 'x'", "parameters": {}}},
    ]
    tools = rng.choice([[], described[:1], described])
    for _ in range(rng.randint(1, 3)):
        turns.append(Turn("user", rng.choice(ASKS)))
        while tools and rng.random() < 0.4:
            names = [rng.choice(tools)["function"]["name"] for _ in range(rng.randint(1, 2))]
            calls = tuple(ToolCall(name, rng.choice(ARGUMENTS), f"call0000{at}") for at, name in enumerate(names))
            turns.append(Turn("assistant", rng.choice(["", *SAYS]), rng.choice(["", *THOUGHTS]), calls))
            if rng.random() < 0.1:
                return turns, tools
            turns += [Turn("tool", rng.choice(ASKS), call_id=call.id) for call in calls]
        if rng.random() < 0.15:
            return turns, tools
        thought, said = rng.choice(["", "", *THOUGHTS]), rng.choice(SAYS)
        in_tags = thought and rng.random() < 0.4
        turns.append(
            Turn("assistant", f"<think>{thought}</think>\n\n{said}" if in_tags else said, "" if in_tags else thought)
        )
    return turns, tools


def test_random_conversations_in_random_modes(official):
    content, source, tokenizer = official
    rng = Random(18)
    for _ in range(40):
        turns, tools = random_turns(rng)
        thinking = rng.choice(TYPES)
        options = rng.choice([{}, {"clear_thinking": False}, {"reasoning_effort": "high"}])
        options = {name: value for name, value in options.items() if name in source}
        template = TokenizersOwn(source=source, thinking=thinking, options=options, fitting=True)
        try:
            (encoded,) = template.encode(tokenizer, [turns], [tools])
        except ConfigError as error:
            assert content["model"] == "llama-3.1-instruct" and "single tool-calls" in str(error)
            continue
        if thinking == "strip":
            turns = [stripped(turn) if turn.role == "assistant" else turn for turn in turns]
        asked = turns[-1].role != "assistant"
        on = thinking == "empty" or (not asked and bool(thought_of(turns[-1]).strip()))
        mode = {} if asked and thinking == "auto" else {"enable_thinking": on}
        check(official, turns, tools, mode | options, encoded)


def stripped(turn: Turn) -> Turn:
    content = turn.content.split("</think>", 1)[-1].lstrip("\n") if "</think>" in turn.content else turn.content
    return replace(turn, content=content, reasoning="")


@pytest.mark.parametrize("model", [*NATIVE, "deepseek-r1-distill"])
def test_as_openai_writes_them_tools_are_what_the_template_makes_of_them(shared: Path | None, model):
    """Without the form that it reads, a template leaves out what it leaves out for everybody."""
    content, source, tokenizer = official = golden(shared, model)
    for case in content["cases"]:
        if any({"metadata", "tools"} & {*message} for message in case["messages"]) or "error" in case:
            continue
        template = TokenizersOwn(source=source, thinking="empty", options=options_of(case))
        turns = turns_of(case["messages"])
        (encoded,) = template.encode(tokenizer, [turns], [case.get("tools", [])])
        arguments = [
            call["function"]["arguments"] for turn in case["messages"] for call in turn.get("tool_calls") or ()
        ]
        assert not difference(case, official, turns, encoded) or any(isinstance(each, str) for each in arguments)


def test_answers_of_a_conversation_are_learned_as_each_would_be_alone(official):
    """In the same row, where its prompt continues; else in a row of their own. Labels are the model's stop token."""
    _, source, tokenizer = official
    template = TokenizersOwn(source=source)
    messages = [
        Turn("user", "a?"),
        Turn("assistant", "Paris"),
        Turn("user", "b?"),
        Turn("assistant", "b b"),
        Turn("user", "c"),
        Turn("assistant", "ccc"),
    ]
    (whole,) = template.encode(tokenizer, [messages])
    found = {}
    for turn in sorted(whole.outside):
        (part,) = template.encode(tokenizer, [messages[: turn + 1]])
        found[turn] = part
    inside = [turn for turn in (1, 3, 5) if turn not in whole.outside]
    assert len(inside) == len(whole.answers)
    for turn, (start, end) in zip(inside, whole.answers, strict=True):
        (alone,) = template.encode(tokenizer, [messages[: turn + 1]])
        assert whole.input_ids[:end] == alone.input_ids[:-1]
        assert whole.labels(every_answer=True)[start : end + 1] == alone.labels(every_answer=False)[start:]
    assert {*inside, *found} == {1, 3, 5}


@pytest.mark.parametrize(
    "literal", ["<think>", "</think>", "<tool_call>", "<|user|>", "<|im_end|>", "</s>", "[/INST]", "<|eot_id|>"]
)
def test_what_users_write_is_text(official, literal):
    _, source, tokenizer = official
    added = set(tokenizer.added_tokens_decoder)
    template = TokenizersOwn(source=source)

    def controls(word, answer):
        (encoded,) = template.encode(
            tokenizer, [[Turn("user", f"What is x{word}y?"), Turn("assistant", f"It is {answer}.")]]
        )
        text = decoded(tokenizer, encoded.input_ids)
        assert f"x{word}y" in text
        return [token for token in encoded.input_ids if token in added]

    assert controls(literal, "text") == controls("plain", "text")
    if not MARKUP.fullmatch(literal):
        assert controls("plain", literal) == controls("plain", "text")


STOPS = {  # of answers and of tool calls, by their makers: see the files' stop_tokens
    "glm-4.5": ("<|user|>", "<|observation|>"),
    "glm-4.7": ("<|user|>", "<|observation|>"),
    "glm-5.3-flash": ("<|user|>", "<|observation|>"),
    "glm-4-9b-chat": ("<|user|>", "<|user|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama-3.1-instruct": ("<|eot_id|>", "<|eot_id|>"),
    "mistral-7b-instruct-v0.3": ("</s>", "</s>"),
    "deepseek-r1-distill": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


SYNTAX = {  # in which a template writes calls; None where it writes none
    "chatglm3-6b": None, "glm-edge-4b-chat": None, "deepseek-r1-distill": "deepseek", "glm-4-9b-chat": "glm4",
    "glm-4-9b-chat-1m-hf": "glm4", "glm-z1-9b-0414": "glm4", "glm-z1-rumination-32b-0414": "glm4", "glm-4.5": "glm4.5",
    "glm-4.6": "glm4.5", "glm-4.7": "glm4.7", "glm-4.7-flash": "glm4.7", "glm-5": "glm4.7", "glm-5.1": "glm4.7",
    "glm-5.2": "glm4.7", "glm-5.3-flash": "glm4.7", "llama-3.1-instruct": "llama3", "mistral-7b-instruct-v0.3": "mistral",
    "mistral-nemo-instruct-2407": "mistral_nemo", "qwen2.5-instruct": "hermes", "qwen3": "hermes",
    "qwen3-instruct-2507": "hermes",
}  # fmt: skip


def test_the_syntax_of_calls_is_read_off_the_template(official):
    content, source, tokenizer = official
    found = TokenizersOwn(source=source, fitting=True).syntax(tokenizer)
    assert (found and found.name) == SYNTAX[content["model"]]
    literal = TokenizersOwn(source=source).syntax(tokenizer)  # in OpenAI's form alone
    assert literal == (None if content["model"] in (*NATIVE, "deepseek-r1-distill") else found)


@pytest.mark.parametrize("model", STOPS)
def test_the_stops_of_answers_and_calls(shared: Path | None, model):
    content, source, tokenizer = golden(shared, model)
    template = TokenizersOwn(source=source)
    ids = {tokenizer.convert_tokens_to_ids(stop) for stop in STOPS[model]}
    assert template.stop_ids(tokenizer) == ids
    if not template.renders_tools(tokenizer):
        assert model in ("glm-4-9b-chat", "deepseek-r1-distill")
        return
    call = Turn("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Paris"}, "call00001"),))
    messages = [
        Turn("user", "Paris?"),
        call,
        Turn("tool", "sunny", call_id="call00001"),
        Turn("assistant", "Sunny."),
    ]
    for end, stop in ((2, STOPS[model][1]), (4, STOPS[model][0])):
        (encoded,) = template.encode(tokenizer, [messages[:end]], [[WEATHER]])
        assert decoded(tokenizer, [encoded.stop]) == stop
        start, _ = encoded.answers[-1]
        assert ("get_weather" if end == 2 else "Sunny.") in decoded(tokenizer, encoded.input_ids[start:])
        learned = decoded(tokenizer, [label for label in encoded.labels(every_answer=True) if label != IGNORE_INDEX])
        assert "sunny" not in learned and "Paris?" not in learned
        assert decoded(tokenizer, encoded.input_ids[:start]) == rendered(
            source, content, as_json(messages[: end - 1]), [WEATHER], add_generation_prompt=True, enable_thinking=False
        )


def as_json(turns: list[Turn]) -> list[dict[str, Any]]:
    """The turns as OpenAI writes them."""
    return [
        {
            "role": turn.role,
            "content": turn.content,
            **({REASONING: turn.reasoning} if turn.reasoning else {}),
            **({"tool_calls": [call.as_openai() for call in turn.tool_calls]} if turn.tool_calls else {}),
            **({"tool_call_id": turn.call_id} if turn.call_id else {}),
        }
        for turn in turns
    ]
