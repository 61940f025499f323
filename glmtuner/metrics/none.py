"""No metric."""

from dataclasses import dataclass

from glmtuner.config.groups import Metric, preset


@preset("metric", "none")
@dataclass(kw_only=True)
class NoMetric(Metric):
    """Computes no scores."""

    name: str = "none"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """No scores."""
        return {}
