"""One process, unless torchrun, accelerate or srun start several."""

from collections.abc import Iterator
from dataclasses import dataclass

from glmtuner.config.groups import preset
from glmtuner.config.schema import Parallel, Run


@preset("parallel", "none")
@dataclass(kw_only=True)
class NotParallel(Parallel):
    """One process."""

    several = False

    def impossible(self, run: Run) -> Iterator[str]:
        if self.processes is not None and self.processes > 1:
            yield f"parallel.processes={self.processes} with parallel=none, which is one process; type parallel=ddp"
