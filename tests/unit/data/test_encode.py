"""Lengths: what is cut, what never is, how it is counted; and rows as padded batches."""

import pytest
import torch
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.collate import Collator
from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder, bisect_min
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.named import template_named

WORDS = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 20
SYSTEM, ASK, TOLD = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


@pytest.fixture(params=["glm4", "plain", "tokenizer"])
def encoder(request, tokenizer):
    """An encoder with 48 tokens for the source and 16 for the target."""

    def make(**options):
        options = {"max_source_length": 48, "max_target_length": 16, **options}
        return Encoder(template=template_named(request.param, tokenizer), tokenizer=tokenizer, **options)

    return make


def encode_one(encoder, *messages):
    rows, counts = encoder.encode([Example(list(messages))])
    return rows[0], counts


def untouched(encoder, *messages):
    """The tokens of the same turns with room for all of them."""
    roomy = Encoder(
        template=encoder.template, tokenizer=encoder.tokenizer, max_source_length=10**6, max_target_length=10**6
    )
    return encode_one(roomy, *messages)[0]


def closing_marker(encoder):
    """What the template writes between a question and its answer: what the ends of two prompts have in common."""
    one, two = (untouched(encoder, ASK(text), TOLD("a"))["prompt_ids"] for text in ("x", "9"))
    same = 0
    while one[-1 - same] == two[-1 - same]:
        same += 1
    assert same
    return one[-same:]


def test_what_fits_is_left_alone(encoder):
    messages = [SYSTEM("s"), ASK("q"), TOLD("a"), ASK("r"), TOLD("b")]
    row, counts = encode_one(encoder(), *messages)
    assert row == untouched(encoder(), *messages)
    assert counts == Counts(
        records=1, tokens=len(row["input_ids"]), learned_tokens=sum(label != IGNORE_INDEX for label in row["labels"])
    )
    assert row["answer"] == "b" and row["prompt"] == "system: s\nuser: q\nassistant: a\nuser: r"
    assert encode_one(encoder(), ASK("q"), TOLD("a"))[0]["prompt"] == "q"


def test_the_prompt_is_what_stands_before_the_answer(encoder):
    for messages in (
        [ASK("q"), TOLD("a")],
        [ASK(WORDS), TOLD(WORDS)],
        [SYSTEM(WORDS), ASK("q"), TOLD("a"), ASK("r"), TOLD("b")],
    ):
        row, _ = encode_one(encoder(every_answer=False), *messages)
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        assert first == len(row["prompt_ids"])


def test_a_long_question_loses_its_end_and_keeps_the_closing_marker(encoder):
    row, counts = encode_one(encoder(), ASK(WORDS), TOLD("a"))
    whole = untouched(encoder(), ASK(WORDS), TOLD("a"))
    marker = closing_marker(encoder())
    assert row["prompt_ids"][-len(marker) :] == marker
    assert WORDS.startswith(row["prompt"]) and 0 < len(row["prompt"]) < len(WORDS)
    assert 44 <= len(row["prompt_ids"]) <= 48  # no more was cut than had to be: a character is a few tokens at most
    assert (counts.prompts_cut, counts.turns_dropped, counts.answers_cut) == (1, 0, 0)
    assert counts.tokens_cut == len(whole["input_ids"]) - len(row["input_ids"])
    answer = len(whole["prompt_ids"])
    assert row["labels"][len(row["prompt_ids"]) :] == whole["labels"][answer:]


def test_the_oldest_pairs_go_first(encoder):
    pairs = [turn for number in range(8) for turn in (ASK(f"question {number}"), TOLD(f"answer {number}"))]
    messages = [SYSTEM("s"), *pairs]
    row, counts = encode_one(encoder(), *messages)
    kept = 8 - counts.turns_dropped
    assert 0 < counts.turns_dropped < 8
    assert row == untouched(encoder(), SYSTEM("s"), *pairs[-2 * kept :])
    one_more = untouched(encoder(), SYSTEM("s"), *pairs[-2 * (kept + 1) :])
    assert len(row["prompt_ids"]) <= 48 < len(one_more["prompt_ids"])
    whole = untouched(encoder(), *messages)
    assert counts.tokens_cut == len(whole["input_ids"]) - len(row["input_ids"])
    assert (counts.prompts_cut, counts.answers_cut) == (1, 0)


def test_history_goes_before_the_last_question_is_touched(encoder):
    row, counts = encode_one(encoder(), ASK(WORDS), TOLD("a"), ASK("the last question"), TOLD("b"))
    assert row == untouched(encoder(), ASK("the last question"), TOLD("b"))
    assert counts.turns_dropped == 1
    row, counts = encode_one(encoder(), ASK("q"), TOLD("a"), ASK(WORDS), TOLD("b"))
    assert counts.turns_dropped == 1 and WORDS.startswith(row["prompt"])


