"""What a forecast puts in between while a run is set up; by default nothing."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmtuner.data.splits import Datasets


class Watcher:
    """Is told how far the setting up of a run is; glmtuner/launch/forecast/probe.py measures it, on fewer rows."""

    def reached(self, part: str) -> None:
        """The part of that name is done."""

    def data(self, load: "Callable[[], Datasets]") -> "Datasets":
        """The run's data, which `load` encodes or reads from the cache."""
        return load()

    def rows(self, data: "Datasets") -> "Datasets":
        """The data that the run goes on with; everything that is decided by all rows is decided."""
        return data
