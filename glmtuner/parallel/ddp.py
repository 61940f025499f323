"""DistributedDataParallel, by torch and accelerate."""

from dataclasses import dataclass
from typing import Any

from glmtuner.config.groups import preset
from glmtuner.config.schema import SharedRows


@preset("parallel", "ddp")
@dataclass(kw_only=True)
class Ddp(SharedRows):
    """Every process holds the full model; gradients are averaged (Li et al. 2020, arXiv:2006.15704)."""

    def arguments(self) -> dict[str, Any]:
        return {"ddp_find_unused_parameters": False}
