"""No tracker: everything is in the run folder only."""

from dataclasses import dataclass

from glmtuner.config.groups import preset
from glmtuner.config.schema import Tracker


@preset("tracker", "none")
@dataclass(kw_only=True)
class NoTracker(Tracker):
    """Tracks nothing."""
