"""TensorBoard."""

import os
from dataclasses import dataclass
from pathlib import Path

from glmtuner.config.schema import Run, Tracker, preset


@preset("tracker", "tensorboard")
@dataclass(kw_only=True)
class Tensorboard(Tracker):
    """Event files in the run folder's tensorboard/."""

    def start(self, run: Run, folder: Path) -> list[str]:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
        return ["tensorboard"]
