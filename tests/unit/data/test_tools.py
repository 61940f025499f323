"""Tools in records: four formats of one conversation, what becomes of ids, results and marks, and what is refused."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from official_templates import official
from pyarrow import parquet
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data import BadRecord, Example, Message, find, load
from glmtuner.data.catalog import format_and_columns
from glmtuner.data.columns import description
from glmtuner.data.encode import Encoder, prompt_text
from glmtuner.data.feedback import FeedbackEncoder
from glmtuner.data.formats import parser
from glmtuner.data.pairs import PairEncoder
from glmtuner.data.prompts import PromptEncoder
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.tools import with_tools
from glmtuner.errors import ConfigError, DataError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.named import template_named
from glmtuner.templates.tool_calls import ToolCall

WEATHER = {
    "name": "get_weather",
    "description": "查询城市的天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TRAINS = {"name": "search_trains", "description": "Find trains.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = [{"type": "function", "function": tool} for tool in (WEATHER, TRAINS)]
BARE = [WEATHER, TRAINS]
ASK, TOLD, THANKS, BYE = "北京天气如何？顺便查车票", "晴，有两班车。", "谢谢", "不客气。"
THOUGHT_TO = "我来查询。"
ARGUMENTS = {"city": "北京", "days": 2, "units": None, "at": [1.5, {"x": True}]}
RESULT = '{"weather": "晴"}'
CALLS = (ToolCall("get_weather", ARGUMENTS, "call00001"),)
EXAMPLE = Example(
    [
        Message("user", ASK),
        Message("assistant", THOUGHT_TO, tool_calls=CALLS),
        Message("tool", RESULT, call_id="call00001"),
        Message("assistant", TOLD),
        Message("user", THANKS),
        Message("assistant", BYE),
    ],
    tools=tuple(WRAPPED),
)


def said(role, content, **keys):
    return {"role": role, "content": content, **keys}


def spoke(word, value, **keys):
    return {"from": word, "value": value, **keys}


def of_json(value):
    return json.dumps(value, ensure_ascii=False)


OPENAI = {
    "tools": WRAPPED,
    "messages": [
        said("user", ASK),
        said("assistant", THOUGHT_TO, tool_calls=[
            {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": of_json(ARGUMENTS)}}
        ]),
        said("tool", RESULT, tool_call_id="call00001"),
        said("assistant", TOLD),
        said("user", THANKS),
        said("assistant", BYE),
    ],
}  # fmt: skip
SHAREGPT = {
    "tools": of_json(BARE),
    "conversations": [
        spoke("human", ASK),
        spoke("gpt", THOUGHT_TO),
        spoke("function_call", of_json({"name": "get_weather", "arguments": ARGUMENTS})),
        spoke("observation", RESULT),
        spoke("gpt", TOLD),
        spoke("human", THANKS),
        spoke("gpt", BYE),
    ],
}
GLM4 = {
    "messages": [
        said("system", "", tools=WRAPPED),
        said("user", ASK),
        said("assistant", THOUGHT_TO),
        said("assistant", of_json(ARGUMENTS), metadata="get_weather"),
        said("observation", RESULT),
        said("assistant", TOLD),
        said("user", THANKS),
        said("assistant", BYE),
    ]
}
CHATGLM3 = {
    "tools": BARE,
    "conversations": [
        said("user", ASK),
        said("assistant", THOUGHT_TO),
        {"role": "tool", "name": "get_weather", "parameters": ARGUMENTS, "observation": {"weather": "晴"}},
        said("assistant", TOLD),
        said("user", THANKS),
        said("assistant", BYE),
    ],
}
FORMATS = {"openai": OPENAI, "sharegpt": SHAREGPT, "glm4": GLM4, "chatglm3": CHATGLM3}


def parse(raw, ignore=(), **keys):
    """The example of a record of either name of turns."""
    formatting = "messages" if "messages" in raw else "sharegpt"
    columns = {
        name: name
        for name in ("messages", "tools", "kto_tag", "chosen", "rejected")
        if name in raw and name not in ignore
    }
    columns["messages"] = "messages" if "messages" in raw else "conversations"
    if formatting == "sharegpt" and raw["conversations"] and "role" in raw["conversations"][0]:
        formatting = "messages"
    formatting, named = format_and_columns(formatting, columns, "chosen" in raw)
    spec = DatasetSpec(
        name="x", formatting=formatting, columns=named, ignore_columns=[*ignore], ranking="chosen" in raw, **keys
    )
    return with_tools(parser(formatting)(raw, spec), raw, spec)


def refused(raw, **options):
    with pytest.raises(BadRecord) as caught:
        parse(raw, **options)
    return caught.value.field, caught.value.reason


def messages(*turns, **columns):
    return {"messages": [*turns], **columns}


def calling(*calls, content=None, **keys):
    return said("assistant", content, tool_calls=[
        {"type": "function", "function": {"name": name, "arguments": arguments}, **({"id": id_} if id_ else {})}
        for name, arguments, id_ in calls
    ], **keys)  # fmt: skip


ASKED = said("user", "q")
NOW = ("now", {}, "")

# one conversation in four formats


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_the_same_example(name):
    assert parse(FORMATS[name]) == EXAMPLE


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognized_without_an_entry(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_text(of_json(FORMATS[name]) + "\n" + of_json({**FORMATS[name], "tools": "[]"}) + "\n", encoding="utf-8")
    spec = find(str(path), tmp_path, [])
    got = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
    assert next(got.examples) == EXAMPLE and got.bad == []
    if name != "glm4":
        assert description(spec, [*got.columns]).endswith(" -> turns, tools -> tools")
        assert next(got.examples).tools == ()
    list(got.examples)
    assert not any("." in column for column in got.columns), "every key of the turns is read"


def small_encoder(shared, model, kind=Encoder, **options):
    template = official(shared, model)
    tokenizer = template.tokenizer([ASK, TOLD, RESULT, of_json(WRAPPED)])
    lengths = {"max_source_length": 4000, "max_target_length": 4000, **options}
    return kind(template=template_named("tokenizer", tokenizer), tokenizer=tokenizer, **lengths), template


def openai_turns(example):
    """The turns as transformers takes them."""
    turns = []
    for message in example.messages:
        turn = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [call.as_openai() for call in message.tool_calls]
        if message.call_id:
            turn["tool_call_id"] = message.call_id
        turns.append(turn)
    return turns


def learned_texts(tokenizer, row):
    """The texts of the stretches that are learned."""
    texts, current = [], []
    for label in [*row["labels"], IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            texts.append(tokenizer.decode(current))
            current = []
    return texts


@pytest.mark.parametrize(
    "model", ["glm-4.5", "qwen3", "glm-4.7", "qwen2.5-instruct", "glm-5.3-flash", "qwen3-instruct-2507"]
)
def test_each_format_gives_the_same_row(shared: Path, model):
    encoder, template = small_encoder(shared, model)
    off = {"enable_thinking": False}
    rows = []
    for raw in FORMATS.values():
        (row,), counts = encoder.encode([parse(raw)])
        rows.append(row)
        assert counts.undescribed == 0
    assert rows == [rows[0]] * 4
    decode = encoder.tokenizer.decode
    turns, row = openai_turns(EXAMPLE), rows[0]
    prompt = template.render(turns[:-1], WRAPPED, add_generation_prompt=True, **off)
    assert decode(row["prompt_ids"]) == prompt
    called = template.behind(turns[:2], WRAPPED, **off)
    assert "北京" in called and "get_weather" in called
    everything = [text for part in (row, *row["earlier"]) for text in learned_texts(encoder.tokenizer, part)]
    assert any(text.startswith(called) for text in everything), "the call is learned as the template writes it"
    assert not any('晴"' in text or "tool_response" in text for text in everything), "results are not"
    assert sum(TOLD in text for text in everything) == sum(BYE in text for text in everything) == 1


@pytest.mark.parametrize("name", ["glm4", "glm4_0414"])
def test_each_format_gives_the_same_row_in_a_template_of_ours(name):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    lengths = {"max_source_length": 4000, "max_target_length": 4000}
    encoder = Encoder(template=template_named(name, tokenizer), tokenizer=tokenizer, **lengths)
    rows = [encoder.encode([parse(raw)])[0][0] for raw in FORMATS.values()]
    assert rows == [rows[0]] * 4
    stretches = learned_texts(tokenizer, rows[0])
    call = f"\n{THOUGHT_TO}<|assistant|>get_weather\n{of_json(ARGUMENTS)}<|observation|>"
    assert stretches == [call, f"\n{TOLD}<|user|>", f"\n{BYE}<|user|>"]
    assert f"<|observation|>\n{RESULT}<|assistant|>" in tokenizer.decode(rows[0]["input_ids"])


def test_a_call_at_the_end_is_learned_and_shown(shared: Path):
    encoder, template = small_encoder(shared, "qwen3")
    example = replace(EXAMPLE, messages=EXAMPLE.messages[:2])
    (row,), _ = encoder.encode([example])
    off = {"enable_thinking": False}
    behind = template.behind(openai_turns(example), WRAPPED, **off)
    assert learned_texts(encoder.tokenizer, row) == [behind + "<|im_end|>"]
    assert row["answer"] == behind.strip() and row["prompt"] == ASK
    after = replace(EXAMPLE, messages=EXAMPLE.messages[:4])
    (row,), _ = encoder.encode([after])
    assert row["prompt"] == f"user: {ASK}\nassistant: {THOUGHT_TO}\nget_weather({of_json(ARGUMENTS)})\ntool: {RESULT}"
    assert row["answer"] == TOLD


def test_whole_rounds_are_dropped(shared: Path):
    """A question goes with its calls and results."""
    encoder, _ = small_encoder(shared, "qwen3")
    last = encoder.encode([replace(EXAMPLE, messages=EXAMPLE.messages[4:])])[0][0]
    short = replace(encoder, max_source_length=len(last["prompt_ids"]) + 3)
    (row,), counts = short.encode([EXAMPLE])
    assert (counts.turns_dropped, counts.prompts_cut) == (1, 1) and row["input_ids"] == last["input_ids"]
    long = replace(
        EXAMPLE,
        messages=[*EXAMPLE.messages[:2], Message("tool", "x " * 300, call_id="call00001"), *EXAMPLE.messages[3:4]],
    )
    plain = encoder.encode([replace(EXAMPLE, messages=EXAMPLE.messages[:4])])[0][0]
    (row,), counts = replace(encoder, max_source_length=len(plain["prompt_ids"])).encode([long])
    text = encoder.tokenizer.decode(row["input_ids"])
    assert counts.prompts_cut == 1 and ASK in text and "x x" in text and "get_weather" in text


def test_what_descriptions_of_tools_need_is_told_once(shared: Path):
    encoder, _ = small_encoder(shared, "qwen3", max_source_length=60)
    more = replace(EXAMPLE, tools=tuple(WRAPPED * 3))
    with pytest.raises(
        ConfigError, match=r"^data\.max_source_length=60: the template with the descriptions of the tools"
    ) as caught:
        encoder.encode([EXAMPLE, more])
    needed = int(str(caught.value).rpartition("=")[2])
    assert replace(encoder, max_source_length=needed).encode([EXAMPLE, more])[0]


def test_records_that_describe_no_tools_are_counted(shared: Path):
    encoder, _ = small_encoder(shared, "qwen3")
    rows, counts = encoder.encode([replace(EXAMPLE, tools=()), EXAMPLE])
    assert len(rows) == 2 and counts.undescribed == 1
    assert "1 records call tools and describe none" in counts.summary()


@pytest.mark.parametrize("model", ["mistral-7b-instruct-v0.3", "mistral-nemo-instruct-2407"])
def test_ids_of_any_length_fit_templates_that_insist_on_nine_characters(shared: Path, model):
    encoder, template = small_encoder(shared, model)
    known = parse(json.loads(of_json(OPENAI).replace("call00001", "call_0a1b2c3d4e5f")))
    assert known.messages[2].call_id == "call_0a1b2c3d4e5f", "the record's own are kept"
    (row,), _ = encoder.encode([known])
    assert row == encoder.encode([EXAMPLE])[0][0]
    rendered = template.render(openai_turns(EXAMPLE)[:2], WRAPPED)
    learned = [text for part in (row, *row["earlier"]) for text in learned_texts(encoder.tokenizer, part)]
    assert any("call00001" in text and rendered.endswith(text) for text in learned)
    two = parse(
        messages(
            ASKED, KNOWN, said("tool", "1", tool_call_id="a"), said("tool", "2", tool_call_id="b"), END, tools=BARE
        )
    )
    text = encoder.tokenizer.decode(encoder.encode([two])[0][0]["input_ids"])
    assert text.count("call00001") == text.count("call00002") == 2
    nine = parse(messages(ASKED, calling(("f", {}, "abcdef123")), tools=BARE))
    assert "abcdef123" in encoder.tokenizer.decode(encoder.encode([nine])[0][0]["input_ids"])


def test_a_template_that_renders_calls_and_no_descriptions(shared: Path):
    encoder, _ = small_encoder(shared, "deepseek-r1-distill")
    with pytest.raises(
        ConfigError, match=r"and no descriptions of tools, which the data has; type data\.ignore_columns=tools "
    ):
        encoder.encode([EXAMPLE])
    (row,), counts = encoder.encode([replace(EXAMPLE, tools=())])
    learned = [text for part in (row, *row["earlier"]) for text in learned_texts(encoder.tokenizer, part)]
    assert any("get_weather" in text for text in learned) and counts.undescribed == 1


def test_texts_before_calls_that_a_template_leaves_out_are_counted(shared: Path):
    encoder, template = small_encoder(shared, "llama-3.1-instruct")
    _, counts = encoder.encode([EXAMPLE])
    assert THOUGHT_TO not in template.render(openai_turns(EXAMPLE)[:3], WRAPPED, add_generation_prompt=True)
    assert counts.texts_dropped == 1 and "1 texts before tool calls left out" in counts.summary()
    kept, _ = small_encoder(shared, "glm-4.5")
    assert kept.encode([EXAMPLE])[1].texts_dropped == 0


# descriptions


@pytest.mark.parametrize(
    "value",
    [WRAPPED, BARE, of_json(WRAPPED), of_json(BARE), [of_json(tool) for tool in BARE], tuple(WRAPPED),
     [{"type": "function", **tool} for tool in BARE],
     [{**WEATHER, "strict": None}, TRAINS],
     {"type": ["function"] * 2, "function": BARE}, [WRAPPED[0], TRAINS]],
)  # fmt: skip
def test_forms_of_descriptions(value):
    assert parse(messages(ASKED, said("assistant", "a"), tools=value)).tools == tuple(WRAPPED)


@pytest.mark.parametrize("value", [None, "", " ", [], "[]", "null", {}, "{}"])
def test_no_descriptions(value):
    assert parse(messages(ASKED, said("assistant", "a"), tools=value)).tools == ()


def test_one_description_may_stand_alone():
    assert parse(messages(ASKED, said("assistant", "a"), tools=of_json(WEATHER))).tools == (WRAPPED[0],)


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        ("hammer", "tools", "a list of descriptions of tools is expected, or its JSON, got 'hammer' (str)"),
        (3, "tools", "got 3 (int)"),
        (["saw"], "tools[0]", "or its JSON, got 'saw'"),
        ([3], "tools[0]", "the description of a tool is an object with its name, got 3"),
        ([{}], "tools[0].name", "missing name of a tool"),
        ([{"function": {"name": " "}}], "tools[0].function.name", "empty name of a tool"),
        ([{"name": 3}], "tools[0].name", "text is expected, got 3"),
        ([WEATHER, {"type": "web_search"}], "tools[1].type", "a tool of type 'web_search' (str), and only functions"),
        ([{"name": "f", "parameters": float("nan")}], "tools[0]", "JSON in UTF-8 has not"),
        ([{"name": "f", "description": "\ud83d"}], "tools[0]", "JSON in UTF-8 has not"),
        ([{"name": "f", "parameters": "{"}], "tools[0].parameters", "the parameters of a tool is expected, or its JSON"),
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_read(value, field, reason):
    place, message = refused(messages(ASKED, said("assistant", "a"), tools=value))
    assert place == field and reason in message
    assert message.endswith("type data.ignore_columns=tools to learn without the descriptions of tools")
    assert parse(messages(ASKED, said("assistant", "a"), tools=value), ignore=["tools"]).tools == ()


def test_tools_of_a_system_turn():
    system = said("system", "s", tools=WRAPPED)
    assert parse(messages(system, ASKED, said("assistant", "a"))).tools == tuple(WRAPPED)
    assert parse(messages(system, ASKED, said("assistant", "a"), tools=BARE)).tools == tuple(WRAPPED)
    assert parse(messages(system, ASKED, said("assistant", "a")), ignore=["tools"]) == Example(
        [Message("system", "s"), Message("user", "q"), Message("assistant", "a")]
    )
    assert (
        "differs from the tools of the system turn"
        in refused(messages(system, ASKED, said("assistant", "a"), tools=[WEATHER]))[1]
    )
    place, reason = refused(messages(system, said("system", "t", tools=BARE), ASKED, said("assistant", "a")))
    assert place == "messages[1].tools" and "tools in two system turns" in reason
    place, reason = refused(messages(said("user", "q", tools=WRAPPED), said("assistant", "a")))
    assert place == "messages[0].tools" and "only a turn of system has it; type data.ignore_columns=tools" in reason
    place, reason = refused(messages(said("system", "", tools="hammer"), ASKED, said("assistant", "a")))
    assert place == "messages[0].tools" and reason.endswith("to learn without the descriptions of tools")


# calls


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', ' {"a":1}\n'])
def test_arguments_are_objects_or_their_json(arguments):
    example = parse(messages(ASKED, calling(("f", arguments, "x"))))
    assert example.messages[-1] == Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}, "x"),))


@pytest.mark.parametrize("arguments", ["", " ", {}, None])
def test_a_call_may_have_no_arguments(arguments):
    assert parse(messages(ASKED, calling(("f", arguments, "x")))).messages[-1].tool_calls == (ToolCall("f", {}, "x"),)


@pytest.mark.parametrize(
    "turn",
    [
        said("assistant", None, function_call={"name": "f", "arguments": '{"a": 1}'}),
        said("assistant", "", tool_calls=[{"name": "f", "parameters": {"a": 1}}]),
        said("assistant", None, tool_calls=of_json([{"function": {"name": "f", "arguments": {"a": 1}}}])),
        said("assistant", '{"a": 1}', metadata="f"),
        said("assistant", {"a": 1}, metadata=" f "),
        said("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        said("function_call", {"name": "f", "arguments": '{"a": 1}'}),
        said("tool_call", '[{"name": "f", "arguments": {"a": 1}}]'),
        said("function_call", [{"type": "text", "text": '{"name": "f", "arguments": {"a": 1}}'}]),
        {"role": "tool", "name": "f", "parameters": {"a": 1}},
    ],
)  # fmt: skip
def test_forms_of_a_call(turn):
    assert parse(messages(ASKED, turn)).messages[-1] == Message(
        "assistant", "", tool_calls=(ToolCall("f", {"a": 1}, "call00001"),)
    )


def test_a_thought_may_stand_before_the_call_of_a_turn():
    turn = spoke("function_call", '<think>hm</think>\n\n{"name": "f", "arguments": {}}')
    last = parse({"conversations": [spoke("human", "q"), turn]}).messages[-1]
    assert (last.reasoning, last.content, last.tool_calls[0].name) == ("hm", "", "f")
    assert parse(messages(ASKED, calling(NOW, reasoning_content="hm"))).messages[-1].reasoning == "hm"


BAD_CALLS = [
    (calling(("f", "[1]", "")), "tool_calls[0].function.arguments", "the arguments of a call are a JSON object, got '[1]'"),
    (calling(("f", "{", "")), "tool_calls[0].function.arguments", "a JSON object, got '{' (str); mend them, or leave the record out"),
    (calling(("f", '{"a": NaN}', "")), "tool_calls[0].function.arguments", "a JSON object"),
    (calling(("f", {"a": "\ud83d"}, "")), "tool_calls[0].function.arguments", "a JSON object"),
    (calling(("f", 3, "")), "tool_calls[0].function.arguments", "got 3 (int)"),
    (calling(("f", '{"a": %s}' % ("7" * 5000), "")), "tool_calls[0].function.arguments", "a JSON object"),
    (calling(("f", "[" * 3000, "")), "tool_calls[0].function.arguments", "a JSON object"),
    (calling(("", {}, "")), "tool_calls[0].function.name", "empty name of a tool"),
    (calling((None, {}, "")), "tool_calls[0].function.name", "missing name of a tool"),
    (said("assistant", None, tool_calls=[{"type": "custom", "custom": {}}]), "tool_calls[0].type", "a call of type 'custom'"),
    (said("assistant", None, tool_calls=[{"name": "f", "args": {"a": 1}}]), "tool_calls[0]", "the call has args"),
    (said("assistant", None, tool_calls=[{"name": "f", "arguments": {}, "parameters": {}}]), "tool_calls[0]", "one of arguments and"),
    (said("assistant", None, tool_calls=["f"]), "tool_calls[0]", "a call is expected, or its JSON, got 'f'"),
    (said("assistant", None, tool_calls=[3]), "tool_calls[0]", "a call is an object with name and arguments, got 3"),
    (said("assistant", None, tool_calls=True), "tool_calls", "a list of calls is expected, got True"),
    (said("assistant", None, tool_calls=[{"id": 3, "name": "f", "arguments": {}}]), "tool_calls[0].id", "text is expected, got 3"),
    (said("assistant", "x", function_call={"name": "f"}, tool_calls=[{"name": "f"}]), "", "calls in tool_calls, function_call; keep one"),
    (said("assistant", "print(1)", metadata="python"), "metadata", "type data.ignore_columns=metadata to learn the text without it"),
    (said("function_call", "call f"), "content", "a list of calls is expected, or its JSON, got 'call f'"),
    (said("function_call", "[]"), "content", "an empty list of calls"),
    (said("function_call", ""), "content", "empty call"),
    (said("user", "q2", tool_calls=[{"name": "f"}]), "tool_calls", "stands in a turn of user, and only a turn of assistant has it"),
    ({"role": "tool", "name": "f", "parameters": [1], "observation": "x"}, "parameters", "a JSON object, got [1] (list)"),
]  # fmt: skip


@pytest.mark.parametrize(("turn", "field", "reason"), BAD_CALLS)
def test_calls_that_cannot_be_read(turn, field, reason):
    place, message = refused(messages(ASKED, turn))
    assert place == f"messages[1]{'.' if field else ''}{field}"
    assert reason in message


def test_metadata_that_names_no_tool_is_not_read():
    for value in ("2024-05-01 10:00", {"source": "web"}, "", None, 3):
        assert parse(messages(ASKED, said("assistant", "a", metadata=value))).messages[-1] == Message("assistant", "a")
    assert parse(messages(ASKED, said("assistant", "print(1)", metadata="python")), ignore=["metadata"])


# results


def ids(example):
    return [
        (message.role, tuple(call.id for call in message.tool_calls) or message.call_id, message.content)
        for message in example.messages
        if message.tool_calls or message.role == "tool"
    ]


TWO = calling(("f", {}, ""), ("g", {}, ""))
KNOWN = calling(("f", {}, "a"), ("g", {}, "b"))
END = said("assistant", "done")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([TWO, said("tool", "1"), said("tool", "2"), END], [("call00001", "1"), ("call00002", "2")]),
        ([TWO, said("tool", "2", name="g"), said("tool", "1", name="f"), END], [("call00001", "1"), ("call00002", "2")]),
        ([KNOWN, said("tool", "2", tool_call_id="b"), said("tool", "1", tool_call_id="a"), END], [("a", "1"), ("b", "2")]),
        ([KNOWN, said("observation", "1"), said("observation", "2"), END], [("a", "1"), ("b", "2")]),
        ([KNOWN, said("tool", "1"), said("tool", "2", tool_call_id="b"), END], [("a", "1"), ("b", "2")]),
        ([TWO, said("tool", "1", tool_call_id="zz"), said("tool", "2", tool_call_id="y"), END], [("call00001", "1"), ("call00002", "2")]),
        ([TWO, said("observation", '["1", {"x": 2}]'), END], [("call00001", "1"), ("call00002", '{"x": 2}')]),
        ([TWO, said("observation", "all of it"), END], [("call00001", "all of it")]),
        ([said("assistant", "t"), said("function_call", '{"name": "f"}'), said("function_call", '{"name": "g"}'),
          said("observation", "1"), said("observation", ""), END], [("call00001", "1"), ("call00002", "")]),
        ([said("assistant", "t"), said("tool_call", '[{"name": "f"}, {"name": "g"}]'), said("tool_response", "1"), said("tool_response", "2"), END],
         [("call00001", "1"), ("call00002", "2")]),
        ([{"role": "tool", "name": "f", "observation": 3}, {"role": "tool", "name": "g", "parameters": {}, "observation": [None]}, END],
         [("call00001", "3"), ("call00002", "[null]")]),
        ([calling(("f", {}, "")), said("tool", [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]), END], [("call00001", "12")]),
        ([calling(("f", {}, "")), said("tool", {"x": "晴"}), END], [("call00001", '{"x": "晴"}')]),
        ([calling(("f", {}, "call00001")), said("tool", "1"), calling(("f", {}, "")), said("tool", "2"), END], [("call00001", "1"), ("call00002", "2")]),
        ([said("assistant", "", function_call={"name": "f", "arguments": "{}"}), said("function", "1", name="f"), END], [("call00001", "1")]),
    ],
)  # fmt: skip
def test_results_name_their_calls_in_the_order_of_the_calls(turns, expected):
    example = parse(messages(ASKED, *turns))
    results = [(message.call_id, message.content) for message in example.messages if message.role == "tool"]
    assert results == expected
    calls = [call.id for message in example.messages for call in message.tool_calls]
    assert len(set(calls)) == len(calls) and {call_id for call_id, _ in results} <= {*calls}


@pytest.mark.parametrize(
    "text", ['{"name": "f", "arguments": {"a": 1}}', 'f\n{"a": 1}', '[{"name": "f", "parameters": {"a": 1}}]']
)
def test_a_call_as_the_text_of_an_answer_before_a_result(text):
    """GLM-4's published format writes calls so."""
    example = parse(messages(ASKED, said("assistant", text), said("observation", "x"), END))
    assert example.messages[1] == Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}, "call00001"),))
    assert parse(messages(ASKED, said("assistant", text))).messages[1].content == text  # no result: it is text


