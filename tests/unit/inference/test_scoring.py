"""Scores from worker processes are those from this process, to the last digit."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import psutil
import pytest

from glmtuner.inference import scoring
from glmtuner.inference.scoring import Scorer
from glmtuner.metrics.none import NoMetric
from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh

PAIRS = {
    number: (f"第{number}个答案，北京是中国的首都{'。' * (number % 3)}", f"答案{number}：中国的首都是北京")
    for number in range(40)
}
EXPECTED = RougeBleuZh().scores(*map(list, zip(*PAIRS.values(), strict=True)))
PARENT = """\
import os, time
from multiprocessing import active_children
from glmtuner.inference import scoring
from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh

if __name__ == "__main__":
    scoring.ANSWERS_PER_WORKER, os.cpu_count = 10, lambda: 3
    scorer = scoring.Scorer(RougeBleuZh(), 40)
    for key in range(40):
        scorer.put(key, "北京是首都", "首都是北京")
    for future in scorer.futures.values():
        future.result()
    print(*(worker.pid for worker in active_children()), flush=True)
    time.sleep(60)
"""


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def own_workers() -> list[BaseProcess]:
    """The children that a scorer has started; those of joblib, which other tests leave for later use, are not among them."""
    return [child for child in active_children() if type(child).__name__ == "SpawnProcess"]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ANSWERS_PER_WORKER", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def test_the_scores_are_the_same_to_the_last_digit(several: None) -> None:
    scorer = Scorer(RougeBleuZh(), len(PAIRS))
    for key, pair in reversed(PAIRS.items()):
        if key % 5:  # the rest is scored in this process
            scorer.put(key, *pair)
    workers = own_workers()
    assert len(workers) == 2
    assert scorer.scores(PAIRS) == EXPECTED
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("scored_before", [0, 25])
def test_answers_of_a_killed_worker_are_scored_in_this_process(several: None, scored_before: int) -> None:
    scorer = Scorer(RougeBleuZh(), len(PAIRS))
    for key, pair in PAIRS.items():
        if key == scored_before:
            for future in scorer.futures.values():
                future.result()
            for worker in own_workers():
                worker.kill()
        scorer.put(key, *pair)
    for worker in own_workers():
        worker.kill()
    assert scorer.scores(PAIRS) == EXPECTED
    assert own_workers() == []


def test_workers_end_with_the_process_that_started_them_and_ignore_interrupts(tmp_path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(worker.nice() >= 10 for worker in workers)
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert all(map(runs, workers))
        parent.kill()
    deadline = time.monotonic() + 120
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def test_few_answers_start_no_process() -> None:
    scorer = Scorer(NoMetric(), scoring.ANSWERS_PER_WORKER - 1)
    scorer.put(0, "a", "b")
    assert scorer.pool is None and scorer.scores({0: ("a", "b")}) == {}
    assert own_workers() == []
