"""A thought between its tags, then an answer."""

import re
from dataclasses import dataclass

from glmtuner.config.groups import preset
from glmtuner.config.rewards import Reward, Sampled

FORM = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
TAG = re.compile("</?think>")


@preset("reward", "format")
@dataclass(kw_only=True)
class Format(Reward):
    """1 for an answer that begins with one thought in `<think>` and `</think>`, followed by text; 0 for others.

    Neither of the two may be blank, nor may another of these tags follow. A `<think>` at the end of the prompt is the answer's.
    """

    def score(self, sampled: Sampled) -> float:
        found = FORM.fullmatch(sampled.answer)
        if found is None or not (found["thought"].strip() and found["answer"].strip()):
            return 0.0
        return float(not TAG.search(found["thought"]) and not TAG.search(found["answer"]))