BAD_RESULTS = [
    ([said("tool", "x"), END], 1, "the result of a tool, and the turn before it calls none"),
    ([said("assistant", "a"), said("tool", "x"), END], 2, "and the turn before it calls none; leave the result out"),
    ([said("observation", "x"), END], 1, "the result of a tool, and the turn before it calls none"),
    ([said("assistant", "a"), said("observation", "x"), said("observation", "y"), END], 2, "and the turn before it calls none"),
    ([TWO, said("tool", "1"), said("tool", "2"), said("tool", "3"), END], 4, "3 results of 2 calls"),
    ([KNOWN, said("tool", "1", tool_call_id="a"), END], 2, "no result of the call of g"),
    ([calling(*[("f", {}, "")] * 3), said("tool", "1"), said("tool", "2"), END], 3, "no result of the call of f"),
    ([KNOWN, said("tool", "1", tool_call_id="c"), said("tool", "2", tool_call_id="b"), END], "2].tool_call_id", "no call with the id 'c' (str); known: a, b"),
    ([KNOWN, said("tool", "1", tool_call_id="a"), said("tool", "2", tool_call_id="a"), END], "3].tool_call_id", "a second result of the call 'a'"),
    ([TWO, said("tool", "1", name="h"), said("tool", "2", name="g"), END], 2, "the result of 'h' (str), and the answer before it calls f, g"),
    ([calling(("f", {}, "a"), ("g", {}, "a")), said("tool", "1"), said("tool", "2"), END], 2, "two calls with the same id"),
    ([TWO, said("tool", "1"), said("tool", "2")], 3, "the results of the last tool calls have no answer"),
    ([TWO, said("tool", "1"), said("tool", "2"), said("user", "q")], 4, "a user turn behind the results of tools"),
    ([TWO, said("tool", None), END], "2].content", "missing result of a tool"),
    ([TWO, said("tool", "\ud83d"), END], "2].content", "half of a surrogate pair"),
    ([TWO, said("tool", 1, tool_call_id=3), END], "2].tool_call_id", "text is expected, got 3"),
    ([{"role": "tool", "name": "f", "parameters": {}}, END], "1].observation", "missing result of the call"),
    ([said("assistant", "a"), calling(NOW, content="b")], 2, "two assistant turns in a row"),
    ([said("tool", "x", train=True), END], "1].train", "a turn of tool is marked as learned, and only answers are"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "place", "reason"), BAD_RESULTS)
