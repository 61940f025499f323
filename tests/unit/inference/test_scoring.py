"""Scores from other processes are those from this one, to the last digit."""

import os
import time

import pytest

from glmtuner.inference import scoring
from glmtuner.inference.scoring import Scorer
from glmtuner.metrics.none import NoMetric
from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh

PAIRS = {
    number: (f"第{number}个答案，北京是中国的首都{'。' * (number % 3)}", f"答案{number}：中国的首都是北京")
    for number in range(40)
}


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MANY", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def test_the_scores_are_the_same_to_the_last_digit(several: None) -> None:
    wanted = RougeBleuZh().scores(*map(list, zip(*PAIRS.values(), strict=True)))
    scorer = Scorer(RougeBleuZh(), len(PAIRS))
    assert len(scorer.workers) == 2
    for key, pair in reversed(PAIRS.items()):
        if key % 5:  # the rest is scored here
            scorer.put(key, *pair)
    workers = [worker for worker, _ in scorer.workers]
    assert scorer.scores(PAIRS) == wanted
    assert not any(worker.is_alive() for worker in workers)


def test_what_a_killed_process_had_is_scored_here(several: None) -> None:
    scorer = Scorer(RougeBleuZh(), len(PAIRS))
    for worker, _ in scorer.workers:
        worker.kill()
    for key, pair in PAIRS.items():
        scorer.put(key, *pair)
    assert scorer.scores(PAIRS) == RougeBleuZh().scores(*map(list, zip(*PAIRS.values(), strict=True)))


def test_a_process_ends_when_the_other_end_is_gone(several: None) -> None:
    scorer = Scorer(RougeBleuZh(), len(PAIRS))
    until = time.monotonic() + 30
    for worker, connection in scorer.workers:
        connection.close()
        worker.join(until - time.monotonic())
        assert worker.exitcode == 0


def test_few_answers_start_no_process() -> None:
    scorer = Scorer(NoMetric(), scoring.MANY - 1)
    scorer.put(0, "a", "b")
    assert scorer.workers == [] and scorer.scores({0: ("a", "b")}) == {}
