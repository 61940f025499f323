"""A penalty on long answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from glmtuner.config.groups import Model, preset
from glmtuner.config.rewards import Reward, Sampled


@preset("reward", "length")
@dataclass(kw_only=True)
class Length(Reward):
    """From 0 to -1 as an answer's tokens fill the buffer before `max_tokens`, and -1 beyond (DAPO, arXiv:2503.14476, eq. 13).

    max_tokens: the length in tokens from which on the penalty is -1; null is the most that an answer can have.
    buffer_tokens: the number of tokens before it over which the penalty grows from 0.
    """

    buffer_tokens: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check_ranges(
            ("buffer_tokens", self.buffer_tokens >= 1, "1 or more"),
            (
                "max_tokens",
                self.max_tokens is None or self.max_tokens >= 1,
                "1 or more, or null for the longest answers",
            ),
        )

    def impossible(self, model: Model, max_tokens: int) -> Iterator[str]:
        longest = self.max_tokens or max_tokens
        if longest > max_tokens:
            yield (
                f"reward.length.max_tokens={self.max_tokens} is more than the {max_tokens} tokens that an answer can have "
                "(stage.max_new_tokens, or data.max_target_length); type a smaller number, or leave it out"
            )
        elif self.buffer_tokens > longest:
            yield (
                f"reward.length.buffer_tokens={self.buffer_tokens} is more than the {longest} tokens of the longest answer without a "
                f"penalty of -1; type reward.length.buffer_tokens={max(longest // 4, 1)}, or longer answers with stage.max_new_tokens"
            )

    def score(self, sampled: Sampled) -> float:
        free = (self.max_tokens or sampled.max_tokens) - self.buffer_tokens
        return -min(max(sampled.tokens - free, 0) / self.buffer_tokens, 1.0)
