"""The chat templates that exports write for our own: transformers alone renders with them what the project's encoder makes."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from glmtuner.cli.export import renders_the_same
from glmtuner.config.paths import ASSETS
from glmtuner.data.records import Message
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer, as_fast
from glmtuner.templates.named import template_named
from glmtuner.templates.tool_calls import ToolCall

OURS = ("glm4", "glm4_0414", "chatglm3", "codegeex4", "glm_edge", "chatglm2")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": '查天气 "now" <or> later & it\'s free',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["北京", "Zürich"]}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
ASKED, TOLD, SYSTEM = Message("user", "你好, x"), Message("assistant", "1\n\n2 = 二"), Message("system", "a. b")
FIRST = ToolCall(
    "get_weather", {"city": "北京 \"a\" 'b'\n", "days": 3, "deep": {"x": [1, None, True, 0.5]}}, "call00001"
)
SECOND = ToolCall("now", {}, "call00002")
RESULT = Message("tool", '{"℃": 21}', call_id="call00001")
PLAIN = [[ASKED], [ASKED, TOLD, ASKED], [SYSTEM, ASKED], [SYSTEM, ASKED, TOLD, ASKED, TOLD, ASKED]]
WITH_TOOLS = [
    [ASKED],
    [SYSTEM, ASKED],
    [ASKED, TOLD, ASKED],
    [ASKED, Message("assistant", "", tool_calls=(FIRST,)), RESULT],
    [ASKED, Message("assistant", "", tool_calls=(FIRST,)), RESULT, TOLD, ASKED],
    [ASKED, Message("assistant", "I look", tool_calls=(FIRST, SECOND)), RESULT, Message("tool", "12:00", call_id="call00002")],
]  # fmt: skip


def as_openai(turn: Message) -> dict[str, Any]:
    calls = {"tool_calls": [call.as_openai() for call in turn.tool_calls]} if turn.tool_calls else {}
    return {"role": turn.role, "content": turn.content, **calls}


@pytest.fixture(scope="module")
def tokenizers(upstream_files: Path) -> dict[str, tuple[Any, Any]]:
    """By template: the tokenizer of the run, and that of the exported folder."""
    tiny = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    second = ChatGLMTokenizer.from_pretrained(upstream_files / "chatglm2_realvocab")
    pairs = {name: (second, as_fast(second)) for name in ("chatglm2", "chatglm3")}
    return {name: pairs.get(name, (tiny, AutoTokenizer.from_pretrained(ASSETS / "tiny_glm"))) for name in OURS}


@pytest.mark.parametrize("name", OURS)
def test_transformers_renders_the_prompts_that_are_trained(tokenizers: dict[str, tuple[Any, Any]], name: str) -> None:
    template = template_named(name, tokenizers[name][0])
    tokenizer, exported = tokenizers[name]
    jinja = template.jinja()
    assert jinja is not None
    exported.chat_template = jinja
    cases: list[tuple[list[Message], list[dict[str, Any]]]] = [
        (turns, []) for turns in PLAIN if name != "chatglm2" or turns[0].role != "system"
    ]
    if template.renders_tools(tokenizer):
        cases += [(turns, tools) for turns in WITH_TOOLS for tools in ([WEATHER], [WEATHER, CLOCK])]
        cases += [([ASKED, TOLD, ASKED], [CLOCK])]
    else:
        assert name in ("codegeex4", "glm_edge", "chatglm2")
    for turns, tools in cases:
        (ours,) = template.encode(tokenizer, [turns], [tools])
        ids = exported.apply_chat_template(
            list(map(as_openai, turns)), tools=tools or None, add_generation_prompt=True, return_dict=True
        ).input_ids
        assert exported.decode(ids) == exported.decode(ours.input_ids), (name, turns)
        assert list(ids) == list(ours.input_ids), (name, turns)


def test_a_template_that_ignores_tools_is_not_the_same(tokenizers: dict[str, tuple[Any, Any]]) -> None:
    """The maker's of GLM-4 renders plain conversations as ours does, and ignores `tools`."""
    template = template_named("glm4", tokenizers["glm4"][0])
    _, exported = tokenizers["glm4"]
    exported.chat_template = template.jinja()
    assert renders_the_same(template, exported)
    exported.chat_template = (
        "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
        "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert not renders_the_same(template, exported)
