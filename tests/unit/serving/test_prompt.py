"""The prompt of a request, and how an answer begins that has to be a call: as official templates write both."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from official_templates import MODELS, official

from glmtuner.serving.prompt import Prompt, prompt_of, tools_of, turns_of
from glmtuner.serving.protocol import ApiError, parse_request
from glmtuner.templates.jinja import TokenizersOwn

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("get", "get_weather", "name", "查询")
]
CALL_ID = "call00001"
WITHOUT_DESCRIPTIONS = {"chatglm3-6b", "deepseek-r1-distill", "glm-edge-4b-chat", "glm-z1-rumination-32b-0414"}
OWN_FORM = {"glm-4-9b-chat", "glm-4-9b-chat-1m-hf", "glm-z1-9b-0414"}  # not OpenAI's: a name in `metadata`


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, shared: Path | None) -> tuple[Any, Any]:
    """An official template, and what stands for a loaded run with it."""
    template = official(shared, request.param)
    tokenizer = template.tokenizer([json.dumps(TOOLS, ensure_ascii=False)])
    return template, SimpleNamespace(template=TokenizersOwn(source=template.source, fitting=True), tokenizer=tokenizer)


def asked(finished: Any, **fields: Any) -> Prompt:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, **fields}
    chat = parse_request(json.dumps(body).encode(), 100)
    return prompt_of(chat, turns_of(chat), tools_of(chat), finished)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("arguments", [{}, {"city": "a"}, {"days": 3, "b": None}])
def test_an_answer_that_has_to_be_a_call_begins_as_official_calls_do(
    model: tuple[Any, Any], thinking: bool | None, arguments: dict[str, Any]
) -> None:
    template, finished = model
    if template.name in WITHOUT_DESCRIPTIONS:
        with pytest.raises(ApiError, match="renders no descriptions of tools"):
            asked(finished)
        return
    has_modes = "enable_thinking" in template.source
    if thinking is not None and not has_modes:
        with pytest.raises(ApiError, match="no modes"):
            asked(finished, chat_template_kwargs={"enable_thinking": thinking})
        return
    options = {"chat_template_kwargs": {"enable_thinking": thinking}} if thinking is not None else {}
    every = asked(finished, tool_choice="required", **options)
    found = []
    for tool in TOOLS:
        function: Any = tool["function"]
        one = asked(finished, tool_choice={"type": "function", "function": {"name": function["name"]}}, **options)
        assert one.ids == every.ids and not one.parallel and every.parallel
        found += one.begins
        if template.name in OWN_FORM:
            begin = finished.tokenizer.decode(one.begins[0])
            assert (
                begin.endswith(f"{function['name']}\n")
                and begin.removeprefix("\n</think>\n") == f"{function['name']}\n"
            )
            continue
        call = {"id": CALL_ID, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        mode = {"enable_thinking": bool(thinking)} if has_modes else {}
        prompt = template.render(messages[:1], TOOLS, add_generation_prompt=True, **mode)
        whole = template.render(messages, TOOLS, add_generation_prompt=False, **mode)
        assert finished.tokenizer.decode(one.ids) == prompt
        if not whole.startswith(prompt):  # GLM-4.7's, whose prompt opens a thought, and its rendering has none
            assert prompt.endswith("<think>")
            whole = prompt + whole[len(prompt.removesuffix("<think>")) :].removeprefix("<think>")
        behind = whole[len(prompt) :]
        fitting = [begin for begin in one.begins if behind.startswith(finished.tokenizer.decode(list(begin)))]
        assert len(fitting) == 1 and function["name"] in finished.tokenizer.decode(list(fitting[0])), behind
    assert [*every.begins] == found
    for begin in found:  # none is the beginning of another function's
        assert sum(other[: len(begin)] == begin for other in found) == 1


def test_tools_are_not_shown_where_none_is_to_be_called(model: tuple[Any, Any]) -> None:
    template, finished = model
    mode = {"enable_thinking": False} if "enable_thinking" in template.source else {}
    options = {"chat_template_kwargs": mode} if mode else {}
    prompt = asked(finished, tool_choice="none", **options)
    turns = [{"role": "user", "content": "hi"}]
    assert finished.tokenizer.decode(prompt.ids) == template.render(turns, add_generation_prompt=True, **mode)
    assert prompt.syntax is None and not prompt.begins
