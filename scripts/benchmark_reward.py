"""The reward that both tools of `benchmark.py --only grpo` maximize, as a plugin."""

from glmtuner.config.rewards import Sampled, reward_function


def variety(text: str) -> float:
    """The share of a text's characters that do not repeat."""
    return len({*text}) / max(len(text), 1)


@reward_function("variety")
def variety_of_answer(sampled: Sampled) -> float:
    """That of an answer."""
    return variety(sampled.answer)