def test_a_long_system_turn_is_cut_last(encoder):
    row, counts = encode_one(encoder(max_target_length=64), SYSTEM(WORDS), ASK("q"), TOLD("the answer"))
    marker = closing_marker(encoder())
    assert len(row["prompt_ids"]) <= 48 and row["prompt_ids"][-len(marker) :] == marker
    system, question = row["prompt"].removeprefix("system: ").split("\nuser: ")
    assert question == "" and WORDS.startswith(system) and system
    assert row["answer"] == "the answer" and counts.prompts_cut == 1
    short, counts = encode_one(encoder(), SYSTEM("Be brief."), ASK(WORDS), TOLD("a"))
    assert short["prompt"].startswith("system: Be brief.\nuser: 春眠") and counts.prompts_cut == 1


def test_no_room_for_the_template_is_an_error(tokenizer):
    encoder = Encoder(template=TEMPLATES["plain"], tokenizer=tokenizer, max_source_length=8, max_target_length=8)
    with pytest.raises(ConfigError, match=r"data\.max_source_length=8: .* (\d+) tokens; .*data\.max_source_length=\1$"):
        encode_one(encoder, ASK("q"), TOLD("a"))


@pytest.mark.parametrize("most", [2, 3, 16])
def test_a_cut_answer_keeps_its_stop_token(encoder, most):
    encoder = encoder(max_target_length=most)
    row, counts = encode_one(encoder, ASK("q"), TOLD(WORDS))
    whole = untouched(encoder, ASK("q"), TOLD(WORDS))
    prompt = len(row["prompt_ids"])
    assert len(row["input_ids"]) == prompt + most
    assert row["input_ids"][-1] == row["labels"][-1] == whole["labels"][-1]
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert row["input_ids"][:-1] == whole["input_ids"][: prompt + most - 1]
    assert (counts.answers_cut, counts.prompts_cut) == (1, 0)
    assert counts.tokens_cut == len(whole["input_ids"]) - len(row["input_ids"])
    assert (counts.tokens, counts.learned_tokens) == (len(row["input_ids"]), most)
    assert row["answer"] == WORDS  # the label of a prediction is the whole text


def test_counts_add_up_over_records_and_batches(encoder):
    examples = [
        Example([ASK("q"), TOLD("a")]),
        Example([ASK(WORDS), TOLD("a")]),
        Example([ASK("q"), TOLD(WORDS)]),
        Example([ASK(WORDS), TOLD("b"), ASK(WORDS), TOLD(WORDS)]),
    ]
    rows, counts = encoder().encode(examples)
    single = [encoder().encode([example]) for example in examples]
    assert rows == [part[0][0] for part in single]
    assert counts == sum((part[1] for part in single), Counts())
    assert (counts.records, counts.prompts_cut, counts.turns_dropped, counts.answers_cut) == (4, 2, 1, 2)
    assert counts.tokens == sum(len(row["input_ids"]) for row in rows)
    assert all(len(row["labels"]) == len(row["input_ids"]) <= 48 + 16 for row in rows)
    summary = counts.summary()
    assert "4 records" in summary and "2 prompts shortened (1 old turns dropped)" in summary
    assert "2 answers shortened" in summary


def test_every_answer_or_the_last_one(encoder):
    messages = [ASK("q"), TOLD("first"), ASK("r"), TOLD("second")]
    every, last = (encode_one(encoder(every_answer=which), *messages) for which in (True, False))
    assert every[0]["input_ids"] == last[0]["input_ids"]
    assert every[1].learned_tokens > last[1].learned_tokens
    different = [
        place for place, pair in enumerate(zip(every[0]["labels"], last[0]["labels"], strict=True)) if len({*pair}) > 1
    ]
    assert different and all(last[0]["labels"][place] == IGNORE_INDEX for place in different)
    assert max(different) < len(last[0]["prompt_ids"])


def test_the_source_prefix_stands_before_the_first_question(encoder):
    messages = [SYSTEM("s"), ASK("q"), TOLD("a"), ASK("r"), TOLD("b")]
    row, _ = encode_one(encoder(source_prefix="翻译："), *messages)
    assert row == untouched(encoder(), SYSTEM("s"), ASK("翻译：q"), *messages[2:])


@pytest.mark.parametrize(("holds_from", "most"), [(0, 5), (3, 5), (5, 5), (9, 5), (0, 0)])
def test_first_that_is_the_smallest_count(holds_from, most):
    assert bisect_min(most, lambda count: count >= holds_from) == min(holds_from, most)


# Batches

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt": "kept out"},
    {"input_ids": [8], "labels": [8]},
]


def test_a_batch_is_padded_on_the_right():
    batch = Collator(pad_id=0)(ROWS)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {values.dtype for values in batch.values()} == {torch.long}


def test_padding_counts_in_the_loss_when_asked_for():
    batch = Collator(pad_id=3, ignore_pad_token_for_loss=False)(ROWS)
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 3, 3]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_as_long_as_its_longest_row(tokenizer, count):
    encoder = Encoder(template=TEMPLATES["glm4"], tokenizer=tokenizer, max_source_length=48, max_target_length=16)
    rows, counts = encoder.encode([Example([ASK("q" * 3**place), TOLD("a")]) for place in range(count)])
    batch = Collator(pad_id=0)(rows)
    assert {values.shape for values in batch.values()} == {(count, max(len(row["input_ids"]) for row in rows))}
    assert int(batch["attention_mask"].sum()) == counts.tokens
    assert int((batch["labels"] != IGNORE_INDEX).sum()) == counts.learned_tokens
