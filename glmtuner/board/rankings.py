"""Rankings with intervals, computed in the background."""

from typing import Any

from glmtuner.board.sweeps import Sweep


class Rankings:
    """The rankings of sweeps, as far as they were computed."""

    def get(self, sweep: Sweep) -> dict[str, Any] | None:
        """The ranking of the sweep as it is now; None until it is computed."""
        return None

    def is_pending(self, sweep: Sweep) -> bool:
        """Whether it is being computed."""
        return False
