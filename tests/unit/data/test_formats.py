"""Every record shape: what it reads, and what it says of a record that it cannot read."""

import pytest

from glmtuner.data.catalog import format_and_columns
from glmtuner.data.formats import parser
from glmtuner.data.records import BadRecord, Example, Message
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import UnknownName


def parse(raw, formatting, columns=None, tags=None, ranking=False, **keys):
    formatting, named = format_and_columns(formatting, columns or {}, ranking)
    ranking = ranking or "chosen" in named
    spec = DatasetSpec(name="x", formatting=formatting, columns=named, tags=tags or {}, ranking=ranking, **keys)
    return parser(formatting)(raw, spec)


def turns(example):
    return [(message.role, message.content) for message in example.messages]


def refused(raw, *shape, **options):
    with pytest.raises(BadRecord) as caught:
        parse(raw, *shape, **options)
    return caught.value.field, caught.value.reason


def test_an_unknown_formatting_names_those_there_are():
    with pytest.raises(
        UnknownName, match=r"no formatting named 'alpcaa'; did you mean 'alpaca'.*known: alpaca, .*messages, sharegpt"
    ):
        parser("alpcaa")


def test_openai_is_another_word_for_messages():
    assert parser("openai") is parser("messages")


# alpaca

Q = [("user", "q"), ("assistant", "a")]
WITH_HISTORY = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
ALPACA_PAIR = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, Q),
        ({"instruction": "q", "input": None, "output": "a"}, Q),
        ({"instruction": "q", "output": "a"}, Q),
        ({"instruction": "q", "input": "more", "output": "a"}, [("user", "q\nmore"), ("assistant", "a")]),
        ({"instruction": "", "input": "q", "output": "a"}, Q),
        ({"instruction": " q ", "input": "  ", "output": "a\n"}, [("user", " q "), ("assistant", "a\n")]),
    ],
)
def test_alpaca_joins_prompt_and_query(raw, expected):
    assert turns(parse(raw, "alpaca")) == expected


@pytest.mark.parametrize("history", [None, [], [["q0", "a0"]], [("q0", "a0"), ("q1", "a1")]])
def test_alpaca_history_comes_first(history):
    example = parse({"instruction": "q", "output": "a", "history": history}, "alpaca", WITH_HISTORY)
    earlier = [(role, text) for pair in history or [] for role, text in zip(("user", "assistant"), pair, strict=True)]
    assert turns(example) == [*earlier, *Q]


def test_alpaca_reads_history_and_system_unless_an_entry_names_other_columns():
    raw = {"instruction": "q", "output": "a", "history": [["x", "y"]], "system": "s"}
    assert turns(parse(raw, "alpaca")) == [("system", "s"), ("user", "x"), ("assistant", "y"), *Q]
    assert turns(parse(raw, "alpaca", {"prompt": "instruction", "response": "output"})) == Q


def test_alpaca_system_and_feedback():
    columns = {**WITH_HISTORY, "system": "system", "kto_tag": "label"}
    example = parse({"instruction": "q", "output": "a", "system": "s", "label": False}, "alpaca", columns)
    assert turns(example) == [("system", "s"), *Q]
    assert example.desirable is False
    assert parse({"instruction": "q", "output": "a", "label": " True"}, "alpaca", columns).desirable is True


@pytest.mark.parametrize("ranking", [True, False])
def test_alpaca_takes_the_first_two_of_a_list_of_answers(ranking):
    example = parse({"instruction": "q", "output": ["good", "bad", "worse"]}, "alpaca", ranking=ranking)
    assert example == Example([Message("user", "q")], chosen="good", rejected="bad")


def test_alpaca_pairs_in_two_columns():
    example = parse({"instruction": "q", "chosen": "good", "rejected": "bad"}, "alpaca", ALPACA_PAIR)
    assert (turns(example), example.chosen, example.rejected) == ([("user", "q")], "good", "bad")


