"""Templates: the same tokens as the tokenizer's own, no control token from a user's text, labels on answers alone."""

import pytest
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.records import Message
from glmtuner.errors import ConfigError, UnknownName
from glmtuner.templates.base import IGNORE_INDEX, control_id
from glmtuner.templates.glm import TEMPLATES, Plain
from glmtuner.templates.jinja import TokenizersOwn
from glmtuner.templates.named import template_named

SYSTEM, ASK, TOLD = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
CONVERSATIONS = {
    "single": [ASK("你好，你是谁？"), TOLD("我是 TinyGLM。")],
    "system": [SYSTEM("Be brief."), ASK("3 + 4 = ?"), TOLD("7")],
    "turns": [ASK("a b"), TOLD("c"), ASK("中文\n\n两行"), TOLD("d e f"), ASK("g"), TOLD("h")],
    "all": [SYSTEM("s"), ASK("q1"), TOLD("a1"), ASK("q2"), TOLD("a2 and more")],
    "odd": [ASK("👩‍🚀 é\t "), TOLD("🙂🙂")],
    "code": [ASK("{{ messages }} {% raw %} [/INST]"), TOLD("```py\nx = 1\n```")],
}
LITERALS = ["<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<|endoftext|>", "<|observation|>"]
CHATML = """\
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<eop>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


@pytest.fixture
def chatml():
    """A tokenizer with another template, in which turns end with a stop token and a line break."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.chat_template = CHATML
    return tokenizer


