"""Pairs, feedback, plain text and prompts as rows and batches."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.blocks import BlockEncoder
from glmtuner.data.encode import Encoder
from glmtuner.data.feedback import FeedbackCollator, FeedbackEncoder, answer_start, with_other_answers
from glmtuner.data.pairs import PairCollator, PairEncoder
from glmtuner.data.prompts import PromptCollator, PromptEncoder, prompts_of
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.named import template_named

ASK, TOLD = (lambda text, role=role: Message(role, text) for role in ("user", "assistant"))
LONG = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 10


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


@pytest.fixture(params=["glm4", "plain", "tokenizer"])
def make(request, tokenizer):
    def make(cls, **options):
        lengths = {"max_source_length": 48, "max_target_length": 16}
        return cls(template=template_named(request.param, tokenizer), tokenizer=tokenizer, **(lengths | options))

    return make


def alone(make, messages, every_answer=False):
    """The row of these turns as stage=sft makes it."""
    return make(Encoder, every_answer=every_answer).encode([Example(messages)])[0][0]


def test_the_kind_of_an_example():
    turns = [ASK("q")]
    assert [
        example.kind
        for example in (
            Example(text="t"), Example(turns, chosen="a", rejected="b"), Example([*turns, TOLD("a")]),
            Example([*turns, TOLD("a")], desirable=False),
        )
    ] == ["plain text", "ranked pairs", "single answers", "feedback"]  # fmt: skip


@pytest.mark.parametrize("before", [[], [ASK("早"), TOLD("早上好")]], ids=["one turn", "history"])
def test_both_answers_of_a_pair_stand_behind_the_same_prompt(make, before):
    turns = [*before, ASK("法国的首都是哪里？")]
    rows, counts = make(PairEncoder, every_answer=False).encode([Example(turns, chosen="巴黎。", rejected="是罗马。")])
    better, worse = (alone(make, [*turns, TOLD(text)]) for text in ("巴黎。", "是罗马。"))
    assert (rows[0]["input_ids"], rows[0]["labels"]) == (better["input_ids"], better["labels"])
    assert (rows[0]["rejected_ids"], rows[0]["rejected_labels"]) == (worse["input_ids"], worse["labels"])
    start = answer_start(better["labels"])
    assert rows[0]["input_ids"][:start] == rows[0]["rejected_ids"][:start]
    assert counts.learned_tokens == sum(label >= 0 for row in (better, worse) for label in row["labels"])
    assert (rows[0]["answer"], rows[0]["rejected"]) == ("巴黎。", "是罗马。")


def test_a_long_pair_is_cut_like_single_answers(make):
    """The prompt once, each answer to its own length; what was cut is counted."""
    rows, counts = make(PairEncoder, every_answer=False).encode([Example([ASK(LONG)], chosen=LONG, rejected="短")])
    sides = [(rows[0]["input_ids"], rows[0]["labels"]), (rows[0]["rejected_ids"], rows[0]["rejected_labels"])]
    starts = [answer_start(labels) for _, labels in sides]
    assert starts[0] == starts[1] <= 48
    assert sides[0][0][: starts[0]] == sides[1][0][: starts[0]]
    assert sum(label >= 0 for label in sides[0][1]) == 16
    assert (counts.prompts_cut, counts.answers_cut) == (1, 1)


def test_a_batch_of_pairs_has_the_better_answers_first(make):
    examples = [Example([ASK(q)], chosen=f"{q}好", rejected="不") for q in ("一", "二二", "三三三")]
    rows, _ = make(PairEncoder, every_answer=False).encode(examples)
    batch = PairCollator(pad_id=0)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 6
    for place, row in enumerate(rows):
        for half, name in ((0, "input_ids"), (3, "rejected_ids")):
            length = int(batch["attention_mask"][half + place].sum())
            assert batch["input_ids"][half + place, :length].tolist() == row[name]
            assert (batch["labels"][half + place, length:] == IGNORE_INDEX).all()


def test_feedback_is_crossed_with_the_next_rows_answer(make):
    examples = [Example([ASK(f"{n}是什么"), TOLD(f"答{n}")], desirable=n != "二") for n in ("一", "二", "三")]
    rows, _ = make(FeedbackEncoder, every_answer=False).encode(examples)
    assert [row["is_desirable"] for row in rows] == [True, False, True]
    crossed = with_other_answers(
        Dataset.from_list([{k: row[k] for k in ("input_ids", "labels", "is_desirable")} for row in rows])
    )
    batch = FeedbackCollator(pad_id=0)(list(crossed))
    assert batch["is_desirable"].tolist() == [True, False, True]
    for place in range(3):
        own, other = rows[place], rows[(place + 1) % 3]
        start, taken = answer_start(own["labels"]), answer_start(other["labels"])
        length = int(batch["attention_mask"][3 + place].sum())
        assert batch["input_ids"][3 + place, :length].tolist() == own["input_ids"][:start] + other["input_ids"][taken:]
        assert batch["labels"][3 + place, start:length].tolist() == other["input_ids"][taken:]
        assert (batch["labels"][3 + place, :start] == IGNORE_INDEX).all()


def test_blocks_hold_every_token_of_the_documents_once(make, tokenizer):
    texts = [LONG, "短文。", "Hello [gMASK] world", LONG[:30]]
    encoder = make(BlockEncoder, block_length=32)
    rows, counts = encoder.encode([Example(text=text) for text in texts])
    start, documents = encoder.template.documents(tokenizer, texts)
    body = [token for row in rows for token in row["input_ids"][len(start) :]]
    assert body == [token for document in documents for token in document]
    assert all(row["input_ids"][: len(start)] == start for row in rows)
    assert [len(row["input_ids"]) for row in rows[:-1]] == [32] * (len(rows) - 1)
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    assert (counts.records, counts.tokens) == (4, sum(len(row["input_ids"]) for row in rows))
    learned = sum(label >= 0 for row in rows for label in row["labels"][1:])  # the loss has no use for the first label
    assert counts.learned_tokens == learned
    control = tokenizer.convert_tokens_to_ids("[gMASK]")
    assert control not in body, "text never becomes a control token"


def test_a_block_that_holds_nothing_is_refused(tokenizer):
    encoder = BlockEncoder(
        template=template_named("glm4", tokenizer), tokenizer=tokenizer, block_length=3, max_source_length=8,
        max_target_length=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"stage\.block_length=3: .*2 tokens.*stage\.block_length=4$"):
        encoder.encode([Example(text="一")])


def test_prompts_are_those_of_single_answers_and_of_pairs(make):
    encoder = make(PromptEncoder, every_answer=False)
    turns = [ASK("早"), TOLD("早上好"), ASK("法国的首都是哪里？")]
    wanted = alone(make, [*turns, TOLD("x")])
    rows, counts = encoder.encode([Example([*turns, TOLD("巴黎")]), Example(turns, chosen="a", rejected="b")])
    assert [row["input_ids"] for row in rows] == [wanted["prompt_ids"]] * 2
    assert [row["prompt"] for row in rows] == [wanted["prompt"]] * 2
    assert counts.learned_tokens == 0
    batch = PromptCollator(pad_id=0)([rows[0], {"input_ids": [5, 6]}])
    assert prompts_of(batch) == [rows[0]["input_ids"], [5, 6]]


def test_the_shipped_samples_hold_what_they_are_for():
    pairs = json.loads((ASSETS / "data/preference_sample.json").read_text(encoding="utf-8"))
    feedback = json.loads((ASSETS / "data/feedback_sample.json").read_text(encoding="utf-8"))
    friendly = "希望能帮到你！"
    assert all(better == worse + friendly for better, worse in (record["output"] for record in pairs))
    assert all(record["output"].endswith(friendly) is record["good"] for record in feedback)
    assert 2 * sum(record["good"] for record in feedback) == len(feedback) == len(pairs) == 96


# -- weights -------------------------------------------------------------------------------------------------------------


def weighted(make, cls, *examples, **options):
    return make(cls, **options).encode(examples)[0]


def test_the_labels_of_an_answer_have_its_weight(make):
    turns = [ASK("早"), TOLD("早上好")._replace(weight=0.5), ASK("午"), TOLD("午安")._replace(weight=4)]
    (row,) = weighted(make, Encoder, Example(turns, weight=0.25))
    plain = alone(make, [turn._replace(weight=1) for turn in turns], every_answer=True)
    assert (row["input_ids"], row["labels"], row["weight"]) == (plain["input_ids"], plain["labels"], 0.25)
    assert plain["weights"] is None and plain["weight"] == 1
    learned = [weight for weight, label in zip(row["weights"], row["labels"], strict=True) if label != IGNORE_INDEX]
    one, two = (
        sum(label != IGNORE_INDEX for label in alone(make, turns[:end], every_answer=False)["labels"]) for end in (2, 4)
    )
    assert learned == [0.5] * one + [4.0] * two


def test_weights_stay_with_their_answers_where_old_turns_are_dropped_and_the_answer_is_cut(make):
    turns = [ASK(LONG), TOLD("早上好")._replace(weight=0.5), ASK("午"), TOLD(LONG)._replace(weight=4)]
    (row,) = weighted(make, Encoder, Example(turns))
    learned = [weight for weight, label in zip(row["weights"], row["labels"], strict=True) if label != IGNORE_INDEX]
    assert learned == [4.0] * 16 and len(row["weights"]) == len(row["input_ids"])


def test_a_pair_and_an_answer_marked_good_have_one_weight(make):
    (pair,) = weighted(make, PairEncoder, Example([ASK("q")], chosen="a", rejected="b", weight=3), every_answer=False)
    assert (pair["weight"], pair["weights"]) == (3, None)
    batch = PairCollator(pad_id=0)([pair, {**pair, "weight": 0.5}])
    assert batch["weight"].tolist() == [3, 0.5] and "weights" not in batch
    answer = Example([ASK("q"), TOLD("a")._replace(weight=2)], desirable=True, weight=3)
    (row,) = weighted(make, FeedbackEncoder, answer, every_answer=False)
    assert (row["weight"], row["weights"]) == (6, None)
    bare = [{name: values for name, values in pair.items() if name not in ("weight", "weights")}]
    assert PairCollator(pad_id=0)(bare).keys() == {"input_ids", "attention_mask", "labels"}


def test_the_tokens_of_a_document_have_its_weight(make):
    documents = [Example(text="早上好"), Example(text="午安", weight=3)]
    rows = weighted(make, BlockEncoder, *documents, block_length=16)
    counts = [
        sum(
            label != IGNORE_INDEX
            for row in weighted(make, BlockEncoder, one, block_length=16)
            for label in row["labels"]
        )
        for one in documents
    ]
    pairs = [pair for row in rows for pair in zip(row["weights"], row["labels"], strict=True)]
    assert [weight for weight, label in pairs if label != IGNORE_INDEX] == [1.0] * counts[0] + [3.0] * counts[1]
    assert {row["weights"] for row in weighted(make, BlockEncoder, *documents[:1], block_length=16)} == {None}
