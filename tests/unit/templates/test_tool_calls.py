"""Tool calls: read from, and written as, texts that official templates rendered; anything else is text."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtuner.errors import UnknownName
from glmtuner.templates.answers import AnswerReader, Delta, read_answer
from glmtuner.templates.tool_calls import SYNTAXES, ToolCall, syntax

OFFICIAL = Path(__file__).parents[4] / "shared/goldens/templates"
OF_MODEL = {
    "deepseek-r1-distill": "deepseek",
    "glm-4-9b-chat": "glm4",
    "glm-4-9b-chat-1m-hf": "glm4",
    "glm-4.5": "glm4.5",
    "glm-4.6": "glm4.5",
    "glm-4.7": "glm4.7",
    "glm-4.7-flash": "glm4.7",
    "glm-5": "glm4.7",
    "glm-5.1": "glm4.7",
    "glm-5.2": "glm4.7",
    "glm-5.3-flash": "glm4.7",
    "glm-z1-9b-0414": "glm4",
    "llama-3.1-instruct": "llama3",
    "mistral-7b-instruct-v0.3": "mistral",
    "mistral-nemo-instruct-2407": "mistral_nemo",
    "qwen2.5-instruct": "hermes",
    "qwen3": "hermes",
    "qwen3-instruct-2507": "hermes",
}
STOPS = ("<|im_end|>\n", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "maybe": {"type": ["string", "null"]},
                "filter": {"type": "object"},
            },
        },
    },
}


@pytest.fixture
def model(request, shared):
    if shared is None:
        pytest.skip(f"needs the template and renderings of {request.param} in ../shared/goldens/templates")
    return request.param


@cache
def golden(model):
    path = OFFICIAL / f"{model}.json"
    return json.loads(path.read_text(encoding="utf-8")), (OFFICIAL / f"{model}.jinja").read_text(encoding="utf-8")


def arguments_of(call):
    arguments = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def without_stop(text):
    for stop in STOPS:
        text = text.removesuffix(stop)
    return text


def rendered_answers(model):
    """(name, text behind the prompt without its stop, the prompt, the last answer's record, its tools)."""
    for case in golden(model)[0]["cases"]:
        text, messages = case.get("text_behind_prompt"), case["messages"]
        tools = case.get("tools") or [tool for turn in messages for tool in turn.get("tools", ())]
        if text and (tools or "tool" in json.dumps(messages)):
            yield case["name"], without_stop(text), case["prompt_of_last_answer"], messages[-1], tools


def rendered_calls(model):
    """As rendered_answers, of every turn with calls, rendered here by transformers with the official template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    data, jinja = golden(model)
    for case in data["cases"]:
        for end, turn in enumerate(case["messages"], 1):
            if not (turn.get("tool_calls") or turn.get("metadata")) or turn["content"] is None:
                continue
            messages = case["messages"][:end]
            keys = {"chat_template": jinja, "tools": case.get("tools"), **data["special_tokens"]}
            for options in ({}, {"enable_thinking": False}):
                try:
                    (prompt,), _ = render_jinja_template([messages[:-1]], add_generation_prompt=True, **keys, **options)
                    (full,), _ = render_jinja_template([messages], **keys, **options)
                except Exception:  # string arguments, parallel calls: whatever the template's author chose to refuse
                    break
                if full.startswith(prompt):
                    tools = case.get("tools") or [tool for each in messages for tool in each.get("tools", ())]
                    yield case["name"], without_stop(full[len(prompt) :]), prompt, turn, tools
                    break


def expected_of(model, turn):
    """The calls and the text of an answer's record, as its template renders them."""
    content = (turn.get("content") or "").strip()
    if "<think>" in golden(model)[1]:
        content = content.rpartition("</think>")[2].strip()
    if turn.get("metadata") == "python":  # code of an interpreter, which is no function
        return [], f"python\n{content}"
    if turn.get("metadata"):  # GLM-4's own form
        return [(turn["metadata"], json.loads(turn["content"]))], ""
    calls = [(call["function"]["name"], arguments_of(call)) for call in turn.get("tool_calls") or ()]
    if OF_MODEL[model] == "glm4":  # its template does not read tool_calls
        return [], content
    return calls, "" if calls and OF_MODEL[model] in ("llama3", "mistral", "mistral_nemo") else content  # text vanishes


def read_in_pieces(text, length, *shape, **options):
    reader = AnswerReader(*shape, **options)
    pieces = [reader.feed(text[start : start + length]) for start in range(0, len(text), length)]
    return sum([*pieces, reader.finish()], Delta())


CALLS_RENDERED = {  # in the goldens' conversations, behind a prompt that they continue
    "glm-4-9b-chat": 7, "glm-4-9b-chat-1m-hf": 7, "glm-4.5": 27, "glm-4.6": 27, "glm-4.7": 28, "glm-4.7-flash": 28, "glm-5": 28,
    "glm-5.1": 31, "glm-5.2": 31, "glm-5.3-flash": 31, "llama-3.1-instruct": 15, "mistral-7b-instruct-v0.3": 22,
    "mistral-nemo-instruct-2407": 22, "qwen2.5-instruct": 23, "qwen3": 29, "qwen3-instruct-2507": 23,
}  # fmt: skip


@pytest.mark.parametrize("model", CALLS_RENDERED, indirect=True)
def test_rendered_answers_give_back_the_records_calls(model):
    family, num_calls = SYNTAXES[OF_MODEL[model]], 0
    for name, text, prompt, turn, tools in [*rendered_answers(model), *rendered_calls(model)]:
        thoughts = {"thinks": "<think>" in golden(model)[1], "in_thought": prompt.rstrip().endswith("<think>")}
        read = read_answer(text, family, tools, **thoughts)
        calls, content = expected_of(model, turn)
        assert [(call.name, call.arguments) for call in read.calls] == calls, (name, text)
        if turn.get("content", "") is not None:  # of null some templates make the word None
            assert read.content.strip() == content, (name, text)
        if turn.get("reasoning_content") and turn["reasoning_content"].strip() in text:
            assert read.reasoning == turn["reasoning_content"].strip(), (name, text)
        assert all(json.loads(call.arguments_json) == call.arguments for call in read.calls)
        if model.startswith("mistral"):
            assert [call.id for call in read.calls] == [call["id"] for call in turn.get("tool_calls") or ()]
        for length in (1, 2, 5, 11):
            assert read_in_pieces(text, length, family, tools, **thoughts) == read, (name, length)
        num_calls += len(read.calls)
    assert num_calls == CALLS_RENDERED[model]


@pytest.mark.parametrize("model", CALLS_RENDERED, indirect=True)
def test_calls_are_written_as_official_templates_write_them(model):
    family = SYNTAXES[OF_MODEL[model]]
    for name, text, _, turn, _ in rendered_calls(model):
        if OF_MODEL[model] == "glm4" and turn.get("tool_calls"):
            continue
        if any(isinstance(call["function"]["arguments"], str) for call in turn.get("tool_calls") or ()):
            continue
        if turn.get("metadata") == "python":
            continue
        if turn.get("metadata"):
            calls, content = [ToolCall(turn["metadata"], json.loads(turn["content"]))], ""
        else:
            given = [(call["function"], call["id"]) for call in turn["tool_calls"]]
            calls = [ToolCall(call["name"], call["arguments"], call_id) for call, call_id in given]
            content = turn["content"].rpartition("</think>")[2].lstrip("\n")
        _, end, behind = text.rpartition("</think>")
        written = family.write(content, calls)
        assert (written if not end else written.lstrip("\n")) == behind.lstrip("\n" if end else ""), name


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(max_size=6))
MARKUP = sorted(
    {text for each in SYNTAXES.values() for text in (each.opening, each.closing, each.separator) if text}
    | {
        "<think>",
        "</think>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "look_up",
        "\n",
        " ",
        "{",
        "}",
        '"',
    }
    | {'{"name": "look_up", "arguments": {}}', "tool_call(text='a')", "```python\n", "```", "[", "]", "<|python_tag|>"}
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=5)), max_size=12), st.integers(1, 9), st.booleans())
def test_no_text_raises_and_none_depends_on_how_it_is_cut(parts, length, thinks):
    text = "".join(parts)
    for family in (None, *SYNTAXES.values()):
        whole = read_answer(text, family, [TOOL], thinks=thinks)
        assert read_in_pieces(text, length, family, [TOOL], thinks=thinks) == whole
        for call in whole.calls:
            json.loads(call.arguments_json.encode())
        if not whole.calls and not whole.reasoning and "<think>" not in text:
            kept = (
                text.replace(family.separator, "") if family and family.separator else text
            )  # a control token is no text
            assert whole.content.strip() == kept.strip()  # nothing is invented, and nothing lost


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["text", "count", "filter"]), SCALARS, max_size=3), st.sampled_from([*SYNTAXES]))
def test_calls_that_are_written_are_read_back(drawn, name):
    arguments = {key: value for key, value in drawn.items() if isinstance(value, str) == (key == "text")}
    if any("<" in str(value) for value in arguments.values()):
        return
    call = ToolCall("look_up", arguments)
    calls = [call, call] if SYNTAXES[name].parallel else [call]
    read = read_answer(SYNTAXES[name].write("", calls), SYNTAXES[name], [TOOL])
    assert [each.arguments for each in read.calls] == [arguments] * len(calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("glm4", "look_up\n{broken"),
        ("glm4", "other\n{}"),
        ("glm4.5", "<tool_call>look_up\n<arg_key>text</arg_key>\n</tool_call>"),
        ("glm4.7", "<tool_call>look_up<arg_key>text</arg_key><arg_value>cut"),
        ("hermes", '<tool_call>\n{"name": "look_up", "arguments": [1]}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "look_up", "arguments": {"text": "\\ud800"}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "look_up", "arguments": {"count": NaN}}\n</tool_call>'),
        ("llama3", '{"name": "other", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS] [{}]"),
    ],
)
def test_malformed_calls_come_back_as_text(name, text):
    assert read_answer(text, syntax(name), [TOOL]) == Delta(content=text)


def test_an_unknown_syntax():
    with pytest.raises(UnknownName, match="no syntax of tool calls named 'glm5'"):
        syntax("glm5")
