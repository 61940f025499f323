"""What a board shows: the routes that only read."""

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response

from glmtuner import __version__
from glmtuner.board.curves import AXES, MOST_POINTS, POINTS, curves, metrics_of
from glmtuner.board.index import Index
from glmtuner.board.records import Record
from glmtuner.board.root import Root
from glmtuner.board.run_files import REPORT_POLICY, file_in, log_of, picture_of
from glmtuner.board.run_view import run_view
from glmtuner.board.samples import MOST_ROWS
from glmtuner.board.sweep_view import sweep_view
from glmtuner.board.workers import Worker
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.files import strict_json
from glmtuner.run_folder.names import CONFIG, OVERRIDES, REPORT_PAGE

MOST_RUNS = 200  # in one picture
MOST_LINES = 500  # answers on one page
MOST_SAMPLES = 20  # answers to api/samples that are kept

Ids = Annotated[list[str], Query(alias="id")]


class Views:
    """The routes below /api/ that read the folder. Each is a plain function, called in a thread."""

    def __init__(self, root: Root, read_only: bool) -> None:
        self.root, self.read_only = root, read_only
        self.index = Index(root, read_only)
        self.worker = Worker(root.path)
        self._samples: dict[tuple[Any, ...], dict[str, Any]] = {}  # that were asked for last
        self.router = APIRouter()
        routes = (
            self.about, self.runs, self.values, self.keys, self.metrics, self.curves, self.run, self.predictions, self.samples,
            self.log, self.sweep, self.compare,
        )  # fmt: skip
        for route in routes:
            self.router.get(f"/api/{route.__name__}")(route)
        for file in (self.report, self.picture):
            self.router.get(f"/files/{file.__name__}")(file)

    def close(self) -> None:
        """End the child processes."""
        self.worker.close()
        if self.index.rankings is not None:
            self.index.rankings.worker.close()

    def about(self) -> Response:
        """What the page needs to know once: the folder, and whether anything can be changed."""
        return answer(
            {"folder": str(self.root.path), "read_only": self.read_only, "version": __version__, "static": False}
        )

    def runs(self, since: int | None = None) -> Response:
        """The rows of the table, and the sweeps."""
        return Response(self.index.changes(since), media_type="application/json")

    def values(self, key: str) -> Response:
        """The value of a configuration's key for each run that has it."""
        self.index.refresh()
        records = [*self.index.records.values()]
        return answer({record.id: record.values[key] for record in records if key in record.values})

    def keys(self) -> Response:
        """The dotted keys of all runs' configurations."""
        self.index.refresh()
        records = [*self.index.records.values()]
        return answer(sorted({key for record in records for key in record.values}))

    def metrics(self, ids: Ids) -> Response:
        """The names of the curves that these runs have."""
        found: dict[str, None] = {}
        for record in self._known(ids[:MOST_RUNS])[0]:
            with self.index.lock:
                found |= dict.fromkeys(metrics_of(record))
            self.index.touch_history(record)
        return answer([*found])

    def curves(
        self,
        ids: Ids,
        metric: Annotated[list[str], Query()],
        x: str = "step",
        points: Annotated[int, Query(ge=4, le=MOST_POINTS)] = POINTS,
    ) -> Response:
        """Curves of these runs."""
        if x not in AXES:
            raise ConfigError(f"x={x[:100]}: legal are {', '.join(AXES)}")
        if len(ids) > MOST_RUNS:
            raise ConfigError(f"{len(ids)} runs in one picture: legal are at most {MOST_RUNS}; select fewer")
        records, gone = self._known(ids)
        with self.index.lock:
            found = curves(records, metric, x, points)
        found["missing"] += [{"id": id, "why": "it is not there any more"} for id in gone]
        for record in records:
            self.index.touch_history(record)
        # its numbers are finite or null already, and there may be a hundred thousand of them
        return Response(json.dumps(found, allow_nan=False), media_type="application/json")

    def run(self, id: str) -> Response:
        """Everything about one run but its curves, predictions, samples and log."""
        return answer(run_view(self.index, self.index.record(id), self.worker))

    def predictions(
        self,
        id: str,
        search: str = "",
        metric: str = "",
        low: float | None = None,
        high: float | None = None,
        sort: str = "",
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_LINES)] = 50,
        beside: Annotated[str, Query(alias="with")] = "",
    ) -> Response:
        """A page of a run's answers with their scores, beside those of another run."""
        self.index.record(id)
        asked = {
            "search": search,
            "metric": metric,
            "low": low,
            "high": high,
            "sort": sort,
            "offset": offset,
            "limit": limit,
        }
        return answer(self.worker.ask("predicted", id=id, other=beside or None, asked=asked))

    def samples(self, id: str, dataset: str = "", count: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 20) -> Response:
        """The first rows of a run's training data, as they are learned."""
        record = self.index.record(id)
        key = (id, dataset, count, *(record.files.get(name) for name in (CONFIG, OVERRIDES)))
        if key not in self._samples:
            worker = Worker(self.root.path)  # of its own: it imports transformers, which takes seconds and memory
            try:
                found = worker.ask("samples", id=id, dataset=dataset or None, count=count)
            finally:
                worker.close()
            self._samples = {key: found} | dict([*self._samples.items()][: MOST_SAMPLES - 1])
        return answer(self._samples[key])

    def log(self, id: str, offset: Annotated[int | None, Query(ge=0)] = None) -> Response:
        """What a run has printed, from the offset on; the end of it without one."""
        return answer(log_of(self.root.path, self._folder(id), offset))

    def compare(self, a: str, b: str) -> Response:
        """What differs between two runs, or two sweeps."""
        return answer(self.worker.ask("compared", one=a, other=b))

    def report(self, id: str) -> Response:
        """The report of a run or a sweep, a page of its own."""
        path = file_in(self.root.path, self._folder(id), REPORT_PAGE)
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    def picture(self, id: str, name: str) -> Response:
        """A picture in the folder of a run or a sweep."""
        path, media_type = picture_of(self.root.path, self._folder(id), name)
        return FileResponse(path, media_type=media_type)

    def _known(self, ids: list[str]) -> tuple[list[Record], list[str]]:
        """The runs with these ids, and the ids of which there is none: a page may ask for a run that was removed a moment ago."""
        records, gone = [], []
        for id in dict.fromkeys(ids):
            try:
                records.append(self.index.record(id))
            except CheckpointError:
                gone.append(id)
        return records, gone

    def _folder(self, id: str) -> Path:
        """The folder of the run or of the sweep with this id."""
        self.index.refresh()
        with self.index.lock:
            if id in self.index.sweeps:
                return self.index.sweeps[id].path
        return self.index.record(id).path

    def sweep(self, id: str) -> Response:
        """A sweep: its leaderboard, its Pareto front, the decisions of its race, and the rows of its jobs."""
        return answer(sweep_view(self.index, self.index.sweep(id)))


def answer(value: Any) -> Response:
    """The value as JSON."""
    return Response(strict_json(value), media_type="application/json")
