"""The process in which a job of hydra/launcher=joblib runs: it stays alive between jobs, as long as they end well.

joblib keeps its own processes between jobs; each of them has one such worker. A job that fails, is killed or is stopped ends its
worker, so that nothing of it reaches the next job.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from glmtuner.distributed import ranks
from glmtuner.distributed.visible import visible_gpus
from glmtuner.sweep.launchers import one_gpu

CLOSING_SECONDS = 30.0  # in which a worker whose input was closed must end

_worker: "Worker | None" = None


class Worker:
    """A process for jobs of the sweep in `root`, with one of the machine's GPUs that no other job uses as long as it lives."""

    def __init__(self, root: Path) -> None:
        self.root, self.environment = root, dict(os.environ)
        self.gpu = ExitStack()
        own = self.gpu.enter_context(one_gpu(root))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner.cli.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **own},
        )

    def suits(self, root: Path) -> bool:
        """Whether it lives, and would start the same today."""
        return self.process.poll() is None and self.root == root and self.environment == dict(os.environ)

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """The exit code of the job; of a process that died, the negative number of the signal."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with ranks.forwarding([self.process]) as forwarded:
            try:
                self.process.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:  # it was killed between two jobs
                return self.process.wait()
            answer = self.process.stdout.readline()
            code = int(json.loads(answer)) if answer else self.process.wait()
        return 128 - code if -code in forwarded else code

    def close(self) -> None:
        """End the process, and give its GPU back."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.gpu.close()


def run_job(root: Path, arguments: Sequence[str], log: Path, jobs_at_once: int) -> int:
    """Run a job in this process' worker, started anew where the one of the job before has ended; returns its exit code.

    With more jobs at once than GPUs the worker is closed after the job: an idle one would keep memory of a GPU that others wait for.
    """
    global _worker
    if _worker is not None and not _worker.suits(root):
        close()
    if _worker is None:
        _worker = Worker(root)
    code = 1
    try:
        code = _worker.run(arguments, log)
    finally:
        if code or too_many(jobs_at_once):
            close()
    return code


def close() -> None:
    """End this process' worker, if it has one."""
    global _worker
    if _worker is not None:
        _worker.close()
    _worker = None


def close_all() -> None:
    """End this process' worker, and joblib's processes with theirs: those of another sweep start in another folder."""
    close()
    if "joblib.externals.loky" in sys.modules:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor(reuse=True).shutdown(wait=True)


def too_many(jobs_at_once: int) -> bool:
    """Whether the jobs are more than the machine's GPUs; -1, as joblib counts, is one a core."""
    gpus = len(visible_gpus())
    return gpus > 1 and not 0 < jobs_at_once <= gpus
