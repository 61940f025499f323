"""TensorBoard."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Tracker
from glmtuner.run_folder.files import read_lines
from glmtuner.run_folder.names import CONFIG, PREDICTIONS, SAMPLED
from glmtuner.run_folder.redaction import flatten

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MOST_ANSWERS = 1000  # of predictions, and of sampled answers


@preset("tracker", "tensorboard")
@dataclass(kw_only=True)
class Tensorboard(Tracker):
    """Event files in the run folder's tensorboard/: the history, the config, and the final metrics by hyperparameters.

    Predictions, and the answers that stage=grpo sampled, are texts.
    """

    def __post_init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def start(self, run: Run, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        logs = folder / "tensorboard"
        shutil.rmtree(logs, ignore_errors=True)  # a resumed run logs its earlier history again
        self._writer = SummaryWriter(str(logs))
        config = (folder / CONFIG).read_text(encoding="utf-8")
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()))

    def log(self, line: dict[str, float]) -> None:
        from transformers.integrations import rewrite_logs

        if self._writer is not None:
            for name, value in rewrite_logs({name: value for name, value in line.items() if name != "step"}).items():
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()

    def abandon(self, preempted: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self, folder: Path, metrics: dict[str, float]) -> str | None:
        if self._writer is None:
            return None
        config = flatten(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
        hparams = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
        self._writer.add_hparams(hparams, metrics, run_name=".")  # into the same folder
        for name, file in (("predictions", PREDICTIONS), ("sampled", SAMPLED)):
            for step, text in texts_by_step(folder / file):
                self._writer.add_text(name, text, step)
        self.abandon()
        return f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}"


def texts_by_step(path: Path) -> Iterator[tuple[int, str]]:
    """(step, its lines as Markdown's preformatted text) of a file of answers; 0 where the file has no steps."""
    lines = islice(read_lines(path), MOST_ANSWERS)
    for step, group in groupby(lines, key=lambda line: line.get("step", 0)):
        if isinstance(step, int):
            yield step, "".join(f"    {json.dumps(line, ensure_ascii=False)}\n" for line in group)