def test_results_that_belong_to_no_call(turns, place, reason):
    field, message = refused(messages(ASKED, *turns))
    assert field == f"messages[{place}]" if isinstance(place, int) else field == f"messages[{place}"
    assert reason in message


def test_an_observation_may_stand_behind_a_call_in_words(shared: Path):
    """Some records of glaive's write a call in words; the answer and the one to its result are learned as they are."""
    raw = {
        "conversations": [
            spoke("human", "q"),
            spoke("gpt", "计算: {}"),
            spoke("observation", "160"),
            spoke("gpt", "160 元"),
        ]
    }
    example = parse({**raw, "tools": BARE})
    assert ids(example) == [("tool", "", "160")]
    encoder, template = small_encoder(shared, "glm-4.5")
    (row,), counts = encoder.encode([example])
    assert counts.uncalled == 1 and "results behind an answer that calls no tool" in counts.summary()
    prompt = template.render(openai_turns(example)[:-1], WRAPPED, add_generation_prompt=True, enable_thinking=False)
    assert encoder.tokenizer.decode(row["prompt_ids"]) == prompt and "160" in prompt


def test_a_call_need_not_have_been_run():
    example = parse(messages(ASKED, calling(NOW), ASKED, END))
    assert [message.role for message in example.messages] == ["user", "assistant", "user", "assistant"]


