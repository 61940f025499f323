"""The check of templates before training, against renderings that transformers made (../shared/goldens/templates)."""

import json
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import official_templates
import pytest
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.encode import Encoder
from glmtuner.data.preview import sample_of
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError, GlmtunerError
from glmtuner.launch import template_check
from glmtuner.launch.template_check import (
    BATTERY,
    Official,
    between,
    check_first_rows,
    check_template,
    first_difference,
)
from glmtuner.templates.base import TEMPLATES
from glmtuner.templates.glm import RoleTokens
from glmtuner.templates.jinja import TokenizersOwn
from glmtuner.templates.tool_calls import ToolCall

# a prompt that ends in the line break that the maker lets the model generate
WITH_BREAK = RoleTokens(name="glm4", stop="<|user|>", prefix=("[gMASK]", "<sop>"))


@cache
def golden(shared: Path | None, model: str):
    template = official_templates.official(shared, model)
    content = json.loads((shared / f"goldens/templates/{model}.json").read_text(encoding="utf-8"))
    return content, template.tokenizer([])


@pytest.fixture(params=official_templates.MODELS)
def official(request, shared: Path | None):
    return golden(shared, request.param)


def run_of(template: str | None = None, thinking: str = "auto"):
    return SimpleNamespace(
        model=SimpleNamespace(template=template),
        data=SimpleNamespace(thinking=SimpleNamespace(value=thinking)),
        generation=SimpleNamespace(asks_thinking=None),
    )


def encoder_of(template, tokenizer, **lengths) -> Encoder:
    return Encoder(
        template=template, tokenizer=tokenizer, **{"max_source_length": 10**6, "max_target_length": 10**6, **lengths}
    )


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


@pytest.mark.parametrize("thinking", ["auto", "empty", "strip"])
def test_official_templates_agree_with_themselves(official, thinking):
    _, tokenizer = official
    template = TokenizersOwn(source=tokenizer.chat_template, thinking=thinking)
    assert check_template(run_of(thinking=thinking), encoder_of(template, tokenizer), "tokenizer")


def test_rows_of_the_conversations_agree_with_the_stored_renderings(official):
    content, tokenizer = official
    template = TokenizersOwn(source=tokenizer.chat_template)
    encoder, checked = encoder_of(template, tokenizer), 0
    compared = Official(tokenizer, tokenizer.chat_template, template, strip=False)
    for case in content["cases"]:
        messages = case["messages"]
        turns = [
            Message(
                message["role"],
                message["content"] or "",
                True,
                message.get("reasoning_content") or "",
                tuple(
                    ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id", ""))
                    for call in message.get("tool_calls") or ()
                ),
                message.get("tool_call_id", ""),
            )
            for message in messages
        ]
        roles = [turn.role for turn in turns]
        if (
            roles[-1] != "assistant"
            or len(case["kwargs"]) > 1
            or any({"metadata", "tools"} & {*message} or message["content"] is None for message in messages)
            or any(first == second == "assistant" for first, second in pairwise(roles))
            or any(isinstance(call.arguments, str) for turn in turns for call in turn.tool_calls)
        ):
            continue
        if "rendered" in case:  # the other side of the comparison is what transformers rendered elsewhere
            tools = case.get("tools") or ()
            assert compared.render(turns, tools, prompts=False, thinking=None) == case["rendered"], case["name"]
        example = Example(turns, tools=tuple(case.get("tools") or ()))
        try:
            sample, _ = sample_of(encoder, example)
        except GlmtunerError:
            continue
        for row in (*sample.earlier, sample.own) if sample else ():
            assert compared.difference(row) is None, case["name"]
            checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    ("ours", "model"),
    [("glm4", "glm-4-9b-chat"), ("glm4", "glm-4-9b-chat-1m-hf"), ("glm_edge", "glm-edge-4b-chat")],
)
def test_templates_of_ours_agree_with_their_makers(shared: Path | None, ours, model):
    _, tokenizer = golden(shared, model)
    assert check_template(run_of(), encoder_of(TEMPLATES[ours], tokenizer), ours)


def test_spaces_that_sentencepiece_adds_to_pieces_are_no_difference(shared: Path | None, published_file, tmp_path):
    from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(str(published_file("tokenizer.model")))
    tokenizer.chat_template = official_templates.official(shared, "chatglm3-6b").source
    assert check_template(run_of(), encoder_of(TEMPLATES["chatglm3"], tokenizer), "chatglm3")
    with pytest.raises(ConfigError):
        check_template(run_of(), encoder_of(TEMPLATES["chatglm2"], tokenizer), "chatglm2")


