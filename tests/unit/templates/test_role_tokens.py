"""Our templates of GLM-4-0414, CodeGeeX4 and GLM-Edge, against the makers' texts and the real tokenizer of GLM-4-9B."""

import base64
import json

import pytest
from official_templates import official
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from glmtuner.config.paths import ASSETS
from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.templates.answers import read_answer
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.tool_calls import ToolCall

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 <of> a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
OTHER = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
CALLS = (ToolCall("weather", {"city": "北京"}), ToolCall("weather", {"city": "上海", "days": 2}))
ASK, TOLD = Message("user", "你好"), Message("assistant", "a\n\nb")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


class Published:
    """The published tokenizer of GLM-4-9B: tiktoken's BPE with its ranks and pattern."""

    def __init__(self, folder, golden) -> None:
        tiktoken = pytest.importorskip("tiktoken")
        lines = (folder / "tokenizer.model").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        self.special = golden["special_tokens"]
        self.bpe = tiktoken.Encoding(
            "glm4", pat_str=golden["pattern"], mergeable_ranks=ranks, special_tokens=self.special
        )
        self.unk_token = self.unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return self.special[token]

    def __call__(self, texts, **_):
        return type("Ids", (), {"input_ids": [self.bpe.encode(text, disallowed_special=()) for text in texts]})


