"""Rows of records with and without reasoning: the modes of data.thinking, rows of their own, and what is left out."""

import pytest
from transformers import AddedToken, AutoTokenizer

from glmtuner.config.groups import Data, Thinking
from glmtuner.config.paths import ASSETS
from glmtuner.data.encode import Encoder
from glmtuner.data.pairs import PairEncoder
from glmtuner.data.prompts import PromptEncoder
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.jinja import TokenizersOwn

# in the manner of Qwen3: the last answer has a thought, if an empty one; earlier ones have none
SOURCE = """\
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or '' -%}{%- set content = m.content -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{%- if loop.last %}<think>{{ thought.strip() }}</think>{% endif %}{{ content.strip() }}<eop>
{%- else %}{{ m.content }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif -%}
"""
ASK, TOLD = Message("user", "1+1"), Message("assistant", "2")
THOUGHT = Message("assistant", "2", reasoning="one more")
TAGGED = Message("assistant", "<think>one more</think>2")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = SOURCE
    return tokenizer


def encoder(tokenizer, thinking="auto", kind=Encoder, **options):
    template = TokenizersOwn(source=tokenizer.chat_template, thinking=thinking)
    return kind(template=template, tokenizer=tokenizer, max_source_length=200, max_target_length=200, **options)


def texts(tokenizer, row):
    labels = [label for label in row["labels"] if label != IGNORE_INDEX]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(labels)


@pytest.mark.parametrize(
    ("thinking", "answer", "prompt", "learned"),
    [
        ("auto", TOLD, "<|assistant|><think></think>", "2<eop>"),
        ("auto", THOUGHT, "<|assistant|>", "<think>one more</think>2<eop>"),
        ("auto", TAGGED, "<|assistant|>", "<think>one more</think>2<eop>"),
        ("empty", TOLD, "<|assistant|>", "<think></think>2<eop>"),
        ("empty", TAGGED, "<|assistant|>", "<think>one more</think>2<eop>"),
        ("strip", THOUGHT, "<|assistant|><think></think>", "2<eop>"),
        ("strip", TAGGED, "<|assistant|><think></think>", "2<eop>"),
    ],
)
def test_an_answer_is_learned_behind_the_prompt_of_its_mode(tokenizer, thinking, answer, prompt, learned):
    (row,), counts = encoder(tokenizer, thinking).encode([Example([ASK, answer])])
    assert texts(tokenizer, row) == (f"<|user|>1+1{prompt}{learned}", learned)
    assert tokenizer.decode(row["prompt_ids"]) == f"<|user|>1+1{prompt}"
    on = "<think></think>" not in prompt
    assert (counts.thinking, counts.not_thinking) == (int(on), int(not on))
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert row["input_ids"].count(think) == 1, "the answer's own tag is the token"


@pytest.mark.parametrize("name", ["glm4", "chatglm3", "plain", "chatglm2"])
@pytest.mark.parametrize("kind", [Encoder, PromptEncoder])
def test_a_template_without_thoughts_leaves_them_out_where_it_is_asked_to(tokenizer, name, kind):
    own = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    own.add_tokens([AddedToken(token, special=True) for token in ("sop", "</s>")])
    lengths = {"max_source_length": 200, "max_target_length": 200}
    plain = kind(template=TEMPLATES[name], tokenizer=own, **lengths)
    strip = Data(dataset=["a"], dataset_dir=".", thinking=Thinking.strip, **lengths).lengths()
    stripping = kind(template=TEMPLATES[name], tokenizer=own, **strip)
    again, more = Message("user", "b"), Message("assistant", "bb")
    for answer in (THOUGHT, TAGGED):
        for before, after in (([], []), ([], [again, more]), ([ASK, more], [])):
            rows, _ = stripping.encode([Example([*before, ASK, answer, *after])])
            wanted, _ = plain.encode([Example([*before, ASK, TOLD, *after])])
            columns = ("input_ids", "labels", "prompt_ids", "prompt", "earlier")
            assert [[row.get(key) for key in columns] for row in rows] == [
                [row.get(key) for key in columns] for row in wanted
            ]
    if kind is Encoder:
        rows, counts = stripping.encode([Example([ASK, Message("assistant", "<think>only</think>\n")])])
        assert (rows, counts.records, counts.unrendered) == ([], 0, 1)
        with pytest.raises(ConfigError, match=r"does not render the reasoning .*data\.thinking=strip"):
            plain.encode([Example([ASK, THOUGHT])])


