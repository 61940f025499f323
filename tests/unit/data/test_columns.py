"""Which columns are read, judged over all records; what is printed of the others, and which of them are refused."""

import json

import pytest

from glmtuner.data import find, load
from glmtuner.data.columns import description, looks_needed
from glmtuner.errors import DataError


def write(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def loaded(path, ignore_columns=(), entry=None):
    """The examples of a file, and the line that says what was read as what."""
    if entry is None:
        spec = find(str(path), path.parent, [], ignore_columns=ignore_columns)
    else:
        (path.parent / "dataset_info.json").write_text(json.dumps({"x": {"file_name": path.name, **entry}}))
        spec = find("x", path.parent, [])
    loaded = load(spec, dataset_dir=path.parent, package_data=path.parent)
    examples = list(loaded.examples)
    assert loaded.bad == []
    return examples, description(spec, loaded.columns)


def turns(example):
    return [(message.role, message.content) for message in example.messages]


A = {"instruction": "q", "output": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("first", "later", "expected", "read"),
    [
        (A, {**A, "input": "more"}, [("user", "q\nmore")], "instruction+input -> prompt, output -> answer"),
        (A, {**A, "context": "more"}, [("user", "q\nmore")], "instruction+context -> prompt, output -> answer"),
        (
            A,
            {**A, "history": [["x", "y"]]},
            [("user", "x"), ("assistant", "y"), ("user", "q")],
            "instruction -> prompt, history -> earlier turns, output -> answer",
        ),
        (A, {**A, "system": "s"}, [("system", "s"), ("user", "q")], "instruction -> prompt, output -> answer, system -> system prompt"),
        (CHAT, {**CHAT, "system": "s"}, [("system", "s"), ("user", "q")], "messages -> turns, system -> system prompt"),
        ({"question": None, "prompt": "p", "answer": "a"}, {"question": "", "prompt": "q", "answer": "a"}, [("user", "q")], "prompt -> prompt, answer -> answer"),
        ({"conversations": [], **{"id": 1}}, {"conversations": CHAT["messages"]}, [("user", "q")], "conversations -> turns; not used: id"),
    ],
)  # fmt: skip
def test_a_column_that_comes_later_is_read(tmp_path, first, later, expected, read):
    path = write(tmp_path, first, later)
    spec = find(str(path), tmp_path, [])
    got = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
    examples = list(got.examples)
    assert turns(examples[-1])[:-1] == expected
    columns = {**dict.fromkeys(first), **got.columns} if got.bad else got.columns
    assert description(spec, columns) == read


def test_a_feedback_column_and_a_list_of_answers_may_come_later(tmp_path):
    assert (
        find(str(write(tmp_path, {**A, "label": None}, {**A, "label": False})), tmp_path, []).columns["kto_tag"]
        == "label"
    )
    spec = find(str(write(tmp_path, {**A, "output": ["a"]}, {**A, "output": ["a", "b"]}, name="b.jsonl")), tmp_path, [])
    assert spec.ranking


@pytest.mark.parametrize(
    "column",
    ["document", "passage", "input_text", "systemPrompt", "table", "options", "tools", "images", "背景材料", "question", "reasoning_content"],
)  # fmt: skip
def test_a_part_of_the_question_is_refused_unless_it_is_to_be_ignored(tmp_path, column):
    path = write(tmp_path, A, {**A, column: ""}, {**A, column: "what the question is about"})
    with pytest.raises(DataError) as caught:
        find(str(path), tmp_path, [])
    message = str(caught.value)
    assert (
        f"record 3 has {column}, which is not read (instruction -> prompt, output -> answer) and looks like" in message
    )
    assert f"type data.ignore_columns={column} to leave it out" in message and '"columns": {' in message
    examples, read = loaded(path, ignore_columns=[column])
    assert [turns(example) for example in examples] == [[("user", "q"), ("assistant", "a")]] * 3
    assert read == f"instruction -> prompt, output -> answer; not used: {column}"


@pytest.mark.parametrize(
    ("extra", "harmless"),
    [
        ({"id": "x1", "source": "web", "category": "closed", "language": "en", "prompt_id": "7", "context_length": "12"}, True),
        ({"context": "  ", "tools": [], "images": None}, True),
        ({"text": "### Instruction: q ### Response: a"}, True),  # the conversation as one text, as in tatsu-lab/alpaca
        ({"prompt": "q"}, True),  # the question again
        ({"score": 4.5, "tokens": 12}, True),
        ({"text": "### Instruction: q, and more"}, False),
    ],
)  # fmt: skip
def test_metadata_and_repetitions_are_named_and_harmless(tmp_path, extra, harmless):
    path = write(tmp_path, {**A, **extra})
    if not harmless:
        with pytest.raises(DataError, match="looks like a part of the question"):
            find(str(path), tmp_path, [])
        return
    _, read = loaded(path)
    held = [name for name, value in extra.items() if value not in ("  ", [], None)]
    assert read == "instruction -> prompt, output -> answer" + (f"; not used: {', '.join(held)}" if held else "")


def test_the_keys_of_turns_that_are_not_used_are_named(tmp_path):
    chat = [
        {"role": "user", "content": "q", "name": "ann", "id": 3},
        {"role": "assistant", "content": "a", "refusal": None},
    ]
    _, read = loaded(write(tmp_path, {"messages": chat}))
    assert read.startswith("messages -> turns; not used: messages.") and {"messages.id", "messages.name"} == {
        *read.partition("used: ")[2].split(", ")
    }


def test_another_key_than_that_of_the_role_does_not_say_whose_turn_it_is(tmp_path):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "role": "tool", "name": "x"}]
    chat[0]["role"] = ["a"]
    examples, read = loaded(write(tmp_path, {"conversations": chat}), entry={"formatting": "sharegpt"})
    assert turns(examples[0]) == [("user", "q"), ("assistant", "a")]
    assert read == "conversations -> turns; not used: conversations.name"