@pytest.fixture
def published(shared, monkeypatch):
    if shared is None:
        pytest.skip("needs the tokenizer of GLM-4-9B in ../shared/goldens/tokenizer_glm4")
    folder = shared / "goldens/tokenizer_glm4"
    golden = json.loads((folder / "tokenizer_golden.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("glmtuner.templates.base.encode_text", lambda tokenizer, texts: tokenizer(texts).input_ids)
    return Published(folder, golden), golden


@pytest.mark.parametrize("name", ["glm4", "glm4_0414"])
def test_glm4_gives_the_ids_of_the_published_tokenizer(published, name):
    """Role tokens, line breaks and texts are encoded apart, as the maker's tokenizer does; an answer begins with its line break."""
    tokenizer, golden = published
    for chat in golden["chats"]:
        turns = [
            Message(
                {"observation": "tool"}.get(turn["role"], turn["role"]),
                "" if turn.get("metadata") else turn["content"],
                tool_calls=(ToolCall(turn["metadata"], json.loads(turn["content"])),) if turn.get("metadata") else (),
            )
            for turn in chat["messages"]
        ]
        (encoded,) = TEMPLATES[name].encode(tokenizer, [turns])
        ids = list(encoded.input_ids)
        assert (ids if chat["add_generation_prompt"] else ids[:-1]) == chat["ids"]
    for text in golden["texts"]:
        (encoded,) = TEMPLATES[name].encode(tokenizer, [[Message("user", text["text"])]])
        turn = [151336, *tokenizer(["\n"]).input_ids[0], *text["ids"]] if text["text"] else []
        assert encoded.input_ids == [151331, 151333, *turn, 151337]


def test_glm4_learns_calls_and_stops_at_the_observation(published):
    tokenizer, _ = published
    called = Message("assistant", "好。", tool_calls=CALLS)
    messages = [ASK, called, Message("tool", "晴"), Message("tool", "雨"), TOLD, ASK, called._replace(content="")]
    (encoded,) = TEMPLATES["glm4"].encode(tokenizer, [messages], [[TOOL]])
    labels = encoded.labels(every_answer=True)
    runs, before = [], IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            runs = [*runs, []] if before == IGNORE_INDEX else runs
            runs[-1].append(label)
        before = label
    call = 'weather\n{"city": "北京"}<|assistant|>weather\n{"city": "上海", "days": 2}<|observation|>'
    texts = [tokenizer.bpe.decode(run) for run in runs]
    assert texts == [f"\n好。<|assistant|>{call}", "\na\n\nb<|user|>", call]
    assert tokenizer.bpe.decode(list(encoded.input_ids)).count("晴") == 1
    assert TEMPLATES["glm4"].stop_ids(tokenizer) == {151336, 151338}
    assert (
        read_answer(texts[0].removesuffix("<|observation|>"), TEMPLATES["glm4"].syntax(tokenizer), [TOOL]).calls
        == CALLS
    )


@pytest.mark.parametrize("model", ["glm-4-9b-chat-1m-hf", "glm-4-9b-chat"])
def test_glm4_describes_tools_as_the_official_template(shared, model):
    """GLM-4's two templates differ in one word, the model's name."""
    source = official(shared, model).source
    for system in ([], [Message("system", "你是出行助手。")]):
        for tools in ([TOOL], [TOOL, OTHER]):
            turn = {"role": "system", "content": system[0].content if system else "", "tools": tools}
            read = [turn, {"role": "user", "content": ASK.content}]
            (text,), _ = render_jinja_template([read], chat_template=source, add_generation_prompt=True)
            ours = "".join(piece.text for piece in TEMPLATES["glm4"].pieces([*system, ASK], tools))
            assert ours == text.replace("名为 ChatGLM 的", "名为 GLM-4 的")


def test_glm4_0414_has_the_heading_alone_before_the_functions():
    """As the maker's instructions for calls of functions have it: README of GLM-4-0414."""
    ours = "".join(piece.text for piece in TEMPLATES["glm4_0414"].pieces([ASK], [TOOL, OTHER]))
    head, first, second = ours.split("\n\n## ")
    assert head == "[gMASK]<sop><|system|>\n# 可用工具"
    use_json = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    assert first == f"weather\n\n{json.dumps(TOOL['function'], indent=4, ensure_ascii=False)}\n{use_json}"
    assert second.endswith(f"{use_json}<|user|>\n你好<|assistant|>")


@pytest.mark.parametrize("name", ["glm4", "glm4_0414", "chatglm3"])
def test_the_jinja_of_a_template_renders_tools_the_same(name):
    template = TEMPLATES[name]
    messages = [
        Message("system", "S"),
        ASK,
        Message(
            "assistant",
            "t",
            tool_calls=(*CALLS, ToolCall("weather", {"city": 'it\'s "x"', "list": ["a", {"b": None}]})),
        ),
        Message("tool", "r1"),
        Message("tool", "r2"),
        Message("tool", "r3"),
        TOLD,
    ]
    for first in (0, 1):
        for end in (2, 3, 6, 7):
            turns = messages[first:end]
            read = [
                {"role": turn.role, "content": turn.content}
                | ({"tool_calls": [call.as_openai() for call in turn.tool_calls]} if turn.tool_calls else {})
                for turn in turns
            ]
            asked = turns[-1].role != "assistant"
            (text,), _ = render_jinja_template(
                [read], tools=[TOOL, OTHER], chat_template=template.jinja(), add_generation_prompt=asked
            )
            ours = "".join(piece.text for piece in template.pieces(turns, [TOOL, OTHER]))
            if template.spaced:  # the space is the one that sentencepiece puts before a text
                text, ours = (each.replace("\n ", "\n").replace("<sop>", "sop") for each in (text, ours))
            assert text == ours


def test_the_jinja_of_glm4_reads_the_maker_s_own_form_too(shared):
    """Every official conversation without tools in OpenAI's form, which the maker's template does not read."""
    if shared is None:
        pytest.skip("needs the renderings of glm-4-9b-chat-1m-hf in ../shared/goldens/templates")
    golden = json.loads((shared / "goldens/templates/glm-4-9b-chat-1m-hf.json").read_text(encoding="utf-8"))
    tried = 0
    for case in golden["cases"]:
        messages = case["messages"]
        if "tools" in case or any("tool_calls" in turn or turn["role"] == "tool" for turn in messages):
            continue
        (text,), _ = render_jinja_template([messages], chat_template=TEMPLATES["glm4"].jinja(), **case["kwargs"])
        assert text == case["rendered"], case["name"]
        tried += any({"metadata", "tools"} & {*turn} for turn in messages)
    assert tried == 6


def test_a_tool_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="a tool without a name"):
        TEMPLATES["glm4"].pieces([ASK], [{"type": "python"}])


def test_glm_edge_has_no_prefix_and_ends_its_prompt_in_a_line_break(shared, tokenizer):
    messages = [Message("system", "s"), ASK, TOLD, ASK]
    (encoded,) = TEMPLATES["glm_edge"].encode(tokenizer, [messages])
    text = "<|system|>\ns<|user|>\n你好<|assistant|>\na\n\nb<|user|>\n你好<|assistant|>\n"
    assert tokenizer.decode(encoded.input_ids) == text
    if shared is not None:  # the official template
        source = official(shared, "glm-edge-4b-chat").source
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        assert render_jinja_template([turns], chat_template=source, add_generation_prompt=True)[0][0] == text


def test_codegeex4_has_a_system_text_of_its_own():
    """That of the maker's guide for chat (THUDM/CodeGeeX4, guides/System_prompt_guideline.md)."""
    template = TEMPLATES["codegeex4"]
    system = (
        "你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
        "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
    )
    text = "".join(piece.text for piece in template.pieces([ASK]))
    assert text == f"[gMASK]<sop><|system|>\n{system}<|user|>\n你好<|assistant|>\n"
    other = "".join(piece.text for piece in template.pieces([Message("system", "s"), ASK]))
    assert other == "[gMASK]<sop><|system|>\ns<|user|>\n你好<|assistant|>\n"


@pytest.mark.parametrize("name", ["glm4", "glm4_0414", "codegeex4", "glm_edge"])
def test_the_jinja_of_a_template_renders_the_same(name):
    template = TEMPLATES[name]
    for messages in ([ASK], [Message("system", "s"), ASK, TOLD, ASK], [ASK, TOLD]):
        asked = messages[-1].role == "user"
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        (text,), _ = render_jinja_template([turns], chat_template=template.jinja(), add_generation_prompt=asked)
        assert text == "".join(piece.text for piece in template.pieces(messages))


def test_empty_turns_of_glm4_0414_are_left_out(tokenizer):
    template = TEMPLATES["glm4_0414"]
    empty = Message("assistant", "", learned=False)
    (encoded,) = template.encode(tokenizer, [[Message("system", ""), ASK, empty, ASK, TOLD]])
    assert (
        tokenizer.decode(encoded.input_ids) == "[gMASK]<sop><|user|>\n你好<|user|>\n你好<|assistant|>\na\n\nb<|user|>"
    )
    assert len(encoded.answers) == 1 and not encoded.context
