"""A checkpoint that is being written while the training goes on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from glmtuner.console import complain
from glmtuner.distributed import ranks
from glmtuner.distributed.shard_files import failure_of_a_rank


class PendingCheckpoint:
    """The shards of a checkpoint, which a thread of every rank writes; then rank 0 calls `complete`."""

    def __init__(self, written: "Future[Any]", folder: Path, complete: Callable[[], None]) -> None:
        self.written, self.folder, self.complete = written, folder, complete
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        written.add_done_callback(self._finish)

    def _finish(self, written: "Future[Any]") -> None:
        """In the thread that has written the shards of this rank, after those of the others: mark the checkpoint complete."""
        try:
            self.failure = written.exception()
            if self.failure is None and ranks.is_main():
                self.complete()
        except BaseException as error:
            self.failure = error
        if self.failure is not None and ranks.is_main():
            complain(
                f"{self.folder} is not written, the training goes on until the next checkpoint or its end: "
                f"{' '.join(str(self.failure).split())[-300:]}"
            )
        self.ended.set()

    def wait(self) -> None:
        """Wait until the checkpoint is complete, on every rank; raises the error of any rank. A collective."""
        self.ended.wait()
        failed = [reason for reason in ranks.all_gather(None if self.failure is None else str(self.failure)) if reason]
        if self.failure is None and failed:
            raise ranks.ReportedByRank0(failed[0])
        if self.failure is not None:
            with failure_of_a_rank(self.folder):
                raise self.failure
