"""Thoughts, marks and named templates over the tokenizer's own template, against what transformers renders."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.named import template_named

# in the manner of Qwen3 and GLM-4.5: the thought of the last answer is rendered, those of earlier ones are not
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OFFICIAL = ["qwen3", "glm-4.5", "glm-4.6", "glm-4.7", "glm-4.7-flash", "glm-5", "glm-5.1", "glm-5.2", "glm-5.3-flash"]
ASK = Message("user", "1+1")
THOUGHT = Message("assistant", "2", reasoning="2 is one more than one")  # the answer is in the thought, too
EARLIER = [Message("user", "a"), Message("assistant", "b", reasoning="a thought before")]


def tokenizer_with(source):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.chat_template = source
    return tokenizer


@pytest.fixture(params=["a small one", *OFFICIAL])
def tokenizer(request, shared: Path | None):
    """A tokenizer with a template that renders thoughts."""
    if request.param == "a small one":
        return tokenizer_with(THINKING)
    if shared is None:
        pytest.skip(f"needs the chat template of {request.param} as ../shared/goldens/templates/{request.param}.jinja")
    return tokenizer_with((shared / f"goldens/templates/{request.param}.jinja").read_text(encoding="utf-8"))


def rendered(tokenizer, messages, prompt=False):
    """What transformers makes of the turns."""
    turns = [
        {
            "role": turn.role,
            "content": turn.content,
            **({"reasoning_content": turn.reasoning} if turn.reasoning else {}),
        }
        for turn in messages
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)


def encoder(tokenizer, template="tokenizer", **options):
    options = {"max_source_length": 512, "max_target_length": 512, **options}
    return Encoder(template=template_named(template, tokenizer), tokenizer=tokenizer, **options)


def learned(row):
    return [label for label in row["labels"] if label != IGNORE_INDEX]


@pytest.mark.parametrize("messages", [[ASK, THOUGHT], [*EARLIER, ASK, THOUGHT]], ids=["one round", "two rounds"])
def test_the_thought_of_the_last_answer_is_learned_as_the_template_writes_it(tokenizer, messages):
    rows, counts = encoder(tokenizer, every_answer=False).encode([Example(messages)])
    whole, prompt = rendered(tokenizer, messages), rendered(tokenizer, messages[:-1], prompt=True)
    assert whole.startswith(prompt)
    answer = whole[len(prompt) : whole.rindex("2") + 1]  # all that the model has to write
    assert THOUGHT.reasoning in answer and answer.endswith("2")
    assert tokenizer.decode(rows[0]["prompt_ids"]) == prompt
    text = tokenizer.decode(learned(rows[0])[:-1])
    assert text == answer
    assert tokenizer.decode(rows[0]["input_ids"]).startswith(prompt + answer)
    in_history = EARLIER[1].reasoning in whole
    assert counts.reasoning_dropped == (len(messages) > 2 and not in_history)
    assert ("1 thoughts of earlier answers left out" in counts.summary()) is bool(counts.reasoning_dropped)


@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
def test_a_template_without_thoughts_refuses_them_by_name(template):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    with pytest.raises(
        ConfigError, match=rf"^model\.template={template}: it does not render .*reasoning_content.*data\.ignore_c"
    ):
        encoder(tokenizer, template).encode([Example([ASK, THOUGHT])])


def test_a_template_that_swallows_the_last_thought_is_refused():
    tokenizer = tokenizer_with(THINKING.replace("and loop.last", "and not loop.last"))
    with pytest.raises(ConfigError, match=r"does not render the reasoning of the last answer \(reasoning_content\)"):
        encoder(tokenizer).encode([Example([ASK, THOUGHT])])


# Marks

DIALOGUE = [("first?", "one", True), ("second?", "two", False), ("third?", "three", True)]


def marked(*marks):
    turns = []
    for (question, answer, _), mark in zip(DIALOGUE, marks, strict=True):
        turns += [Message("user", question), Message("assistant", answer, mark)]
    return Example(turns)


@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
@pytest.mark.parametrize("marks", [(1, 0, 1), (0, 0, 1), (1, 1, 0), (0, 1, 0), (1, 1, 1)])
def test_answers_marked_0_are_context(template, marks):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    made = encoder(tokenizer, template)
    (row,), counts = made.encode([marked(*map(bool, marks))])
    (plain,), _ = made.encode([marked(True, True, True)])
    assert row["input_ids"] == plain["input_ids"]
    text = tokenizer.decode(learned(row))
    for (_, answer, _), mark in zip(DIALOGUE, marks, strict=True):
        assert (answer in text) is bool(mark)
    assert [a for a, b in zip(row["labels"], plain["labels"], strict=True) if a not in (b, IGNORE_INDEX)] == []
    assert counts.learned_tokens == len(learned(row))


def test_what_has_nothing_to_learn_has_no_row_and_is_counted():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    bad = Example([ASK, Message("assistant", "3")], desirable=False)
    examples = [marked(False, False, False), bad, marked(True, True, False)]
    rows, counts = encoder(tokenizer, "glm4").encode(examples)
    assert (len(rows), counts.records, counts.unlearned, counts.undesirable) == (1, 1, 1, 1)
    rows, counts = encoder(tokenizer, "glm4", every_answer=False).encode(examples)
    assert (len(rows), counts.unlearned, counts.undesirable) == (0, 2, 1)
    assert "1 records with an answer marked false left out" in counts.summary()
    # a prompt that is shortened may lose the only answers that are learned
    long = Example(
        [Message("user", "x " * 60), Message("assistant", "one"), ASK, Message("assistant", "2", learned=False)]
    )
    rows, counts = encoder(tokenizer, "glm4", max_source_length=16).encode([long])
    assert (rows, counts.unlearned, counts.turns_dropped) == ([], 1, 1)


def test_the_answers_of_a_template_that_rewrites_history_keep_their_marks():
    """Where the template shows only the last answer, its mark counts, not that of the first."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content if m.role == 'user' or loop.last else '…' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(source + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    (row,), _ = encoder(tokenizer).encode([marked(False, False, True)])
    assert tokenizer.decode(learned(row)).startswith("three")


# Templates by names


def test_of_templates_by_names_the_default_is_taken():
    named = {"tool_use": "{{ 1 }}", "default": THINKING}
    as_list = [{"name": name, "template": source} for name, source in named.items()]
    for templates in (named, as_list):
        assert template_named("tokenizer", tokenizer_with(templates)).source == THINKING
    with pytest.raises(ConfigError, match=r"'tool_use', 'rag' and none named 'default'; .*choose one of glm4"):
        template_named("tokenizer", tokenizer_with({"tool_use": "x", "rag": "y"}))
    assert template_named("tokenizer", tokenizer_with({})) is TEMPLATES["plain"]


def test_templates_in_files_beside_the_tokenizer(tmp_path):
    """As transformers saves and loads them: chat_template.jinja, and a folder of further ones."""
    tokenizer_with({"tool_use": "{{ 1 }}", "default": THINKING}).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file() and (tmp_path / "additional_chat_templates").is_dir()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded.chat_template, dict)
    assert template_named("tokenizer", loaded).source == THINKING
