"""What the board's child processes compute: `python -m glmtuner.board.tasks ROOT now|nice`, a request and an answer a line of JSON."""

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmtuner.board.index import Index
from glmtuner.board.predictions import Asked, Predictions
from glmtuner.board.root import Root
from glmtuner.board.sweep_view import bounds_of, ranking_view
from glmtuner.errors import CheckpointError, ConfigError, GlmtunerError
from glmtuner.report.ranking import Ranking, build_row, rank_jobs
from glmtuner.report.record_scores import RecordScores, record_scores
from glmtuner.run_folder.files import strict_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import BENCHMARKS, LOSSES, METRICS, PREDICTIONS
from glmtuner.run_folder.redaction import flatten

MOST_SCORES = 300  # runs whose records' scores are kept


class Tasks:
    """The functions that can be asked for, and what they keep between two questions."""

    def __init__(self, root: Root) -> None:
        self.root, self.index = root, Index(root, ranks=False)
        self.predictions = Predictions()
        self._scores: OrderedDict[Path, tuple[Any, dict[str, RecordScores]]] = OrderedDict()

    def ranking(self, id: str) -> dict[str, Any]:
        """The ranking of a sweep with intervals, and the intervals of each of its jobs by their names."""
        sweep = self.index.sweep(id)
        ranking = rank_jobs(sweep.path, [*sweep.jobs.values()], self._record_scores)
        return {"ranking": ranking_view(ranking), "intervals": intervals_by_job(ranking)}

    def intervals(self, id: str) -> dict[str, list[float]]:
        """The intervals of the metrics of a run that is no job of a sweep."""
        job = self.index.record(id).job
        return bounds_of(build_row([job], [], [], self._record_scores).intervals) if job is not None else {}

    def predicted(self, id: str, other: str | None, asked: dict[str, Any]) -> dict[str, Any]:
        """A page of a run's answers with their scores, beside those of another run to the same questions."""
        record = self.index.record(id)
        beside = self.index.record(other) if other else None
        return self.predictions.page(record, beside, Asked(**asked))

    def compared(self, one: str, other: str) -> dict[str, Any]:
        """The comparison of two runs, or of two sweeps, as `diff` prints it."""
        from glmtuner.compare.diff import diff_runs
        from glmtuner.compare.loaded import kind_of
        from glmtuner.compare.sweeps import diff_sweeps

        paths = [self._folder(one), self._folder(other)]
        kinds = [kind_of(path, "diff") for path in paths]
        if len({*kinds}) > 1:
            raise ConfigError(
                f"{one} is a {kinds[0]} and {other} a {kinds[1]}: runs are compared with runs, and sweeps with sweeps"
            )
        document = (diff_runs if kinds[0] == "run" else diff_sweeps)(paths)
        return {
            "kind": kinds[0],
            "title": document.title,
            "verdict": document.verdict,
            "differs": document.differs,
            "sections": [
                {
                    "title": section.title,
                    "sentences": list(section.sentences),
                    "header": list(section.header),
                    "rows": [list(row) for row in section.rows],
                    "has_texts": section.has_texts,
                    "is_difference": section.is_difference,
                }
                for section in document.sections
            ],
        }

    def defaults(self, words: list[str]) -> dict[str, Any]:
        """The configuration of these choices of presets by dotted key."""
        from omegaconf import OmegaConf

        from glmtuner.config.compose import compose
        from glmtuner.launch.register import register_presets

        register_presets()
        return flatten(OmegaConf.to_container(compose(words).config, resolve=True, enum_to_str=True))

    def samples(self, id: str, dataset: str | None, count: int) -> dict[str, Any]:
        """The first rows of a data set of the run, as they are learned."""
        from glmtuner.board.samples import samples

        return samples(self.index.record(id), dataset, count)

    def _folder(self, id: str) -> Path:
        try:
            return self.index.record(id).path
        except CheckpointError:
            return self.index.sweep(id).path

    def _record_scores(
        self, folder: RunFolder, values: Mapping[str, Any], measured: Iterable[str]
    ) -> dict[str, RecordScores]:
        """`record_scores`, kept until one of the files that it reads changes."""
        signature = tuple(_signature(folder / name) for name in (METRICS, PREDICTIONS, LOSSES, BENCHMARKS))
        known = self._scores.get(folder.path)
        if known is None or known[0] != signature:
            known = (signature, record_scores(folder, values, measured))
        self._scores[folder.path] = known
        self._scores.move_to_end(folder.path)
        while len(self._scores) > MOST_SCORES:
            self._scores.popitem(last=False)
        return known[1]


def intervals_by_job(ranking: Ranking) -> dict[str, dict[str, list[float]]]:
    """The intervals of each job's metrics by the name of its folder."""
    alone = [row for each in ranking.rows for row in (each.seeds or [each])]
    return {row.jobs[0].name: bounds_of(row.intervals) for row in alone if row.intervals}


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return None


def answer_to(tasks: Tasks, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, or its error as a paragraph."""
    try:
        task: Callable[..., Any] = getattr(tasks, request["task"])
        return {"answer": task(**request["arguments"])}
    except GlmtunerError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a damaged folder can do
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def main(arguments: list[str]) -> None:
    """Answer until standard input ends, as it does when the board does."""
    if arguments[1] == "nice":
        with suppress(OSError, AttributeError):
            os.nice(10)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what else is printed is no answer
    tasks = Tasks(Root(Path(arguments[0])))
    for line in sys.stdin:
        answers.write(strict_json(answer_to(tasks, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
