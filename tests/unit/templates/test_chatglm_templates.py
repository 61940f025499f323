"""ChatGLM's templates over its tokenizers: the ids that its published code and ChatGLM-Efficient-Tuning make."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stand_ins import write_parity

from glmtuner.data.encode import Encoder
from glmtuner.data.encoding import as_arrow
from glmtuner.data.mixing import with_earlier_answers
from glmtuner.data.records import Example, Message
from glmtuner.data.weights import label_weights, without_weights
from glmtuner.errors import ConfigError
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer, as_fast
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.named import template_named
from glmtuner.templates.tool_calls import ToolCall

SYSTEM, ASK, TOLD = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
TURNS = [
    SYSTEM("简短地回答。"),
    ASK("你好"),
    TOLD("你好，有什么可以帮你？"),
    ASK("1+1="),
    TOLD("2"),
    ASK("再见"),
    TOLD("再见！"),
]


@pytest.fixture(scope="module")
def tokenizers(upstream_files: Path) -> dict[str, Any]:
    first = ChatGLMTokenizer.from_pretrained(upstream_files / "tokenizer_v1")
    second = ChatGLMTokenizer.from_pretrained(upstream_files / "chatglm2_realvocab")
    return {"chatglm": first, "chatglm2": second, "chatglm3": second}


def encoder(tokenizers: dict[str, Any], name: str, **options: Any) -> Encoder:
    options = {"max_source_length": 512, "max_target_length": 512, **options}
    return Encoder(template=TEMPLATES[name], tokenizer=tokenizers[name], **options)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.sp.encode(tokenizer._prepare(text))


def test_chatglm_puts_its_control_tokens_between_prompt_and_answer(tokenizers):
    row = encoder(tokenizers, "chatglm").encode([Example([ASK("你是谁？"), TOLD("我是一个人工智能助手。")])])[0][0]
    prompt = ids(tokenizers["chatglm"], "[Round 1]\n\n问：你是谁？\n\n答：")
    answer = ids(tokenizers["chatglm"], "我是一个人工智能助手。")
    assert row["input_ids"] == [*prompt, 130001, 130004, *answer, 130005]
    assert row["labels"] == [IGNORE_INDEX] * (len(prompt) + 2) + [*answer, 130005]
    assert row["prompt_ids"] == [*prompt, 130001, 130004]


@pytest.mark.parametrize("words", ["its own", "spelled in ids"])
def test_chatglm2_trains_on_what_the_original_project_trained_on(request, golden_folder, tmp_path, words):
    """On its own records with the published tokenizer, and on the ids alone (see `stand_ins.write_parity`)."""
    if words == "its own":
        request.getfixturevalue("published_file")("tokenizer.model")
        path = request.getfixturevalue("real_records")("self_cognition")
        tokenizers = request.getfixturevalue("tokenizers")
    else:
        path = write_parity(tmp_path / "parity", golden_folder)
        tokenizers = {"chatglm2": ChatGLMTokenizer.from_pretrained(path.parent)}
    records = json.loads(path.read_text(encoding="utf-8"))
    examples = [Example([ASK(record["instruction"] + record["input"]), TOLD(record["output"])]) for record in records]
    rows, counts = encoder(tokenizers, "chatglm2", max_source_length=64, max_target_length=64).encode(examples)
    golden = json.loads((golden_folder / "parity_v2/rows.json").read_text(encoding="utf-8"))
    assert len(golden["input_ids"]) == len(rows) == 80
    assert [row["input_ids"] for row in rows] == golden["input_ids"]
    assert [row["labels"] for row in rows] == golden["labels"]
    assert (counts.answers_cut > 0) is (words == "its own")  # the truncation is the original's as well


def test_chatglm3_asks_as_its_published_code_does(published_file, tokenizers, golden_folder):
    published_file("tokenizer.model")
    tokenizer, template = tokenizers["chatglm3"], TEMPLATES["chatglm3"]
    golden = json.loads((golden_folder / "tokenizers/v3.json").read_text(encoding="utf-8"))
    assert len(golden["build_chat_input"]) == 5
    for case in golden["build_chat_input"]:
        messages, tools, wanted = [], [], case["input_ids"][0]
        for turn in [*(case["history"] or []), {"role": case["role"], "content": case["query"]}]:
            tools += [{"type": "function", "function": tool} for tool in turn.get("tools", ())]
            role, content, calls = {"observation": "tool"}.get(turn["role"], turn["role"]), turn["content"], ()
            if turn.get("metadata"):
                # its call begins with a space, which the maker's trainer does not write
                spaced, plain = ids(tokenizer, content), ids(tokenizer, content.strip())
                start = next(at for at in range(len(wanted)) if wanted[at : at + len(spaced)] == spaced)
                wanted = [*wanted[:start], *plain, *wanted[start + len(spaced) :]]
                content, calls = "", (ToolCall(turn["metadata"], {"symbol": "10111"}),)
            messages.append(Message(role, content, tool_calls=calls))
        (found,) = template.encode(tokenizer, [messages], [tools])
        assert found.input_ids == wanted
    assert any(turn.tool_calls for turn in messages)
    (called,) = template.encode(tokenizer, [messages[:2]])
    assert called.stop == 64797, "<|observation|> ends a call"
    assert template.stop_ids(tokenizer) == {2, 64795, 64797}


def test_chatglm3_learns_the_line_break_that_it_writes(tokenizers):
    row = encoder(tokenizers, "chatglm3").encode([Example([ASK("你好"), TOLD("好")])])[0][0]
    assert row["prompt_ids"][-1] == 64796
    learned = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert learned == [30910, 13, *ids(tokenizers["chatglm3"], "好"), 2]
    assert row["input_ids"] == [*row["prompt_ids"], *learned]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_every_answer_is_a_row_of_its_own(tokenizers, name):
    (row,), counts = encoder(tokenizers, name).encode([Example(TURNS)])
    alone = [encoder(tokenizers, name).encode([Example(TURNS[:end])])[0][0] for end in (3, 5, 7)]
    wanted = [{"input_ids": part["input_ids"], "labels": part["labels"]} for part in alone]
    assert row["earlier"] == [{**part, "weight": 1.0} for part in wanted[:2]]
    assert {name: row[name] for name in ("input_ids", "labels")} == wanted[2]
    assert counts.records == 1
    assert counts.tokens == sum(len(part["input_ids"]) for part in wanted)
    assert counts.learned_tokens == sum(label != IGNORE_INDEX for part in wanted for label in part["labels"])
    (last,), _ = encoder(tokenizers, name, every_answer=False).encode([Example(TURNS)])
    assert "earlier" not in last and last["labels"] == row["labels"]


def test_chatglm3_learns_all_answers_in_one_row(tokenizers):
    (row,), _ = encoder(tokenizers, "chatglm3").encode([Example(TURNS)])
    assert "earlier" not in row
    learned = [label for label in row["labels"] if label != IGNORE_INDEX]
    answers = [turn for turn in TURNS if turn.role == "assistant"]
    stops = [64795] * (len(answers) - 1) + [2]  # <|user|>, as in the maker's trainer; </s> at the end
    wanted = [
        [30910, 13, *ids(tokenizers["chatglm3"], turn.content), stop] for turn, stop in zip(answers, stops, strict=True)
    ]
    assert learned == [token for part in wanted for token in part]


def test_training_rows_are_spread_and_evaluation_rows_are_not(tokenizers):
    from datasets import Dataset
    from pyarrow import Table

    rows, _ = encoder(tokenizers, "chatglm2").encode([Example(TURNS), Example(TURNS[:3]), Example(TURNS[:5])])
    single, _ = encoder(tokenizers, "chatglm2").encode([Example(TURNS[:3])] * 2)  # no earlier answer in the whole batch
    table, without = (Dataset(Table.from_batches([as_arrow(found)])) for found in (rows, single))
    assert table.features == without.features
    spread = with_earlier_answers(without_weights(table))
    assert spread.column_names == ["input_ids", "labels"]
    wanted = [part for row in rows for part in (*row["earlier"], row)]
    assert [row["input_ids"] for row in spread] == [part["input_ids"] for part in wanted]
    assert [row["labels"] for row in spread] == [part["labels"] for part in wanted]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_answers_keep_their_weights_in_rows_of_their_own_and_in_one_row(tokenizers, name):
    """Half of the first answer, three times the second, the third as often as others; the record counts twice."""
    from datasets import Dataset
    from pyarrow import Table

    factors = iter((0.5, 3.0, 1.0))
    turns = [turn if turn.role != "assistant" else turn._replace(weight=next(factors)) for turn in TURNS]
    rows, _ = encoder(tokenizers, name).encode([Example(turns, weight=2.0), Example(TURNS)])
    spread = with_earlier_answers(Dataset(Table.from_batches([as_arrow(rows)])))
    found = []
    for row in spread:
        each = label_weights(row)
        assert len(each) == len(row["labels"])
        found += [weight for weight, label in zip(each, row["labels"], strict=True) if label != IGNORE_INDEX]
    opening = [30910, 13] if name == "chatglm3" else []
    counts = [len([*opening, *ids(tokenizers[name], turn.content), 2]) for turn in TURNS if turn.role == "assistant"]
    answers = zip([1.0, 6.0, 2.0, 1.0, 1.0, 1.0], [*counts, *counts], strict=True)
    assert found == [weight for weight, count in answers for _ in range(count)]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3"])
def test_a_long_prompt_keeps_its_closing_marker(tokenizers, name):
    long = "春眠不觉晓，处处闻啼鸟。" * 40
    options = {"max_source_length": 48, "max_target_length": 8}
    (row,), counts = encoder(tokenizers, name, **options).encode(
        [Example([ASK("q"), TOLD(long), ASK(long), TOLD(long)])]
    )
    for part in (row, *row.get("earlier", [])):
        start = next(place for place, label in enumerate(part["labels"]) if label != IGNORE_INDEX)
        assert start <= 48 and len(part["input_ids"]) == start + 8
        assert part["labels"][-1] == {"chatglm": 130005}.get(name, 2)
    text = tokenizers[name].decode(row["prompt_ids"])
    assert text.endswith({"chatglm": "答:", "chatglm2": "答：", "chatglm3": "<|assistant|>"}[name])
    assert counts.prompts_cut >= 1


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3"])
def test_no_text_becomes_a_control_token(tokenizers, name):
    tokenizer = tokenizers[name]
    dirt = " ".join(tokenizer.control) + "".join(tokenizer.control)
    clean, dirty = ([Message(turn.role, f"{turn.content}{extra}") for turn in TURNS] for extra in ("", dirt))

    def controls(messages: list[Message]) -> list[int]:
        (found,) = TEMPLATES[name].encode(tokenizer, [messages])
        return [token for token in found.input_ids if token in tokenizer.control_names]

    assert controls(dirty) == controls(clean)


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_jinja_template_gives_the_same_prompts(tokenizers, name):
    fast = as_fast(tokenizers[name])
    fast.chat_template = TEMPLATES[name].jinja()
    for end in (2, 4, 6):
        (found,) = TEMPLATES[name].encode(tokenizers[name], [TURNS[:end]])
        turns = [{"role": turn.role, "content": turn.content} for turn in TURNS[:end]]
        assert fast.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == found.input_ids


def test_a_jinja_template_on_a_tokenizer_without_offsets_is_refused(upstream_files):
    tokenizer = ChatGLMTokenizer.from_pretrained(upstream_files / "chatglm2_realvocab", chat_template="{{ messages }}")
    with pytest.raises(ConfigError, match=r"model\.template=tokenizer: ChatGLMTokenizer .*offsets.*chatglm3"):
        template_named("tokenizer", tokenizer)


def test_the_cache_s_key_changes_with_the_tokenizer_s_file(tokenizers, upstream_files, tmp_path):
    from glmtuner.data.prepare import serialized

    first, second = serialized(tokenizers["chatglm"]), serialized(tokenizers["chatglm2"])
    assert first != second
    shutil.copyfile(upstream_files / "chatglm2_realvocab/tokenizer.model", tmp_path / "tokenizer.model")
    assert serialized(ChatGLMTokenizer.from_pretrained(tmp_path)) == second


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_the_source_prefix_stands_before_the_whole_prompt_as_in_the_original_project(tokenizers, name):
    """Its `preprocess_data`: `prompt = prefix + tokenizer.build_prompt(query, history)`, and query is instruction + input."""
    messages = [ASK("早"), TOLD("Good morning"), ASK("译成英文午"), TOLD("Noon")]
    (row,), _ = encoder(tokenizers, name, source_prefix="请认真：").encode([Example(messages)])
    text = "请认真：[Round 1]\n\n问：早\n\n答：Good morning\n\n[Round 2]\n\n问：译成英文午\n\n答："
    first = "请认真：[Round 1]\n\n问：早\n\n答："
    around = {"chatglm": ([], [130001, 130004]), "chatglm2": ([64790, 64792], [])}[name]
    assert row["prompt_ids"] == [*around[0], *ids(tokenizers[name], text), *around[1]]
    assert (
        row["earlier"][0]["input_ids"][: len(around[0]) + 8]
        == [*around[0], *ids(tokenizers[name], first)][: len(around[0]) + 8]
    )
    assert row["prompt"].startswith("请认真：user: 早")


def test_marks_of_answers_where_a_row_teaches_one(tokenizers):
    made = encoder(tokenizers, "chatglm")
    turns = [ASK("a"), TOLD("b"), ASK("c"), TOLD("d"), ASK("e"), TOLD("f")]
    without = [Message(turn.role, turn.content, turn.content not in "bf") for turn in turns]
    (row,), counts = made.encode([Example(without)])
    (plain,), _ = made.encode([Example(turns[:4])])
    assert (row["input_ids"], row["labels"], row["earlier"]) == (plain["input_ids"], plain["labels"], [])
    assert counts.learned_tokens == sum(label != IGNORE_INDEX for label in row["labels"])
