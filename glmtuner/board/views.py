"""What a board shows: the routes that only read."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

from glmtuner import __version__
from glmtuner.board.curves import AXES, MOST_POINTS, POINTS, curves, metrics_of
from glmtuner.board.index import Index
from glmtuner.board.root import Root
from glmtuner.board.run_view import run_view
from glmtuner.board.sweep_view import sweep_view
from glmtuner.errors import ConfigError
from glmtuner.run_folder.files import strict_json

MOST_RUNS = 200  # in one picture

Ids = Annotated[list[str], Query(alias="id")]


class Views:
    """The routes below /api/ that read the folder. Each is a plain function, called in a thread."""

    def __init__(self, root: Root, read_only: bool) -> None:
        self.root, self.read_only = root, read_only
        self.index = Index(root, read_only)
        self.router = APIRouter()
        for route in (self.about, self.runs, self.values, self.keys, self.metrics, self.curves, self.run, self.sweep):
            self.router.get(f"/api/{route.__name__}")(route)

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
        for id in ids[:MOST_RUNS]:
            record = self.index.record(id)
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
        records = [self.index.record(id) for id in ids]
        with self.index.lock:
            found = curves(records, metric, x, points)
        for record in records:
            self.index.touch_history(record)
        return answer(found)

    def run(self, id: str) -> Response:
        """Everything about one run but its curves, predictions, samples and log."""
        return answer(run_view(self.index, self.index.record(id)))

    def sweep(self, id: str) -> Response:
        """A sweep: its leaderboard, its Pareto front, the decisions of its race, and the rows of its jobs."""
        return answer(sweep_view(self.index, self.index.sweep(id)))


def answer(value: Any) -> Response:
    """The value as JSON."""
    return Response(strict_json(value), media_type="application/json")