@pytest.mark.parametrize(
    ("raw", "columns", "field", "reason"),
    [
        ({"instruction": "q", "output": ""}, {}, "output", "empty answer"),
        ({"instruction": "q", "output": " \n"}, {}, "output", "empty answer"),
        ({"instruction": " ", "output": "a"}, {}, "instruction", "empty prompt"),
        ({"instruction": "q", "output": None}, {}, "output", "missing; the record has instruction, output"),
        ({"instruction": "q", "answer": "a"}, {}, "output", "missing; the record has instruction, answer"),
        ({"instruction": "q", "output": 7}, {}, "output", "text is expected, got 7 (int)"),
        ({"instruction": ["q"], "output": "a"}, {}, "instruction", "text is expected, got ['q'] (list)"),
        ({"instruction": "q", "input": 3.5, "output": "a"}, {}, "input", "text is expected, got 3.5 (float)"),
        ({"instruction": "q", "output": "\ud83d"}, {}, "output", "half of a surrogate pair"),
        ({"instruction": "q", "output": []}, {}, "output", "empty answer: a list of none"),
        ({"instruction": "q", "output": ["a", " "]}, {}, "output[1]", "empty answer"),
        (
            {"instruction": "q", "output": "a", "history": "x"},
            WITH_HISTORY,
            "history",
            "a list of [prompt, answer] pairs",
        ),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, WITH_HISTORY, "history[0]", "got a list of 1"),
        ({"instruction": "q", "output": "a", "history": [["x", 2]]}, WITH_HISTORY, "history[0][1]", "got 2 (int)"),
        ({"instruction": "q", "output": "a", "history": [[1, "y"]]}, WITH_HISTORY, "history[0][0]", "got 1 (int)"),
        (
            {"instruction": "q", "chosen": "good"},
            ALPACA_PAIR,
            "rejected",
            "missing; the record has instruction, chosen",
        ),
        (
            {"instruction": "q", "output": "a", "l": 1},
            {**WITH_HISTORY, "kto_tag": "l"},
            "l",
            "true or false is expected",
        ),
    ],
)
def test_alpaca_says_what_is_wrong(raw, columns, field, reason):
    place, message = refused(raw, "alpaca", columns)
    assert place == field
    assert reason in message


def test_alpaca_ranking_needs_two_answers():
    assert refused({"instruction": "q", "output": "a"}, "alpaca", ranking=True) == (
        "output",
        "ranking needs a list of two answers, the better one first, got 'a' (str)",
    )


# sharegpt and messages


def sharegpt(*pairs):
    return [{"from": role, "value": content} for role, content in pairs]