# marks and ignored keys


def test_marks_of_calls():
    assert not parse(messages(ASKED, calling(NOW, weight=0), said("tool", "x"), END)).messages[1].learned
    assert parse(messages(ASKED, calling(NOW, weight=1), said("tool", "x", weight=0), END)).messages[1].learned
    unmarked = {"role": "tool", "name": "f", "parameters": {}, "observation": "x"}
    for marked, learned in ((False, False), (True, True)):
        example = parse(messages(ASKED, {**unmarked, "loss": marked}, END))
        assert example.messages[1].learned is learned and example.messages[1].tool_calls
    example = parse({"conversations": [spoke("human", "q"), spoke("function_call", '{"name": "f"}', loss=False)]})
    assert not example.messages[1].learned
    marks = [said("assistant", "t", loss=True), {**unmarked, "loss": False}, END]
    place, reason = refused(messages(ASKED, *marks))
    assert place == "messages[2]" and "type data.ignore_columns=loss" in reason
    assert parse(messages(ASKED, *marks), ignore=["loss"]).messages[1].learned


def test_calls_that_are_left_out():
    raw = messages(ASKED, calling(NOW, content="a"), tools=BARE)
    assert parse(raw, ignore=["tools", "tool_calls"]) == Example([Message("user", "q"), Message("assistant", "a")])
    assert refused(OPENAI, ignore=["tools", "tool_calls"]) == (
        "messages[2]", "the result of a tool, and the turn before it calls none; leave the result out, or write the call",
    )  # fmt: skip


