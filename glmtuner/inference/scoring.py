"""Scores of many answers, computed by worker processes while the model generates the next ones."""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from threading import Thread
from types import MappingProxyType

from glmtuner.config.groups import Metric

# Answers for which one worker pays: it takes two seconds to start, and an answer takes one or two milliseconds.
ANSWERS_PER_WORKER = 500
MAX_WORKERS = 4


class Scorer:
    """`put` each answer with its label, then ask for the `scores` of all."""

    def __init__(self, metric: Metric, expected: int) -> None:
        self.metric = metric
        self.futures: dict[int, Future[dict[str, float]]] = {}
        workers = min(MAX_WORKERS, (os.cpu_count() or 1) - 1, expected // ANSWERS_PER_WORKER)
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker) if workers > 0 else None

    def put(self, key: int, prediction: str, reference: str) -> None:
        """Submit the answer for scoring in the background, if there are workers."""
        if self.pool is not None:
            with suppress(BrokenProcessPool):  # `scores` computes what the pool does not
                self.futures[key] = self.pool.submit(self.metric.score, prediction, reference)

    def scores(
        self, pairs: Mapping[int, tuple[str, str]], parts: Mapping[str, slice] = MappingProxyType({})
    ) -> dict[str, float]:
        """The mean of each score over all pairs of (prediction, reference), in their order; also those of each of the `parts`.

        Scores that the workers computed are used; all others, those of a worker that was killed among them, are computed
        in this process.
        """
        by_key: dict[int, dict[str, float]] = {}
        for key, future in self.futures.items():
            with suppress(BrokenProcessPool):
                by_key[key] = future.result()
        if self.pool is not None:
            self.pool.shutdown()
        scores = [by_key.get(key) or self.metric.score(*pair) for key, pair in pairs.items()]
        means = self.metric.mean(scores)
        for label, part in parts.items():
            means |= {f"{label}_{name}": value for name, value in self.metric.mean(scores[part]).items()}
        return means


def start_worker() -> None:
    """Initializer of a worker: it ignores Ctrl-C, runs at low priority, and exits with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the whole process group
    if hasattr(os, "nice"):
        os.nice(10)  # the model has priority
    Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent process to end, then exit: a pool's worker would wait for ever for work of a killed parent."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