def openai(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


HUMAN, GPT = ("human", "q"), ("gpt", "a")
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def test_sharegpt_conversation_with_system():
    raw = {"conversations": sharegpt(("system", "s"), HUMAN, GPT, ("human", "q2"), ("gpt", "a2"))}
    assert turns(parse(raw, "sharegpt")) == [("system", "s"), *Q, ("user", "q2"), ("assistant", "a2")]


def test_sharegpt_system_column_yields_to_a_system_turn():
    columns = {"messages": "conversations", "system": "system"}
    assert turns(parse({"conversations": sharegpt(HUMAN, GPT), "system": "s"}, "sharegpt", columns))[0] == (
        "system",
        "s",
    )
    raw = {"conversations": sharegpt(("system", "own"), HUMAN, GPT), "system": "s"}
    assert turns(parse(raw, "sharegpt", columns))[0] == ("system", "own")


def test_sharegpt_tags_rename_keys_and_roles():
    raw = {"messages": openai(("user", "q"), ("assistant", "a")), "label": True}
    example = parse(raw, "sharegpt", {"messages": "messages", "kto_tag": "label"}, OPENAI_TAGS)
    assert (turns(example), example.desirable) == (Q, True)


@pytest.mark.parametrize("answers", [sharegpt(("gpt", "good"), ("gpt", "bad")), ["good", "bad"]])
def test_sharegpt_pairs_are_turns_or_texts(answers):
    raw = {"conversations": sharegpt(HUMAN), "chosen": answers[0], "rejected": answers[1]}
    assert parse(raw, "sharegpt", ranking=True) == Example([Message("user", "q")], chosen="good", rejected="bad")


@pytest.mark.parametrize(
    ("conversation", "field", "reason"),
    [
        (sharegpt(GPT), "conversations[0]", "starts with an assistant turn"),
        (sharegpt(("system", "s"), GPT), "conversations[1]", "starts with an assistant turn"),
        (sharegpt(HUMAN, HUMAN, GPT), "conversations[1]", "two user turns in a row"),
        (sharegpt(HUMAN, GPT, GPT), "conversations[2]", "two assistant turns in a row"),
        (sharegpt(HUMAN, GPT, HUMAN), "conversations[2]", "the last user turn has no answer"),
        (sharegpt(HUMAN, ("gpt", " ")), "conversations[1].value", "empty answer"),
        (sharegpt(("human", ""), GPT), "conversations[0].value", "empty prompt"),
        (sharegpt(HUMAN, GPT, HUMAN, ("gpt", 3)), "conversations[3].value", "text is expected, got 3 (int)"),
        (sharegpt(HUMAN, ("gpt", None)), "conversations[1].value", "missing answer"),
        (sharegpt(HUMAN, GPT, ("system", "s")), "conversations[2]", "a system turn after the conversation has begun"),
        (
            sharegpt(HUMAN, ("bard", "x")),
            "conversations[1].from",
            "unknown role 'bard' (str); known: human, gpt, system, function_call, observation",
        ),
        ([{"value": "q"}], "conversations[0].from", "missing; the turn has value"),
        ([{"from": "human"}], "conversations[0].value", "missing prompt"),
        (["q", "a"], "conversations[0]", "an object with 'from' and 'value' is expected, got 'q' (str)"),
        ([], "", "no user turn"),
        (sharegpt(("system", "s")), "conversations[0]", "no user turn"),
        ("q", "conversations", "a list of turns is expected, got 'q' (str)"),
        (None, "conversations", "missing; the record has conversations"),
    ],
)
def test_sharegpt_says_which_turn_is_wrong(conversation, field, reason):
    place, message = refused({"conversations": conversation}, "sharegpt")
    assert place == field
    assert reason in message


def test_sharegpt_pairs_end_with_the_user_and_answer_as_the_assistant():
    raw = {"conversations": sharegpt(HUMAN, GPT), "chosen": "x", "rejected": "y"}
    assert "ends with the user's turn" in refused(raw, "sharegpt", ranking=True)[1]
    raw = {"conversations": sharegpt(HUMAN), "chosen": {"from": "human", "value": "x"}, "rejected": "y"}
    field, reason = refused(raw, "sharegpt", ranking=True)
    assert field == "chosen.from" and "assistant" in reason and reason.endswith("got a turn of user")
    raw = {"conversations": sharegpt(HUMAN), "chosen": {"from": "gpt", "value": ""}, "rejected": "y"}
    assert refused(raw, "sharegpt", ranking=True) == ("chosen.value", "empty answer")


def test_messages_join_system_turns_and_text_parts():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    raw = {"messages": openai(("system", "s1"), ("system", "s2"), ("user", parts), ("assistant", "a"))}
    assert turns(parse(raw, "messages")) == [("system", "s1\ns2"), ("user", "q?"), ("assistant", "a")]


def test_messages_refuse_pictures():
    parts = [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {}}]
    assert refused({"messages": openai(("user", parts), ("assistant", "a"))}, "messages") == (
        "messages[0].content[1]",
        "a part of type 'text' is expected, got 'image_url' (str)",
    )