# pairs, feedback, prompts


def test_prompt_and_completion_as_lists_of_turns(tmp_path):
    """As TRL has them: a result in the completion belongs to a call in either."""
    turns = OPENAI["messages"]
    for at in (1, 2, 3):
        record = {"prompt": turns[:at], "completion": turns[at:4], "tools": WRAPPED}
        path = tmp_path / f"{at}.jsonl"
        path.write_text(of_json(record) + "\n", encoding="utf-8")
        (example,) = load(find(str(path), tmp_path, []), dataset_dir=tmp_path, package_data=tmp_path).examples
        assert example == replace(EXAMPLE, messages=EXAMPLE.messages[:4])


def test_examples_travel_to_the_processes_that_encode():
    assert pickle.loads(pickle.dumps(EXAMPLE)) == EXAMPLE


def test_answers_of_a_pair_may_call(shared: Path):
    turns = [said("user", ASK)]
    raw = {
        **messages(*turns, tools=BARE), "chosen": calling(("get_weather", {"city": "北京"}, "")), "rejected": said("assistant", "不知道"),
    }  # fmt: skip
    example = parse(raw)
    assert (example.kind, example.chosen, example.rejected) == ("ranked pairs", "", "不知道")
    assert example.chosen_calls == (ToolCall("get_weather", {"city": "北京"}, "call00001"),) and example.needs_tools
    encoder, template = small_encoder(shared, "qwen3", kind=PairEncoder, every_answer=False)
    (row,), _ = encoder.encode([example])
    called = [said("user", ASK), said("assistant", "", tool_calls=[call.as_openai() for call in example.chosen_calls])]
    behind = template.behind(called, WRAPPED, enable_thinking=False)
    assert learned_texts(encoder.tokenizer, row) == [f"{behind}<|im_end|>"] and row["answer"] == behind.strip()
    assert row["rejected"] == "不知道"
    after = {
        **messages(*turns, calling(("get_weather", {}, "")), said("tool", "晴"), tools=BARE),
        "chosen": "晴。",
        "rejected": "雨。",
    }
    assert parse(after).messages[-1] == Message("tool", "晴", call_id="call00001")
    dialogues = {key: [*turns, calling(("get_weather", {}, "")), said("tool", "晴"), said("assistant", text)]
                 for key, text in (("chosen", "晴。"), ("rejected", "雨。"))}  # fmt: skip
    spec = DatasetSpec(
        name="x", formatting="messages", columns={"chosen": "chosen", "rejected": "rejected"}, ranking=True
    )
    assert parser("messages")(dialogues, spec) == replace(parse(after), tools=())


