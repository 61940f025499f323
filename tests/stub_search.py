"""A search whose jobs are a formula: Hydra's launcher is replaced by one that writes the files of a finished run."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.storages.journal import JournalFileBackend

from glmtuner.run_folder.folder import RunFolder
from glmtuner.sweep.folders import job_slug
from glmtuner.sweep.search import OptunaSweeper
from glmtuner.sweep.search_settings import settings_of

STARTED = "started.log"  # a line for each job that was started: the folder's name
TPE = {"_target_": "optuna.samplers.TPESampler", "seed": 42, "n_startup_trials": 5}
SPACE = {"trainer.learning_rate": "tag(log, interval(1e-5, 1e-1))", "trainer.max_grad_norm": "interval(0, 1)"}
Job = Callable[
    [dict[str, str]], dict[str, float]
]  # from a trial's overrides to its metrics; whatever it raises is its failure


def bowl(drawn: dict[str, str]) -> dict[str, float]:
    """A loss with one minimum, at a rate of 1e-3 and a norm of 0.3."""
    import math

    rate, norm = float(drawn["trainer.learning_rate"]), float(drawn["trainer.max_grad_norm"])
    return {"eval_loss": (math.log10(rate) + 3) ** 2 + (norm - 0.3) ** 2, "train_runtime": 1 + norm}


def whole(path: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all, as a run does it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content))
    beside.replace(path)


class StubLauncher:
    def __init__(self, sweep: Path, job: Job, seconds: float) -> None:
        self.sweep, self.job, self.seconds = sweep, job, seconds

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        for words in jobs:
            values = dict(word.split("=", 1) for word in words)
            folder = RunFolder(self.sweep / values.pop("hydra.sweep.subdir").strip("'"))
            self.run(folder, values, [*words])
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in jobs]

    def run(self, folder: RunFolder, values: dict[str, str], words: list[str]) -> None:
        if folder.is_finished:
            return
        folder.lock()
        try:
            (folder / "failed.json").unlink(missing_ok=True)
            with (self.sweep / STARTED).open("a") as log:
                log.write(f"{folder.path.name}\n")
            time.sleep(self.seconds)
            metrics = self.job(values)
            (folder / "config.yaml").write_text("{}\n")
            whole(folder / "metrics.json", metrics)
        except Exception as error:
            folder.record_failure(error, words)
        finally:
            folder.unlock()


class StubSweeper(OptunaSweeper):
    """The sweeper without Hydra's part of it."""

    def __init__(
        self,
        sweep: Path,
        job: Job = bowl,
        objective: Any = "eval_loss",
        seconds: float = 0.0,
        fixed: Sequence[str] = (),
        **values: Any,
    ) -> None:
        self.sweep_dir, self.words = sweep, [*fixed]
        defaults = {
            "sampler": TPE, "direction": "minimize", "storage": None, "study_name": None, "n_trials": 20, "n_jobs": 1, "rungs": [],
            "pruner": {"_target_": "optuna.pruners.MedianPruner"},
            "max_failure_rate": 1.0, "params": SPACE,
        }  # fmt: skip
        self.settings = settings_of({**defaults, **values}, objective, sweep)
        self.whole_config = OmegaConf.create({"hydra": {"runtime": {"config_sources": []}, "launcher": {}}})
        self.jobs = StubLauncher(sweep, job, seconds)

    def run(self) -> None:
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        self.sweep(self.words)

    def subdir_of(self, overrides: list[str], number: int) -> str:
        return job_slug(",".join(overrides))


def in_child(run: Callable[[], None]) -> Any:
    """A forked process that runs it; forking is what makes many kills quick."""
    child = get_context("fork").Process(target=run)
    child.start()
    return child


def killed_at_random(sweeper: StubSweeper, seed: int) -> int:
    """How often the search was killed, a moment after one more of its trials was begun, before it ended by itself."""
    moments, kills, log = random.Random(seed), 0, sweeper.sweep_dir / "search.journal"
    size = lambda: log.stat().st_size if log.exists() else 0  # noqa: E731
    while True:
        # a machine that is busy may see to it late: the first two searches are slow enough to be caught
        sweeper.jobs.seconds = 0.01 if kills >= 2 else 0.3
        before, child = size(), in_child(sweeper.run)
        while child.exitcode is None and size() == before:
            time.sleep(0.002)
        child.join(moments.uniform(0, 0.3))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            return kills
        assert child.exitcode == -signal.SIGKILL and kills < 200


def trials_of(sweep: Path, storage: str | None = None) -> list[Any]:
    """The trials of the only study in the sweep's journal, or in another storage, read by Optuna itself."""
    import optuna
    from optuna.storages import JournalStorage

    opened = storage or JournalStorage(JournalFileBackend(str(sweep / "search.journal")))
    (name,) = [study.study_name for study in optuna.get_all_study_summaries(opened)]
    return optuna.load_study(study_name=name, storage=opened).get_trials()


def started(sweep: Path) -> list[str]:
    """The folders of the jobs in the order of their starts."""
    return (sweep / STARTED).read_text().split() if (sweep / STARTED).exists() else []


def kill_at_append(number: int, share: float) -> None:
    """Let this process be killed at its `number`-th write to a journal, after that share of the line's bytes."""
    whole, count = JournalFileBackend.append_logs, [0]

    def append(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        count[0] += 1
        if count[0] <= number:
            whole(self, logs)
            return
        line = (json.dumps(logs[0], separators=(",", ":")) + "\n").encode()
        self._lock.acquire()
        with open(self._file_path, "ab") as file:
            file.write(line[: round(len(line) * share)])
        os.kill(os.getpid(), signal.SIGKILL)

    JournalFileBackend.append_logs = append  # type: ignore[method-assign]