def test_an_entry_that_names_no_columns_reads_history_and_system_and_refuses_the_rest(tmp_path):
    records = [{**A, "history": [["x", "y"]], "system": "s"}]
    examples, read = loaded(write(tmp_path, *records), entry={})
    assert turns(examples[0])[0] == ("system", "s") and "history -> earlier turns" in read
    path = write(tmp_path, *records, {**A, "document": "d"})
    with pytest.raises(DataError, match="record 2 has document, which is not read"):
        loaded(path, entry={})
    named = {"columns": {"prompt": "instruction", "response": "output"}}  # who names columns leaves the others out
    assert (
        loaded(path, entry=named)[1] == "instruction -> prompt, output -> answer; not used: history, system, document"
    )
    assert len(loaded(path, entry={"ignore_columns": ["document"]})[0]) == 2


@pytest.mark.parametrize(("weight", "kept"), [(0, False), (1, True), (False, False), ("true", True), (None, True)])
def test_a_record_may_be_marked_as_not_learned(tmp_path, weight, kept):
    path = write(tmp_path, {**A, "weight": 1}, {**A, "weight": weight})
    examples, read = loaded(path)
    assert [example.learned for example in examples] == [True, kept]
    assert "weight -> weight in the loss" in read


def test_a_record_may_weigh_more_or_less_than_others(tmp_path):
    path = write(tmp_path, {**A, "weight": 1}, {**A, "weight": 0.5}, {**A, "weight": 3}, A)
    assert [example.weight for example in loaded(path)[0]] == [1, 0.5, 3, 1]
    assert {example.weight for example in loaded(path, ignore_columns=["weight"])[0]} == {1}
    table = tmp_path / "table.csv"
    table.write_text("instruction,output,weight\nq,a,0.5\nq,a,2\nq,a,\nq,a,0\n")
    examples, read = loaded(table)
    assert [(example.weight, example.learned) for example in examples] == [
        (0.5, True),
        (2, True),
        (1, True),
        (1, False),
    ]
    assert "weight -> weight in the loss" in read


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), 1e9, 1e-9])
def test_weights_that_mean_nothing_are_refused_with_their_place(tmp_path, weight):
    path = write(tmp_path, {**A, "weight": 1}, {**A, "weight": weight})
    spec = find(str(path), tmp_path, [])
    found = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
    assert len(list(found.examples)) == 1
    assert (
        "record 2: field weight: a mark of what is learned is true, false, 0 or a number from 1e-06 to 1e+06, got"
        in str(found.bad[0])
    )


def test_a_numeric_loss_of_a_record_is_a_measurement(tmp_path):
    examples, read = loaded(write(tmp_path, {**A, "loss": 1.25}))  # a measurement
    assert examples[0].learned and read.endswith("not used: loss")


@pytest.mark.parametrize(
    ("name", "needed"),
    [("input", True), ("InputText", True), ("inputs", True), ("input_id", False), ("prompt_source", False), ("SYSTEM", True),
     ("system_fingerprint", False), ("输入", True), ("id", False), ("", False), ("title", False), ("dialogue", True)],
)  # fmt: skip
def test_names(name, needed):
    assert looks_needed(name) is needed


def test_preference_sets_with_a_copy_of_the_prompt(tmp_path):
    """As in HuggingFaceH4/ultrafeedback_binarized: prompt, messages, and both dialogues."""
    good, bad = ([CHAT["messages"][0], {"role": "assistant", "content": text}] for text in "ab")
    record = {"prompt": "q", "prompt_id": "f00", "chosen": good, "rejected": bad, "messages": good, "score_chosen": 8.0}
    (example,), read = loaded(write(tmp_path, record))
    assert (turns(example), example.chosen, example.rejected) == ([("user", "q")], "a", "b")
    assert read.endswith("not used: prompt, prompt_id, messages, score_chosen")
