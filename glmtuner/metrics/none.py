"""No metric."""

from dataclasses import dataclass

from glmtuner.config.schema import Metric, preset


@preset("metric", "none")
@dataclass(kw_only=True)
class NoMetric(Metric):
    """Nothing is measured."""

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {}