def test_messages_pairs_share_all_but_the_last_turn():
    columns = {"chosen": "chosen", "rejected": "rejected"}
    good, bad = openai(("user", "q"), ("assistant", "good")), openai(("user", "q"), ("assistant", "bad"))
    assert parse({"chosen": good, "rejected": bad}, "messages", columns) == Example(
        [Message("user", "q")], chosen="good", rejected="bad"
    )
    other = openai(("user", "q2"), ("assistant", "bad"))
    assert refused({"chosen": good, "rejected": other}, "messages", columns) == (
        "rejected",
        "its turns before the answer differ from those of chosen",
    )


def test_messages_prompt_and_completion_are_two_lists():
    raw = {"prompt": openai(("user", "q")), "completion": openai(("assistant", "a")), "label": False}
    columns = {"messages": "prompt", "response": "completion", "kto_tag": "label"}
    assert parse(raw, "messages", columns) == Example(
        [Message("user", "q"), Message("assistant", "a")], desirable=False
    )
    raw["completion"] = "a"
    assert turns(parse(raw, "messages", columns)) == Q


# what is legal, and was called broken

DONE = [("user", "q"), ("assistant", "a")]
BLANK_TURNS = sharegpt(HUMAN, ("gpt", ""), ("human", "q2"), ("gpt", "a2"))


@pytest.mark.parametrize(
    ("raw", "shape", "expected"),
    [
        ({"messages": openai(("system", ""), *DONE)}, ("messages",), DONE),
        ({"messages": openai(("system", None), *DONE)}, ("messages",), DONE),
        ({"messages": openai(("developer", "s"), *DONE)}, ("messages",), [("system", "s"), *DONE]),
        ({"messages": openai(("system", "s"), ("developer", "t"), *DONE)}, ("messages",), [("system", "s\nt"), *DONE]),
        ({"messages": openai(("system", " "), *DONE), "system": "s"}, ("messages",), [("system", "s"), *DONE]),
        ({"conversations": BLANK_TURNS}, ("sharegpt",), [("user", "q"), ("assistant", ""), ("user", "q2"), ("assistant", "a2")]),
        ({"turns": ["q", " ", "q2", "a2"]}, ("turns",), [("user", "q"), ("assistant", " "), ("user", "q2"), ("assistant", "a2")]),
        ({"instruction": "q", "output": "a", "history": [["x", ""]]}, ("alpaca", WITH_HISTORY), [("user", "x"), ("assistant", ""), *DONE]),
        ({"instruction": "q", "output": "a", "history": " "}, ("alpaca", WITH_HISTORY), DONE),
        ({"instruction": "q", "output": "a", "history": '[["x", "y"]]'}, ("alpaca", WITH_HISTORY), [("user", "x"), ("assistant", "y"), *DONE]),
        ({"instruction": "q", "output": ["a"]}, ("alpaca",), DONE),
        ({"text": "Human: x\nAssistant:\nHuman: q\nAssistant: a"}, ("transcript", {"prompt": "text"}), [("user", "x"), ("assistant", ""), *DONE]),
        ({"p": openai(("user", "q")), "c": openai(("assistant", "a"))}, ("messages", {"messages": "p", "response": "c"}), DONE),
        ({"p": openai(("user", "q")), "c": openai(("assistant", "a"))[0]}, ("messages", {"messages": "p", "response": "c"}), DONE),
    ],
)  # fmt: skip
def test_legal_records(raw, shape, expected):
    example = parse(raw, *shape)
    assert turns(example) == expected
    assert [message.learned for message in example.messages if message.role == "assistant"] == [
        bool(content.strip()) for role, content in expected if role == "assistant"
    ]  # an empty answer is context


# marks, thoughts, and other keys of turns


def one_turn(**keys):
    return {"messages": [*openai(("user", "q")), {"role": "assistant", "content": "a", **keys}]}


@pytest.mark.parametrize(
    ("keys", "learned"),
    [({"weight": 0}, False), ({"weight": 1.0}, True), ({"loss": False}, False), ({"train": "false"}, False), ({"training": True}, True),
     ({"weight": None}, True), ({"weight": 1, "loss": False}, False), ({}, True)],
)  # fmt: skip
def test_marks_of_turns(keys, learned):
    assert parse(one_turn(**keys), "messages").messages[-1] == Message("assistant", "a", learned)
    assert parse(one_turn(**keys), "messages", ignore_columns=[*keys]).messages[-1].learned