def test_earlier_answers_of_a_rewritten_history_are_rows_of_their_own(tokenizer):
    messages = [ASK, THOUGHT, Message("user", "b"), Message("assistant", "bb"), Message("user", "c"), TAGGED]
    (row,), counts = encoder(tokenizer).encode([Example(messages)])
    assert texts(tokenizer, row)[1] == "<think>one more</think>2<eop>"
    assert [texts(tokenizer, part)[1] for part in row["earlier"]] == ["<think>one more</think>2<eop>", "bb<eop>"]
    assert counts.learned_tokens == sum(
        sum(label != IGNORE_INDEX for label in part["labels"]) for part in (row, *row["earlier"])
    )
    assert counts.reasoning_dropped == 1
    (last,), _ = encoder(tokenizer, every_answer=False).encode([Example(messages)])
    assert not last.get("earlier") and last["input_ids"] == row["input_ids"]
    unlearned = [*messages[:-1], TAGGED._replace(learned=False)]
    (row,), _ = encoder(tokenizer).encode([Example(unlearned)])
    assert texts(tokenizer, row)[1] == "bb<eop>" and len(row["earlier"]) == 1


def test_prompts_in_the_mode_that_is_asked_for(tokenizer):
    for asks, end in ((True, "<|assistant|>"), (False, "<think></think>")):
        for answer in (TOLD, THOUGHT):
            (row,), _ = encoder(tokenizer, asks_thinking=asks).encode([Example([ASK, answer])])
            assert tokenizer.decode(row["prompt_ids"]).endswith(end)
    template = TokenizersOwn(source=SOURCE)
    for asks, end in ((None, ""), (True, ""), (False, "<think></think>")):
        (prompt,) = template.asking(asks).encode(tokenizer, [[ASK]])
        assert tokenizer.decode(prompt.input_ids) == f"<|user|>1+1<|assistant|>{end}"


def test_both_answers_of_a_pair_follow_one_prompt(tokenizer):
    pair = Example([ASK], chosen="<think>one more</think>2", rejected="3")
    (row,), _ = encoder(tokenizer, kind=PairEncoder, every_answer=False).encode([pair])
    start = next(index for index, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    assert row["input_ids"][:start] == row["rejected_ids"][:start]
    assert tokenizer.decode(row["rejected_ids"][start:]) == "<think></think>3<eop>"


def test_a_record_of_which_the_template_renders_nothing_has_no_row():
    own = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    own.chat_template = SOURCE.replace("{{ content.strip() }}", "{{ content.strip() if content != '2' else '' }}")
    rows, counts = encoder(own).encode([Example([ASK, TOLD]), Example([ASK, Message("assistant", "3")])])
    assert (len(rows), counts.records, counts.unrendered) == (1, 1, 1)
    assert "renders nothing" in counts.summary()


def test_stops_do_not_depend_on_what_follows():
    """Where the template writes nothing behind an answer, the stop is the token of the user's turn."""
    own = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    template = TokenizersOwn(source=own.chat_template)
    user, observation = own.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    messages = [ASK, TOLD, Message("observation", "x"), Message("assistant", "y")]
    (encoded,) = template.encode(own, [messages])
    labels = encoded.labels(every_answer=True)
    assert [labels[end] for _, end in encoded.answers] == [user, user]
    assert template.stop_ids(own) == {user, observation}, "that of calls, too"


def test_a_template_without_tools_refuses_them_by_name(tokenizer):
    with pytest.raises(
        ConfigError, match=r"^model\.template=tokenizer: it does not render the tools .*data\.ignore_columns"
    ):
        encoder(tokenizer).encode([Example([ASK, TOLD], tools=({"type": "function", "function": {"name": "f"}},))])
