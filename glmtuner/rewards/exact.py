"""The label, word for word."""

from dataclasses import dataclass
from typing import ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.rewards import Reward, Sampled
from glmtuner.templates.rendering import split_reasoning


@preset("reward", "exact")
@dataclass(kw_only=True)
class Exact(Reward):
    """1 for an answer that is the label, 0 for others; thoughts are left out, and the amount of white space does not count.

    ignore_case: do letters in the other case count as the same?
    """

    ignore_case: bool = False

    reads_labels: ClassVar[bool] = True

    def label_problem(self, label: str) -> str | None:
        return None if self._compared(label) else "holds nothing but white space or a thought"

    def score(self, sampled: Sampled) -> float:
        return float(self._compared(sampled.answer) == self._compared(sampled.label))

    def _compared(self, text: str) -> str:
        text = " ".join(split_reasoning(text)[1].split())
        return text.casefold() if self.ignore_case else text