@pytest.mark.parametrize("model", ["glm-4.5", "qwen3", "mistral-7b-instruct-v0.3", "llama-3.1-instruct"])
@pytest.mark.parametrize("mistake", ["prompt", "answer", "tokens"])
def test_a_mistake_of_the_encoder_is_found(shared: Path | None, monkeypatch, model, mistake):
    """Whatever part of a row is wrong."""
    _, tokenizer = golden(shared, model)
    template = TokenizersOwn(source=tokenizer.chat_template)
    encoder = encoder_of(template, tokenizer)
    official = Official(tokenizer, tokenizer.chat_template, template, strip=False)
    example = BATTERY["several turns"]
    sample, _ = sample_of(encoder, example)
    assert sample is not None and official.difference(sample.own) is None
    row = sample.own
    first = next(index for index, label in enumerate(row.labels) if label != -100)
    if mistake == "prompt":  # a token of the prompt is learned
        labels = [*row.labels]
        labels[first - 1] = row.input_ids[first - 1]
        wrong = replace(row, labels=labels)
    elif mistake == "answer":  # the first token of an answer is not
        labels = [*row.labels]
        labels[first] = -100
        wrong = replace(row, labels=labels)
    else:
        ids = [*row.input_ids]
        ids[first] = ids[first] + 1
        wrong = replace(
            row, input_ids=ids, labels=[ids[first] if at == first else label for at, label in enumerate(row.labels)]
        )
    assert official.difference(wrong) is not None


def test_a_difference_is_an_error_where_the_family_chose_and_said_where_the_user_did(tiny, capsys):
    encoder = encoder_of(WITH_BREAK, tiny)
    replaced = {**TEMPLATES, "glm4": WITH_BREAK}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_check, "TEMPLATES", replaced)
        with pytest.raises(ConfigError) as raised:
            check_template(run_of(), encoder, "glm4")
        message = str(raised.value)
        assert "\n" not in message and r'<|assistant|>\n"' in message and '<|assistant|>"' in message, "both texts"
        assert message.startswith("model.template=glm4: with a question, the prompt that is served is")
        assert message.endswith(
            "type model.template=tokenizer for the tokenizer's, or model.template=glm4 to keep this one"
        )
        assert not capsys.readouterr().out
        assert not check_template(run_of("glm4"), encoder, "glm4")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("the model is trained and served with model.template=glm4")
    # a version of before is that of the checkpoint, which is trained further
    assert not check_template(run_of(), encoder, "glm4")
    assert "is trained and served with" in capsys.readouterr().out


def test_the_data_s_own_rows_are_compared(tiny, capsys):
    """A template that differs on some turns alone: the battery has no such text."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.chat_template = tiny.chat_template.replace(
        "message['content'] }}", "message['content'] | replace('x', 'y') }}"
    )
    encoder = encoder_of(TEMPLATES["glm4"], tokenizer)
    assert check_template(run_of(), encoder, "glm4")
    good, bad = (Example([Message("user", text), Message("assistant", "b")]) for text in ("a", "a x b"))
    check_first_rows(run_of(), encoder, "glm4", {"one": [good], "two": [good]})
    with pytest.raises(ConfigError, match=r"with dataset 'two', the prompt that is served is .*a x b.*renders .*a y b"):
        check_first_rows(run_of(), encoder, "glm4", {"one": [good], "two": [good, bad]})
    check_first_rows(run_of("glm4"), encoder, "glm4", {"two": [bad]})
    assert capsys.readouterr().out.count("\n") == 1


def test_cut_rows_are_no_difference(tiny):
    long = Example([Message("system", "s " * 40), Message("user", "问题 " * 50), Message("assistant", "回答 " * 50)])
    encoder = encoder_of(TEMPLATES["glm4"], tiny, max_source_length=20, max_target_length=9)
    official = Official(tiny, tiny.chat_template, TEMPLATES["glm4"], strip=False)
    sample, counts = sample_of(encoder, long)
    assert sample is not None and counts.prompts_cut and counts.answers_cut
    assert first_difference(official, encoder, [long], None) is None


def test_control_tokens_that_users_write_are_no_difference(tiny):
    """They are text here and a control token to a plain tokenizer, of the same text."""
    example = Example([Message("user", "what is <|user|>?"), Message("assistant", "a role: <|user|>")])
    for template in (TEMPLATES["glm4"], TokenizersOwn(source=tiny.chat_template)):
        official = Official(tiny, tiny.chat_template, template, strip=False)
        assert first_difference(official, encoder_of(template, tiny), [example], None) is None


def test_nothing_is_compared_without_a_chat_template(tiny):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.chat_template = None
    assert check_template(run_of(), encoder_of(WITH_BREAK, tokenizer), "glm4")
    tokenizer.chat_template = {"rag": "{{ 1 }}"}  # and none that is the default
    assert check_template(run_of(), encoder_of(WITH_BREAK, tokenizer), "glm4")


def test_it_is_quick_and_done_once(tiny, monkeypatch):
    encoder = encoder_of(TEMPLATES["glm4"], tiny)
    check_template(run_of(), encoder, "glm4")  # imports
    monkeypatch.setattr(template_check, "_COMPARED", {})
    start = time.process_time()
    check_template(run_of(), encoder, "glm4")
    assert time.process_time() - start < 0.3
    monkeypatch.setattr(Official, "render", lambda *_, **__: pytest.fail("once a process"))
    check_template(run_of(), encoder, "glm4")


def test_the_first_difference_is_shown_with_what_stands_around_it():
    found = between("the row", f"{'a' * 500}b{'c' * 500}", f"{'a' * 500}\n{'c' * 500}")
    assert found.ours.startswith('"…aaa') and "ab" in found.ours and len(found.ours) < 130
    assert r"a\nc" in found.official
    assert between("the row", "ab", "a").official == '"a"'