def test_feedback_and_prompts_with_tools(shared: Path):
    raw = messages(
        said("user", ASK), calling(("get_weather", {}, "")), said("tool", "晴"), END, tools=BARE, kto_tag=True
    )
    encoder, template = small_encoder(shared, "qwen3", kind=FeedbackEncoder)
    (row,), _ = encoder.encode([parse(raw)])
    learned = [text for part in (row, *row["earlier"]) for text in learned_texts(encoder.tokenizer, part)]
    assert row["is_desirable"] is True and any("get_weather" in text for text in learned)
    prompts, _ = small_encoder(shared, "qwen3", kind=PromptEncoder, every_answer=False)
    pair = Example(parse(raw).messages[:-1], chosen="晴。", rejected="雨。", tools=tuple(WRAPPED))
    for example in (pair, parse(raw)):
        (row,), _ = prompts.encode([example])
        turns = openai_turns(replace(example, messages=example.messages[:3]))
        text = template.render(turns, WRAPPED, add_generation_prompt=True, enable_thinking=False)
        assert prompts.tokenizer.decode(row["input_ids"]) == text


def test_a_prompt_as_text_shows_calls():
    turns = EXAMPLE.messages[:2]
    assert prompt_text(turns) == f"user: {ASK}\nassistant: {THOUGHT_TO}\nget_weather({of_json(ARGUMENTS)})"
    silent = [turns[0], turns[1]._replace(content="")]
    assert prompt_text(silent) == f"user: {ASK}\nassistant: get_weather({of_json(ARGUMENTS)})"


