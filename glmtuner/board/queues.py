"""SLURM's queue, asked in the background, so that no page waits for it."""

import threading
import time
from collections.abc import Iterable

from glmtuner.sweep.queue import Queued, in_queue

EVERY = 10.0  # seconds between two questions


class Queues:
    """What squeue said last of the jobs that were asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._answer: dict[str, Queued] | None = None
        self._asked = 0.0
        self._thread: threading.Thread | None = None

    def of(self, ids: Iterable[str]) -> dict[str, Queued] | None:
        """The state of these jobs that are in the queue; None if SLURM has not answered, or not yet for all of them."""
        wanted = set(ids)
        if not wanted:
            return {}
        with self._lock:
            is_known = wanted <= self._wanted
            self._wanted |= wanted
            is_asking = self._thread is not None and self._thread.is_alive()
            if not is_asking and (not is_known or time.monotonic() - self._asked > EVERY):
                self._asked = time.monotonic()
                self._thread = threading.Thread(target=self._ask, args=({*self._wanted},), daemon=True, name="squeue")
                self._thread.start()
            return self._answer if is_known else None

    def _ask(self, ids: set[str]) -> None:
        answer = in_queue(ids)
        with self._lock:
            self._answer = answer
