"""Control tokens in the text of an answer: those that it is written in stay, all others are left out."""

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.inference.detokenize import decode_answer
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer
from glmtuner.templates.tool_calls import SYNTAXES, ToolCall, syntax

CALLS = [ToolCall("get_weather", {"city": "北京"}, "call00001"), ToolCall("now", {}, "call00002")]
MARKERS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "[TOOL_CALLS]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """That of tiny_glm with the markers of all families as special tokens."""
    made = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    made.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    return made


@pytest.mark.parametrize("name", SYNTAXES)
def test_calls_are_text_in_the_family_s_syntax(tokenizer: Any, name: str) -> None:
    calls = CALLS if SYNTAXES[name].parallel else CALLS[:1]
    text = f"<think>hm</think>{syntax(name).write('', calls)}"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert decode_answer(tokenizer, ids, syntax(name)) == text
    assert read_back(tokenizer, ids, name) == [(call.name, call.arguments) for call in calls]


def read_back(tokenizer: Any, ids: list[int], name: str) -> list[tuple[str, dict[str, Any]]]:
    from glmtuner.templates.answers import read_answer

    tools = [{"type": "function", "function": {"name": call.name}} for call in CALLS]
    read = read_answer(decode_answer(tokenizer, ids, syntax(name)), syntax(name), tools, thinks=True)
    return [(call.name, call.arguments) for call in read.calls]


def test_other_control_tokens_are_left_out(tokenizer: Any) -> None:
    ids = tokenizer("[gMASK]<sop>a<|system|>b<|assistant|>c[TOOL_CALLS]d<think>", add_special_tokens=False).input_ids
    assert decode_answer(tokenizer, ids) == "abcd<think>"
    assert decode_answer(tokenizer, ids, syntax("mistral")) == "abc[TOOL_CALLS]d<think>"
    assert decode_answer(tokenizer, ids, syntax("glm4")) == "ab<|assistant|>cd<think>"


def test_a_tokenizer_that_decodes_by_itself(upstream_files: Any) -> None:
    """ChatGLM3's: its control tokens are not in the list of special tokens."""
    tokenizer = ChatGLMTokenizer.from_pretrained(upstream_files / "chatglm2_realvocab")
    answer, system = tokenizer.control["<|assistant|>"], tokenizer.control["<|system|>"]
    letters = tokenizer("ab", add_special_tokens=False).input_ids
    ids = [*letters, answer, *letters, system, tokenizer.eos_token_id]
    assert decode_answer(tokenizer, ids, syntax("chatglm3")).replace(" ", "") == "ab<|assistant|>ab"
    assert decode_answer(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
