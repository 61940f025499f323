"""No tracker: the run folder alone."""

from dataclasses import dataclass

from glmtuner.config.schema import Tracker, preset


@preset("tracker", "none")
@dataclass(kw_only=True)
class NoTracker(Tracker):
    """Nothing besides the run folder."""
