"""ROUGE and BLEU for Chinese, as ChatGLM-Efficient-Tuning computed them."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from glmtuner.config.groups import Metric, preset

NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


@preset("metric", "rouge_bleu_zh")
@dataclass(kw_only=True)
class RougeBleuZh(Metric):
    """ROUGE-1/2/L F1 on jieba words and BLEU-4 on characters (NLTK smoothing method 3), each times 100."""

    name: str = "rouge_bleu_zh"

    def prepare(self) -> None:
        """Load jieba's dictionary, which takes half a second."""
        words("")

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The four scores in percent, rounded to four decimals as in CET; an empty prediction or reference scores 0."""
        from rouge_chinese import Rouge

        if not prediction.strip() or not reference.strip():
            return dict.fromkeys(NAMES, 0.0)
        rouge = Rouge(metrics=["rouge-1", "rouge-2"])
        answer, label = " ".join(words(prediction)), " ".join(words(reference))
        scores = {name: score["f"] * 100 for name, score in rouge.get_scores(answer, label)[0].items()}
        scores["rouge-l"] = rouge_l(_tokens(rouge, answer), _tokens(rouge, label)) * 100
        scores["bleu-4"] = bleu_4(prediction, reference) * 100
        return {name: round(scores[name], 4) for name in NAMES}


def rouge_l(answer: list[str], label: list[str]) -> float:
    """ROUGE-L's F1 of two lists of words, in [0, 1]: the value of rouge_chinese, which is slower than all other scores together."""
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(answer, label)
    precision, recall = common / len(answer), common / len(label)
    return 2 * precision * recall / (precision + recall + 1e-8)


def bleu_4(answer: str, label: str) -> float:
    """BLEU-4 of two texts by their characters, in [0, 1], smoothed by NIST's geometric sequence (Chen and Cherry 2014, method 3).

    The value of NLTK's `sentence_bleu`, whose import takes longer than the scores of a thousand answers.
    """
    precisions, zeros = [], 0
    for order in range(1, 5):
        found, known = _ngrams(answer, order), _ngrams(label, order)
        matches, total = sum((found & known).values()), max(found.total(), 1)
        if not matches:
            if order == 1:
                return 0.0
            zeros += 1
        precisions.append(matches / total if matches else 1 / (2**zeros * total))
    brevity = 1.0 if len(answer) > len(label) else math.exp(1 - len(label) / len(answer))
    return brevity * math.exp(math.fsum(0.25 * math.log(precision) for precision in precisions))


def _ngrams(text: str, order: int) -> Counter[str]:
    """How often each sequence of `order` characters occurs."""
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def _tokens(rouge: Any, text: str) -> list[str]:
    """The words of the text's sentences, split as rouge_chinese does."""
    return [word for sentence in rouge.cut_sent(text) if sentence for word in " ".join(sentence.split()).split(" ")]


def words(text: str) -> list[str]:
    """The text's words, by jieba."""
    import logging

    import jieba

    if not jieba.dt.initialized:
        jieba.setLogLevel(logging.WARNING)  # else it reports on stderr that it loads its dictionary
        jieba.initialize()
    return list(jieba.cut(text))
