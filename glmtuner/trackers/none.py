"""No tracker: the run folder alone."""

from dataclasses import dataclass

from glmtuner.config.groups import preset
from glmtuner.config.schema import Tracker


@preset("tracker", "none")
@dataclass(kw_only=True)
class NoTracker(Tracker):
    """Nothing besides the run folder."""