@pytest.mark.parametrize(
    ("keys", "weight"), [({"weight": 0.5}, 0.5), ({"loss": 2}, 2), ({"weight": 0.5, "loss": 3, "train": True}, 1.5), ({"weight": "0.25"}, 0.25)]
)  # fmt: skip
def test_weights_of_turns(keys, weight):
    assert parse(one_turn(**keys), "messages").messages[-1] == Message("assistant", "a", True, weight=weight)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts(key):
    assert parse(one_turn(**{key: "t"}), "messages").messages[-1] == Message("assistant", "a", True, "t")
    assert parse(one_turn(**{key: ""}), "messages").messages[-1].reasoning == ""
    assert parse(one_turn(**{key: "t"}), "messages", ignore_columns=[key]).messages[-1].reasoning == ""
    assert parse(one_turn(**{key: "t", "reasoning": "t"}), "messages").messages[-1].reasoning == "t"


@pytest.mark.parametrize(
    ("keys", "field", "reason"),
    [
        ({"train": 0.5}, "train", "0, 1, true or false, got 0.5 (float); type data.ignore_columns=train"),
        ({"weight": -1}, "weight", "true, false, 0 or a number from 1e-06 to 1e+06, got -1 (int); type data.ignore_columns=weight"),
        ({"weight": float("nan")}, "weight", "got nan (float)"),
        ({"loss": "no"}, "loss", "got 'no' (str)"),
        ({"reasoning": "x", "thinking": "y"}, "reasoning", "differs from thinking"),
        ({"reasoning_content": 3}, "reasoning_content", "text is expected, got 3 (int)"),
        ({"images": ["x.png"]}, "images", "images are not supported; leave such records out, or type data.ignore_columns=images"),
        ({"audio": {"id": "x"}}, "audio", "sounds are not supported"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail", "marks of parts of an answer are not supported"),
    ],
)  # fmt: skip
def test_keys_of_turns_that_cannot_be_obeyed(keys, field, reason):
    place, message = refused(one_turn(**keys), "messages")
    assert place == f"messages[1].{field}"
    assert reason in message


def test_only_answers_can_be_learned():
    asks = {"messages": [{"role": "user", "content": "q", "train": True}, *openai(("assistant", "a"))]}
    assert refused(asks, "messages")[1].startswith("a turn of user is marked as learned, and only answers are")
    asks["messages"][0] = {"role": "user", "content": "q", "weight": 1, "train": False}  # as every turn may have it
    assert turns(parse(asks, "messages")) == Q
    asks["messages"][0]["reasoning"] = "t"
    assert "only an answer has reasoning" in refused(asks, "messages")[1]


def test_marks_and_thoughts_of_ranked_answers_are_refused():
    columns = {"messages": "p", "chosen": "chosen", "rejected": "rejected"}
    for key, value, what in (
        ("weight", 0, "is marked as not learned"),
        ("weight", 2, "has a weight of its own"),
        ("reasoning", "t", "has reasoning"),
    ):
        raw = {"p": openai(("user", "q")), "chosen": {"role": "assistant", "content": "a", key: value}, "rejected": "b"}
        assert what in refused(raw, "messages", columns)[1]


@pytest.mark.parametrize(("separator", "prompt"), [("\n", "q\nmore"), ("", "qmore"), (" | ", "q | more")])
def test_the_input_separator_stands_between_prompt_and_query(separator, prompt):
    raw = {"instruction": "q", "input": "more", "output": "a"}
    assert turns(parse(raw, "alpaca", input_separator=separator))[0] == ("user", prompt)
    assert turns(parse({**raw, "input": ""}, "alpaca", input_separator=separator))[0] == ("user", "q")


# turns, transcript, text


def test_turns_alternate_from_the_user():
    assert turns(parse({"turns": ["q", "a"]}, "turns")) == Q
    assert turns(parse({"conversations": ["q", "a"]}, "turns", {"messages": "conversations"})) == Q
    assert turns(parse({"data": ["q", "a"]}, "turns", {"prompt": "data"})) == Q


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        (["q"], "turns[0]", "the last user turn has no answer"),
        (["q", ""], "turns[1]", "empty answer"),
        (["q", 1], "turns[1]", "text is expected, got 1 (int)"),
        ([], "", "no user turn"),
        ("q", "turns", "a list of texts is expected"),
    ],
)
def test_turns_say_which_is_wrong(value, field, reason):
    place, message = refused({"turns": value}, "turns")
    assert place == field
    assert reason in message