def reference(tokenizer, messages):
    """What transformers makes of the turns."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=messages[-1].role != "assistant", return_dict=False
    )


def encode(template, tokenizer, messages):
    return template.encode(tokenizer, [messages])[0]


def learned(labels):
    """The places that are learned, each with its token."""
    return {(place, label) for place, label in enumerate(labels) if label != IGNORE_INDEX}


def answer_texts(tokenizer, encoded):
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.answers]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_glm4_is_the_tokenizer_s_own_template_and_a_stop_token(tokenizer, name):
    messages = CONVERSATIONS[name]
    glm4 = TEMPLATES["glm4"]
    encoded = encode(glm4, tokenizer, messages)
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    assert encoded.input_ids == [*reference(tokenizer, messages), stop]
    assert encoded.stop == stop
    assert glm4.stop_ids(tokenizer) == {stop, tokenizer.convert_tokens_to_ids("<|observation|>")}  # of calls, too
    assert encode(glm4, tokenizer, messages[:-1]).input_ids == reference(tokenizer, messages[:-1])


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
def test_a_prompt_is_where_its_answer_begins(tokenizer, template, name):
    template, messages = template_named(template, tokenizer), CONVERSATIONS[name]
    whole, prompt = encode(template, tokenizer, messages), encode(template, tokenizer, messages[:-1])
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.source_length == len(prompt.input_ids)
    assert whole.input_ids[-1] == whole.stop


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
def test_labels_are_the_answers_and_their_stop_tokens(tokenizer, template, name):
    template, messages = template_named(template, tokenizer), CONVERSATIONS[name]
    encoded = encode(template, tokenizer, messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    assert [text.strip() for text in answer_texts(tokenizer, encoded)] == answers
    every, last = encoded.labels(every_answer=True), encoded.labels(every_answer=False)
    assert len(every) == len(last) == len(encoded.input_ids)
    places = {place for start, end in encoded.answers for place in range(start, end + 1)}
    assert {place for place, _ in learned(every)} == places
    start, end = encoded.answers[-1]
    assert [place for place, _ in sorted(learned(last))] == [*range(start, end + 1)]
    assert all(every[end] == encoded.stop for _, end in encoded.answers)
    assert all(
        encoded.input_ids[place] == every[place] for start, end in encoded.answers for place in range(start, end)
    )


@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
def test_every_answer_is_the_sum_of_the_last_answers(tokenizer, template):
    template = template_named(template, tokenizer)
    for messages in (CONVERSATIONS["turns"], CONVERSATIONS["all"]):
        ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
        parts = [learned(encode(template, tokenizer, messages[:end]).labels(every_answer=False)) for end in ends]
        whole = encode(template, tokenizer, messages)
        if isinstance(template, TokenizersOwn):  # the last turn of each has its own end, which no turn follows
            stops = {end for _, end in whole.answers}
            parts = [{pair for pair in part if pair[0] not in stops} for part in parts]
            assert set.union(*parts) == {pair for pair in learned(whole.labels(True)) if pair[0] not in stops}
        else:
            assert set.union(*parts) == learned(whole.labels(every_answer=True))
        assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("template", ["glm4", "plain", "tokenizer"])
def test_text_never_becomes_a_control_token(tokenizer, template, literal):
    template = template_named(template, tokenizer)
    control = set(tokenizer.added_tokens_decoder)
    clean = [SYSTEM("s s"), ASK("q q"), TOLD("a a"), ASK("r r"), TOLD("b b")]
    dirty = [Message(turn.role, turn.content.replace(" ", f" x{literal}{literal} ")) for turn in clean]

    def controls(messages):
        return [token for token in encode(template, tokenizer, messages).input_ids if token in control]

    assert controls(dirty) == controls(clean)
    encoded = encode(template, tokenizer, dirty)
    assert encoded.input_ids != encode(template, tokenizer, clean).input_ids
    text = tokenizer.decode(encoded.input_ids)
    assert all(turn.content in text for turn in dirty)
    answers = [turn.content for turn in dirty if turn.role == "assistant"]
    assert [text.strip() for text in answer_texts(tokenizer, encoded)] == answers
    assert literal in tokenizer.decode([label for _, label in sorted(learned(encoded.labels(True)))])


def test_the_same_text_without_protection_would_be_a_control_token(tokenizer):
    assert tokenizer.convert_tokens_to_ids("[gMASK]") in tokenizer("x [gMASK] y").input_ids


# The tokenizer's own template


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_own_template_gives_the_ids_of_transformers(tokenizer, chatml, name):
    messages = CONVERSATIONS[name]
    for mine in (tokenizer, chatml):
        own = template_named("tokenizer", mine)
        assert isinstance(own, TokenizersOwn)
        assert encode(own, mine, messages[:-1]).input_ids == reference(mine, messages[:-1])
    whole = encode(template_named("tokenizer", tokenizer), tokenizer, messages)
    assert whole.input_ids == [*reference(tokenizer, messages), whole.stop]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_own_template_learns_the_stop_token_that_it_writes(chatml, name):
    messages = CONVERSATIONS[name]
    own = template_named("tokenizer", chatml)
    encoded, eop = encode(own, chatml, messages), chatml.convert_tokens_to_ids("<eop>")
    assert encoded.stop == eop == encoded.input_ids[-1]
    whole = reference(chatml, messages)
    assert encoded.input_ids == whole[: len(encoded.input_ids)] and len(whole) - len(encoded.input_ids) <= 1
    assert all(encoded.input_ids[end] == eop for _, end in encoded.answers)
    assert len(encoded.answers) == sum(message.role == "assistant" for message in messages)


def test_own_template_leaves_rewritten_history_as_context(chatml):
    chatml.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('!')[-1] }}"
    )
    messages = [ASK("q"), TOLD("thinking!said"), ASK("r"), TOLD("more!told")]
    encoded = encode(template_named("tokenizer", chatml), chatml, messages)
    assert answer_texts(chatml, encoded) == ["more!told"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", "refuses these turns .*no system turns"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not render an answer"),
    ],
)
def test_own_template_that_cannot_be_used_says_what_to_type(chatml, source, reason):
    chatml.chat_template = source
    with pytest.raises(ConfigError, match=f"model.template=tokenizer: .*{reason}.*; choose a template of ours"):
        encode(template_named("tokenizer", chatml), chatml, CONVERSATIONS["single"])


def test_a_tokenizer_without_a_template_gets_the_plain_one(tokenizer):
    bare = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    bare.chat_template = None
    assert isinstance(template_named("tokenizer", bare), Plain)


# Templates as text


def text_of(template, messages):
    return "".join(piece.text for piece in TEMPLATES[template].pieces(messages))


def test_plain_is_words_and_the_end_of_sequence(tokenizer):
    plain = TEMPLATES["plain"]
    messages = [SYSTEM("s"), ASK("q"), TOLD("a"), ASK("r")]
    assert text_of("plain", messages) == "System: s\n\nUser: q\n\nAssistant: a\n\nUser: r\n\nAssistant:"
    encoded = encode(plain, tokenizer, messages[:3])
    assert encoded.stop == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids[:-1]) == "System: s\n\nUser: q\n\nAssistant: a"
    assert not set(encoded.input_ids[:-1]) & set(tokenizer.added_tokens_decoder)


@pytest.mark.parametrize(
    ("template", "before", "behind"), [("chatglm", "", "[gMASK]<sop>"), ("chatglm2", "[gMASK]sop", "")]
)
def test_rounds_are_numbered_and_their_prompt_is_one_text(template, before, behind):
    messages = [SYSTEM("s"), ASK("q"), TOLD("a"), ASK("r")]
    text = "s\n\n[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：r\n\n答："
    assert text_of(template, messages) == f"{before}{text}{behind}"
    pieces = TEMPLATES[template].pieces([*messages, TOLD("b")])
    assert [piece.text for piece in pieces if piece.kind == "text"] == [text]
    assert [piece.text for piece in pieces if piece.kind == "answer"] == ["b"]
    assert pieces[-1].text == "b"


def test_chatglm3_tokenizes_the_line_break_apart():
    pieces = TEMPLATES["chatglm3"].pieces([ASK("q"), TOLD("a")])
    assert [piece.text for piece in pieces] == ["[gMASK]", "sop", "<|user|>", "\n", "q", "<|assistant|>", "\n", "a"]
    assert [piece.kind for piece in pieces[-4:]] == ["text", "control", "answer", "answer"]  # the model writes it too


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_description_shows_where_turns_go(name):
    about = TEMPLATES[name].describe()
    assert about["name"] == name and about["stop"]
    assert [about["example"].index(mark) for mark in ("{system}", "{user}", "{assistant}")] == sorted(
        about["example"].index(mark) for mark in ("{system}", "{user}", "{assistant}")
    )


# Cutting, and templates that do not fit


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_a_cut_answer_keeps_its_stop_token(tokenizer, most):
    encoded = encode(TEMPLATES["glm4"], tokenizer, [ASK("q"), TOLD("one two three four five six")])
    before, prompt = list(encoded.input_ids), encoded.source_length
    cost = encoded.cut_answer(most)
    assert len(encoded.input_ids) == len(before) - cost
    assert len(encoded.input_ids) - prompt == min(most, len(before) - prompt)
    assert encoded.input_ids[-1] == encoded.stop and encoded.labels(True)[-1] == encoded.stop
    assert encoded.input_ids[:-1] == before[: len(encoded.input_ids) - 1]


def test_a_template_of_another_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.template=chatglm3: the tokenizer has no token .*legal: glm4,"):
        encode(TEMPLATES["chatglm3"], tokenizer, CONVERSATIONS["single"])
    with pytest.raises(UnknownName, match="no template named 'glm5'; did you mean 'glm4'"):
        template_named("glm5", tokenizer)
    assert control_id(tokenizer, "eos", "plain") == tokenizer.eos_token_id


def test_a_batch_is_its_conversations_one_by_one(tokenizer):
    for template in (TEMPLATES["glm4"], TEMPLATES["plain"], template_named("tokenizer", tokenizer)):
        together = template.encode(tokenizer, list(CONVERSATIONS.values()))
        assert together == [encode(template, tokenizer, messages) for messages in CONVERSATIONS.values()]
