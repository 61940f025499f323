"""The base class of rewards, which score the answers that stage=grpo samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from glmtuner.config.groups import Model, preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError


class PolicyLoss(str, Enum):
    """The losses of stage=grpo."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    gspo = "gspo"
    rloo = "rloo"


class ScaleRewards(str, Enum):
    """By which standard deviation rewards are divided: that of a prompt's answers, that of all answers of a step, or none."""

    group = "group"
    batch = "batch"
    none = "none"


GROUP = "reward"  # the one group of which a run has several presets, each at reward.<name>


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """An answer that was sampled, as rewards see it."""

    prompt: str
    answer: str  # with its thoughts; `<think>` also where it stands at the end of the prompt
    label: str  # the record's own answer
    tokens: int  # of the answer, its stop token included
    max_tokens: int  # the most that it could have had
    stopped: bool  # does it end in a stop token? (False: it was cut at `max_tokens`)


@dataclass(kw_only=True)
class Reward:
    """A score of answers. A run's reward is the sum of its presets', each times its `weight`."""

    name: str
    weight: float = 1.0

    reads_labels: ClassVar[bool] = False  # does it compare answers with the records' own?
    uses_reward_model: ClassVar[bool] = False  # does model.reward_model give the scores?

    def __post_init__(self) -> None:
        self.check_ranges()

    def check_ranges(self, *ranges: tuple[str, bool, str]) -> None:
        """Raise ConfigError for values out of their ranges: (key, is it legal?, what is legal)."""
        key = f"{GROUP}.{self.name}"
        legal = (("weight", self.weight != 0, "any number but 0; leave the reward out instead"), *ranges)
        if wrong := list(range_errors(key, self, legal)):
            raise ConfigError("; ".join(wrong))

    def impossible(self, model: Model, max_tokens: int) -> Iterator[str]:
        """One sentence for each value that does not fit the run's model, or the most tokens of its answers."""
        yield from ()

    def label_problem(self, label: str) -> str | None:
        """Why nothing can be compared with a record's own answer, such as `holds no number`; None where it can."""
        return None

    def score(self, sampled: Sampled) -> float:
        """The score of one answer."""
        raise NotImplementedError

    def scores(self, sampled: Sequence[Sampled]) -> list[float]:
        """The scores of a step's answers, in their order; those of a prompt stand together."""
        return [self.score(each) for each in sampled]


def reward_function(name: str) -> Callable[[Callable[[Sampled], float]], Callable[[Sampled], float]]:
    """Register a plugin's function of one answer as `reward=<name>`; a reward with keys of its own is a class with `@preset`."""

    def register(function: Callable[[Sampled], float]) -> Callable[[Sampled], float]:
        def score(self: Reward, sampled: Sampled) -> float:
            return function(sampled)

        members = {"score": score, "__doc__": function.__doc__, "__module__": function.__module__}
        preset(GROUP, name)(dataclass(kw_only=True)(type(f"{function.__name__}_reward", (Reward,), members)))
        return function

    return register
