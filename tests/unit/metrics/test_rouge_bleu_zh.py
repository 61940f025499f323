"""ROUGE and BLEU are the numbers that ChatGLM-Efficient-Tuning computed; what is empty scores 0."""

import json
from random import Random

import pytest

from glmtuner.metrics.none import NoMetric
from glmtuner.metrics.rouge_bleu_zh import NAMES, RougeBleuZh, bleu_4, words


@pytest.fixture(scope="module")
def pairs(golden_folder):
    return json.loads((golden_folder / "metrics/cet_scores.json").read_text(encoding="utf-8"))["pairs"]


def test_every_pair_scores_what_cet_scored(pairs):
    assert len(pairs) == 40 and sum(not pair["predict"] for pair in pairs) > 0
    for pair in pairs:
        expected = {name: pair[name] for name in NAMES}
        assert RougeBleuZh().score(pair["predict"], pair["label"]) == pytest.approx(expected, abs=1e-4)


def test_the_score_is_the_mean_over_the_pairs(pairs):
    found = RougeBleuZh().scores([pair["predict"] for pair in pairs], [pair["label"] for pair in pairs])
    assert found == pytest.approx({name: sum(pair[name] for pair in pairs) / 40 for name in NAMES}, abs=1e-4)
    assert [*found] == [*NAMES]


def test_rouge_l_is_that_of_rouge_chinese():
    from rouge_chinese import Rouge

    random = Random(5)
    pieces = [
        "我",
        "今天",
        "天气",
        "。",
        "……",
        "……好",
        "？",
        "”",
        " ",
        "\n",
        "a.b",
        "......",
        "！x",
        "，",
        "去",
        "公园",
        "🙂",
    ]
    for _ in range(300):
        one, other = ("".join(random.choices(pieces, k=random.randrange(1, 40))) + "x" for _ in range(2))
        expected = Rouge(metrics=["rouge-l"]).get_scores(" ".join(words(one)), " ".join(words(other)))[0]["rouge-l"][
            "f"
        ]
        assert RougeBleuZh().score(one, other)["rouge-l"] == pytest.approx(expected * 100, abs=1e-4)


@pytest.mark.parametrize(("prediction", "reference"), [("", "你好"), (" \n\t", "你好"), ("你好", ""), ("", "")])
def test_what_is_empty_scores_0(prediction, reference):
    assert RougeBleuZh().score(prediction, reference) == dict.fromkeys(NAMES, 0.0)


def test_an_empty_prediction_counts_in_the_mean():
    text = "今天天气很好，我们去公园散步。"
    whole, half = RougeBleuZh().scores([text], [text]), RougeBleuZh().scores([text, ""], [text, text])
    assert whole == pytest.approx(dict.fromkeys(NAMES, 100.0), abs=0.01)
    assert half == pytest.approx({name: score / 2 for name, score in whole.items()})


def test_no_pairs_have_no_scores_and_lists_of_two_lengths_are_a_bug():
    assert RougeBleuZh().scores([], []) == {} == NoMetric().scores(["a"], ["b"])
    with pytest.raises(ValueError, match="shorter"):
        RougeBleuZh().scores(["a", "b"], ["a"])


@pytest.mark.parametrize("text", ["x", "。", "...", "a.b.c", "1", "the cat sat", "🙂", "第一句。第二句！", "﻿你好"])
def test_odd_texts_are_scored(text):
    for prediction, reference in ((text, "你好世界，今天很好"), ("你好世界，今天很好", text), (text, text)):
        assert all(0 <= score <= 100 for score in RougeBleuZh().score(prediction, reference).values())


def test_words_are_cut_without_a_word_on_the_terminal(capfd):
    assert "".join(words("我爱北京天安门")) == "我爱北京天安门" and len(words("我爱北京天安门")) < 7
    assert capfd.readouterr() == ("", "")


def test_bleu_4_is_that_of_nltk():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    random, smoothing = Random(6), SmoothingFunction().method3
    for _ in range(1000):
        alphabet = "今天ab 。"[: random.randint(1, 7)]
        one, other = ("".join(random.choices(alphabet, k=random.randint(1, random.choice((3, 6, 40))))) for _ in "ab")
        assert bleu_4(one, other) == sentence_bleu([list(other)], list(one), smoothing_function=smoothing)