def test_transcript_with_its_answer_in_a_column():
    dialogue = "Human: q1\nwhich goes on\nAssistant:a1\nHuman\uff1aq2\nAssistant:\n"
    assert turns(parse({"instruction": dialogue, "output": " a2\n"}, "transcript")) == [
        ("user", "q1\nwhich goes on"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
    ]


def test_transcript_pairs_are_whole_dialogues():
    raw = {
        "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: y\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: y\n\nAssistant: bad",
    }
    example = parse(raw, "transcript", {"chosen": "chosen", "rejected": "rejected"})
    assert (turns(example)[-1], example.chosen, example.rejected) == (("user", "y"), "good", "bad")
    raw["rejected"] = "\n\nHuman: q\n\nAssistant: bad"
    assert "differ from those of the chosen dialogue" in refused(raw, "transcript", ranking=True)[1]


@pytest.mark.parametrize(
    ("text", "user_tag", "assistant_tag"),
    [
        ("### Human: q### Assistant: a", "### Human:", "### Assistant:"),
        ("<user> q\n<assistant> a", "<user>", "<assistant>"),
        ("prompter: q\nassistant: a", "prompter:", "assistant"),
    ],
)
def test_transcript_markers_are_the_entrys(text, user_tag, assistant_tag):
    tags = {"user_tag": user_tag, "assistant_tag": assistant_tag}
    assert turns(parse({"text": text}, "transcript", {"messages": "text"}, tags)) == Q


def test_transcript_words_count_at_the_start_of_a_line_and_with_a_colon():
    text = "Human: is Human: a marker?\nHuman beings wonder\nAssistant: no"
    assert turns(parse({"text": text}, "transcript", {"prompt": "text"}))[0] == (
        "user",
        "is Human: a marker?\nHuman beings wonder",
    )


def test_transcript_goes_on_in_the_query():
    raw = {"instruction": "User: q\nAssistant: a", "input": "User: q2", "output": "a2"}
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    tags = {"user_tag": "User:", "assistant_tag": "Assistant:", "system_tag": "System:"}
    assert turns(parse(raw, "transcript", columns, tags)) == [*Q, ("user", "q2"), ("assistant", "a2")]
    raw["instruction"] = "System: s\nUser: q\nAssistant: a"
    assert turns(parse(raw, "transcript", columns, tags))[0] == ("system", "s")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "the dialogue begins with 'hello' (str), not with 'Human'"),
        ("Human: q\nAssistant: ", "empty answer"),
        ("Human: q", "the last user turn has no answer"),
        ("Assistant: a", "starts with an assistant turn"),
        ("Human:\nAssistant: a", "empty prompt"),
        (" ", "empty"),
    ],
)
def test_transcript_says_what_is_wrong(text, reason):
    assert reason in refused({"text": text}, "transcript", {"prompt": "text"})[1]


def test_text_is_one_column():
    assert parse({"text": "once"}, "text") == Example(text="once")
    assert parse({"content": "once"}, "alpaca", {"prompt": "content"}) == Example(text="once")
    assert refused({"text": ""}, "text") == ("text", "empty text")
