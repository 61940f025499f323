"""The budget of a sweep, or of a run: its limits, and the prices that a forecast is computed with."""

from collections.abc import Mapping
from dataclasses import dataclass

from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError


@dataclass(kw_only=True)
class Budget:
    """What all jobs of a sweep may take together; null is no limit.

    gpu_hours: hours of a GPU, each GPU of a job counted.
    cpu_hours: hours of a processor core, for jobs without a GPU: the processor time of the jobs' processes.
    money: in `currency`, at `price_per_gpu_hour`, or `price_per_cpu_hour` for jobs without a GPU.
    watts: the power of one GPU, or of the whole machine without one, where the machine does not tell it.
    forecast: whether a sweep with a limit is forecast, and refused if the forecast passes the limit, before it starts.
    """

    gpu_hours: float | None = None
    cpu_hours: float | None = None
    money: float | None = None
    price_per_gpu_hour: float | None = None
    price_per_cpu_hour: float | None = None
    currency: str = "USD"
    watts: float | None = None
    forecast: bool = True

    def __post_init__(self) -> None:
        names = ("gpu_hours", "cpu_hours", "money", "price_per_gpu_hour", "price_per_cpu_hour", "watts")
        values = {name: getattr(self, name) for name in names}
        wrong = [
            *range_errors(
                "budget",
                self,
                ((name, value is None or value > 0, "above 0, or null") for name, value in values.items()),
            )
        ]
        if not self.currency.strip():
            wrong.append("budget.currency is empty; type budget.currency=USD, or another")
        if self.money is not None and self.price_per_gpu_hour is None and self.price_per_cpu_hour is None:
            wrong.append(
                f"budget.money={self.money:g} without a price; type budget.price_per_gpu_hour=…, or budget.price_per_cpu_hour=… for "
                "jobs without a GPU"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def cost(self, gpu_hours: float, cpu_hours: float) -> float | None:
        """The money that these hours cost; None where hours have no price."""
        parts = ((gpu_hours, self.price_per_gpu_hour), (cpu_hours, self.price_per_cpu_hour))
        if any(hours and price is None for hours, price in parts):
            return None
        return sum(hours * (price or 0) for hours, price in parts)

    def limits(self) -> Mapping[str, float]:
        """The limits that are set, by key."""
        values = {"gpu_hours": self.gpu_hours, "cpu_hours": self.cpu_hours, "money": self.money}
        return {name: value for name, value in values.items() if value is not None}

    def passed(self, gpu_hours: float, cpu_hours: float) -> list[str]:
        """One clause for each limit that so many hours reach, such as `budget.cpu_hours=2 is reached by 2.13`."""
        reached = {"gpu_hours": gpu_hours, "cpu_hours": cpu_hours, "money": self.cost(gpu_hours, cpu_hours)}
        return [
            f"budget.{name}={limit:g} is reached by {used:.4g}"
            for name, limit in self.limits().items()
            if (used := reached[name]) is not None and used >= limit
        ]