# files


FIRST = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
SECOND = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"enum": [1, 2]}}},
}
PAIRS_OF_RECORDS = {
    "openai": [
        messages(ASKED, calling(("get_weather", {"city": "x"}, "a")), said("tool", "y", tool_call_id="a"), END, tools=[FIRST]),
        messages(ASKED, calling(("add", {"a": 1, "b": 2}, "b")), tools=[SECOND, FIRST]),
    ],
    "glm4": [
        messages(said("system", "", tools=[FIRST]), ASKED, said("assistant", '{"city": null}', metadata="get_weather"), said("observation", "y"), END),
        messages(said("system", "s", tools=[SECOND]), ASKED, END),
    ],
    "chatglm3": [
        {"conversations": [ASKED, {"role": "tool", "name": "get_weather", "parameters": {"city": "x"}, "observation": {"t": 1}}, END], "tools": [FIRST]},
        {"conversations": [ASKED, {"role": "tool", "name": "add", "parameters": {"a": 1}, "observation": {"sum": 2}}, END], "tools": [SECOND]},
    ],
    "sharegpt": [
        {"conversations": [spoke("human", "q"), spoke("function_call", '{"name": "f", "arguments": {"a": null}}')], "tools": of_json([FIRST])},
        {"conversations": [spoke("human", "q"), spoke("gpt", "a")], "tools": "[]"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS_OF_RECORDS)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_structs_of_parquet_have_no_keys_of_other_records(tmp_path, name, suffix):
    """Arrow gives each struct the keys of all; those of others are neither arguments nor parts of a description."""
    records, path = PAIRS_OF_RECORDS[name], tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(of_json(record) + "\n" for record in records), encoding="utf-8")
    got = load(find(str(path), tmp_path, []), dataset_dir=tmp_path, package_data=tmp_path)
    assert [*got.examples] == [parse(record) for record in records] and got.bad == []


def test_an_entry_that_names_its_tools(tmp_path):
    record = {"conversations": SHAREGPT["conversations"], "functions": SHAREGPT["tools"]}
    (tmp_path / "a.json").write_text(of_json([record]), encoding="utf-8")
    entry = {
        "file_name": "a.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "functions"},
    }
    (tmp_path / "dataset_info.json").write_text(of_json({"x": entry}), encoding="utf-8")
    got = load(find("x", tmp_path, []), dataset_dir=tmp_path, package_data=tmp_path)
    assert [*got.examples] == [EXAMPLE]
    by_path = load(find(str(tmp_path / "a.json"), tmp_path, []), dataset_dir=tmp_path, package_data=tmp_path)
    assert [*by_path.examples] == [EXAMPLE]


def test_a_column_of_tools_that_describes_none_is_a_part_of_the_question(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(of_json({"instruction": "q", "output": "a", "tools": "hammer"}) + "\n")
    with pytest.raises(DataError, match="has tools, which is not read"):
        find(str(path), tmp_path, [])
    path.write_text(of_json({"instruction": "q", "output": "a", "tools": of_json(BARE)}) + "\n")
    (example,) = load(find(str(path), tmp_path, []), dataset_dir=tmp_path, package_data=tmp_path).examples
    assert example.tools == tuple(WRAPPED)


def test_the_records_of_the_page_on_data_are_read_alike():
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    section = page[page.index("## Tools") : page.index("## What is learned")]
    examples = [parse(json.loads(text)) for text in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
    told = [[(turn.role, turn.content, len(turn.tool_calls)) for turn in example.messages] for example in examples]
    assert len(told) == 4 and told == [told[0]] * 4
    assert all(example.tools[0]["function"]["name"] == "get_weather" for example in examples)
