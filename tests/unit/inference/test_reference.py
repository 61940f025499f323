"""An answer is scored against what its label decodes to, cut as in training: the scores of ChatGLM-Efficient-Tuning."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glmtuner.config.paths import ASSETS
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example, Message
from glmtuner.inference.predict import line_of, pair_of, recover_answers
from glmtuner.inference.reference import learned_answer, opens_reference, reference_of, split_answer
from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer
from glmtuner.templates.base import IGNORE_INDEX, Template
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.jinja import TokenizersOwn

LABELS = [
    "你好，见到你很高兴！要问什么：天气？",
    "再见，一路顺风！",
    "第一行\n\n第二行\t（完）；“引号”‘引号’…… ①②③ ｆｕｌｌ　ｗｉｄｔｈ",
    "  Hello,  World! Café, naïve — 3.14 × 2 \n",
    "def f(x):\n    return {'a': [x] * 2}  # [[CLS]] <b>&amp;</b>",
    "👩‍🚀🙂 ﬁn™ Ⅷ é",
    "A Long Answer " * 30,
]
ENDS_AND_STOPS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[SEP]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def lossy(kind: str) -> Any:
    """A small tokenizer that cannot express every text: lower case without accents, or words after a leading space."""
    special = ["[PAD]", "[UNK]", "[SEP]", "[system]", "[user]", "[assistant]"]
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
    backend.train_from_iterator([*LABELS, "问 question"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    return tokenizer


@pytest.fixture(scope="module")
def kinds(upstream_files) -> dict[str, tuple[Any, Template]]:
    tiny = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    found = {"byte-level": (tiny, TEMPLATES["glm4"]), "jinja": (tiny, TokenizersOwn(tiny.chat_template))}
    for name, folder in (("chatglm", "tokenizer_v1"), ("chatglm2", "chatglm2_realvocab")):
        found[name] = (ChatGLMTokenizer.from_pretrained(upstream_files / folder), TEMPLATES[name])
    return found | {kind: (lossy(kind), TokenizersOwn(ENDS_AND_STOPS)) for kind in ("wordpiece", "metaspace")}


def encoded(tokenizer: Any, template: Template, label: str, most: int = 512, **options: Any) -> dict[str, Any]:
    encoder = Encoder(template=template, tokenizer=tokenizer, max_source_length=512, max_target_length=most, **options)
    rows, _ = encoder.encode([Example([Message("user", "问 question"), Message("assistant", label)])])
    return rows[0]


def decoded_label(tokenizer: Any, label: str, most: int) -> str:
    """As ChatGLM-Efficient-Tuning has it: encoded alone, cut, decoded without special tokens."""
    ids = tokenizer(label, add_special_tokens=False).input_ids
    return tokenizer.decode(ids[: most - 1], skip_special_tokens=True)


def score(prediction: str, label: str) -> dict[str, float]:
    """ChatGLM-Efficient-Tuning's formula, from jieba, rouge_chinese and NLTK."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    found = {name: each["f"] * 100 for name, each in Rouge().get_scores(*words)[0].items()}
    bleu = sentence_bleu([list(label)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return {**found, "bleu-4": bleu * 100}


KINDS = ["byte-level", "jinja", "chatglm", "chatglm2", "wordpiece", "metaspace"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [512, 9])
def test_the_reference_is_the_decoded_label_and_a_perfect_answer_scores_100(kinds, kind, most):
    tokenizer, template = kinds[kind]
    stops = tuple(template.stop_ids(tokenizer)) if kind != "jinja" else (tokenizer.eos_token_id,)
    for label in LABELS if "jinja" not in template.describe() else map(str.strip, LABELS):  # where tokens join others
        row = encoded(tokenizer, template, label, most)
        reference = reference_of(row, tokenizer, stops, most)
        begins = kind in ("byte-level", "jinja")  # GLM-4 learns the line break before an answer, too
        assert reference == decoded_label(tokenizer, label, most - begins).strip()
        assert row["answer"] == label
        learned = [token for token in row["labels"] if token != IGNORE_INDEX]
        perfect = tokenizer.decode(learned[:-1], skip_special_tokens=True).strip()
        assert RougeBleuZh().score(perfect, reference) == pytest.approx(score(perfect, reference), abs=1e-3)
        if len(perfect) > 3:  # BLEU-4 counts four characters at a time
            assert RougeBleuZh().score(perfect, reference)["bleu-4"] == pytest.approx(100, abs=0.01)


def test_chatglm_writes_ascii_punctuation_and_is_not_marked_down_for_it(kinds):
    tokenizer, template = kinds["chatglm"]
    row = encoded(tokenizer, template, LABELS[0])
    reference = reference_of(row, tokenizer, tuple(template.stop_ids(tokenizer)), 512)
    assert reference == "你好,见到你很高兴!要问什么:天气?"
    assert RougeBleuZh().score(reference, reference)["bleu-4"] == 100.0
    assert RougeBleuZh().score(reference, LABELS[0])["bleu-4"] < 60, "against the label as it is written"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["", " \n\t"])
def test_an_empty_label_is_an_empty_reference(kinds, kind, label):
    tokenizer, template = kinds[kind]
    earlier = [Message("user", "问"), Message("assistant", "答"), Message("user", "question")]
    encoder = Encoder(template=template, tokenizer=tokenizer, max_source_length=512, max_target_length=512)
    rows, _ = encoder.encode([Example([*earlier, Message("assistant", label)])])
    assert reference_of(rows[0], tokenizer, (tokenizer.eos_token_id,), 512) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_answer_that_is_not_learned_is_still_the_reference(kinds, kind):
    tokenizer, template = kinds[kind]
    turns = [
        Message("user", "问"),
        Message("assistant", "答"),
        Message("user", "question"),
        Message("assistant", LABELS[1]),
    ]
    encoder = Encoder(template=template, tokenizer=tokenizer, max_source_length=512, max_target_length=512)
    row = encoder.encode([Example(turns)])[0][0]
    last = len(row["prompt_ids"])
    masked = {**row, "labels": [*row["labels"][:last], *[IGNORE_INDEX] * (len(row["labels"]) - last)]}
    assert learned_answer(row) and not learned_answer(masked)
    for most in (512, 4):
        expected = decoded_label(tokenizer, LABELS[1], most).strip()
        assert reference_of(masked, tokenizer, (tokenizer.eos_token_id,), most) == expected


def test_a_prompt_that_ends_otherwise_than_the_answer_begins_hides_no_answer(kinds):
    """As in templates that begin a prompt's answer with an empty thought."""
    tokenizer, _ = kinds["byte-level"]
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = encoded(tokenizer, TokenizersOwn(source), "答案")
    thought = tokenizer("<think></think>", add_special_tokens=False).input_ids
    assert learned_answer({**row, "prompt_ids": [*row["prompt_ids"], *thought]}) == learned_answer(row) != []


def test_answers_of_an_earlier_version_get_their_reference_and_strangers_are_answered_again(tmp_path, capsys):
    path, early = tmp_path / "predictions.jsonl", tmp_path / "evaluations/predictions.early.jsonl"
    texts = [
        '{"index": 0, "prompt": "p", "label": "l", "predict": "a"}',
        '{"index": 1, "prompt": "another", "label": "l", "predict": "b"}',
        '{"index": "2", "prompt": "p"}',
        '{"prompt": "p"}',
    ]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

    def restored(line: dict[str, Any]) -> dict[str, Any] | None:
        return {**line, "reference": "r"} if line["prompt"] == "p" else None

    assert recover_answers(path, early, [], True, restored) == {0: {**json.loads(texts[0]), "reference": "r"}}
    assert (
        "lines that are not answers to the records as they are now, which are answered again: 3"
        in capsys.readouterr().out
    )
    assert [json.loads(line)["index"] for line in early.read_text().splitlines()] == [0] and not path.exists()


@pytest.mark.parametrize(
    ("text", "in_thought", "parts"),
    [
        ("two", False, ("", "two")),
        ("<think>hm\n</think>\n\ntwo", False, ("hm", "two")),
        ("<think></think>two", False, ("", "two")),
        ("hm</think>\n\ntwo", True, ("hm", "two")),
        ("hm, and cut", True, ("hm, and cut", "")),  # the longest answer ends in the thought
        ("<think>hm, and cut", False, ("hm, and cut", "")),
        ("a <think> tag", False, ("", "a <think> tag")),
        ("two </think>", False, ("", "two </think>")),
    ],
)
def test_the_thought_of_an_answer_and_the_rest(text, in_thought, parts):
    assert split_answer(text, in_thought) == parts


def test_a_line_has_both_texts_without_their_thoughts_where_there_is_one():
    row = {"prompt": "p", "answer": "two"}
    plain = line_of(row, 0, "two", "2")
    assert plain == {"index": 0, "prompt": "p", "label": "two", "reference": "two", "predict": "2"}
    both = line_of(row, 0, "<think>a</think>two", "b</think>2", (True, False))
    assert both == {
        **plain, "reference": "<think>a</think>two", "predict": "b</think>2", "reasoning": "b", "answer": "2",
        "reference_answer": "two",
    }  # fmt: skip
    assert line_of(row, 0, "a</think>two", "2", (False, True))["reference_answer"] == "two"
    for line, whole in ((plain, ("2", "two")), (both, ("b</think>2", "<think>a</think>two"))):
        assert pair_of(line, RougeBleuZh()) == whole
        assert pair_of(line, RougeBleuZh(without_reasoning=True)) == ("2", "two")


def test_whether_the_learned_prompt_opens_a_thought_whatever_is_asked(kinds):
    tokenizer, _ = kinds["byte-level"]
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"
    )
    for opens in (True, False):
        row = encoded(tokenizer, TokenizersOwn(source, thinking="empty" if opens else "auto"), "答案")
        assert opens_reference(row, tokenizer) is opens
        other = tokenizer("<|user|>问 question<|assistant|>", add_special_tokens=False).input_ids
        assert opens_reference({**row, "prompt_ids": other}, tokenizer) is opens
