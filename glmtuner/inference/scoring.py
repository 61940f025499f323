"""Scores of many answers, worked out by other processes while more answers come."""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from glmtuner.config.groups import Metric

MANY = (
    500  # answers that a process of their own pays for: it takes two seconds to start, and two milliseconds an answer
)
MOST_PROCESSES = 4


class Scorer:
    """`put` each answer with its label, then ask for the `scores` of all."""

    def __init__(self, metric: Metric, expected: int) -> None:
        self.metric, self.sent = metric, 0
        self.sender = ThreadPoolExecutor(1)  # a pipe may be full, and the model is not to wait for it
        self.workers: list[tuple[Any, Connection]] = []
        spawn = get_context("spawn")
        for _ in range(min(MOST_PROCESSES, (os.cpu_count() or 1) - 1, expected // MANY)):
            here, there = spawn.Pipe()
            worker = spawn.Process(target=score_all, args=(metric, there), daemon=True)
            worker.start()
            there.close()  # so that either end is told when the other is gone
            self.workers.append((worker, here))

    def put(self, key: int, prediction: str, reference: str) -> None:
        """Have the answer scored in the background, where there is one."""
        if self.workers:
            self.sent += 1
            self.sender.submit(self.workers[self.sent % len(self.workers)][1].send, (key, prediction, reference))

    def scores(self, pairs: Mapping[int, tuple[str, str]]) -> dict[str, float]:
        """The mean of each score over all pairs of (prediction, reference), in their order; what was put is not scored again."""
        found: dict[int, dict[str, float]] = {}
        self.sender.shutdown()
        for worker, connection in self.workers:
            try:
                connection.send(None)
                found |= connection.recv()
            except (OSError, EOFError):  # that process was killed, or could not start
                continue
            worker.join()
        return self.metric.mean([found.get(key) or self.metric.score(*pair) for key, pair in pairs.items()])


def score_all(metric: Metric, connection: Connection) -> None:
    """Score what comes until None comes, and send all scores back; the end of the other process ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the end of the other process is what counts
    if hasattr(os, "nice"):
        os.nice(10)  # the model goes first
    found: dict[int, dict[str, float]] = {}
    try:
        while (given := connection.recv()) is not None:
            key, *pair = given
            found[key] = metric.score(*pair)
        connection.send(found)
    except (EOFError, OSError):
        pass
