"""Control tokens that somebody wrote as text: marks stand for them while a template is rendered."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MEANT = re.compile(r"</?(think|tool_call|tool_response|arg_key|arg_value|tools)>")  # markup that answers are written in
PRIVATE = range(0xF0000, 0xFFFFE)  # private-use characters, which are the marks


class Guard:
    """Replaces control tokens in text by marks: `any` are all of a tokenizer, `special` those that no answer means."""

    def __init__(
        self,
        any: re.Pattern[str] | None,
        special: re.Pattern[str] | None,
        marks: dict[str, str],
        free: Iterator[str],
    ) -> None:
        self.any, self.special, self.marks, self.free = any, special, marks, free

    def _mark(self, match: re.Match[str]) -> str:
        literal = match.group()
        if literal not in self.marks:
            self.marks[literal] = next(self.free)
        return self.marks[literal]

    def foreign(self, text: str) -> str:
        """Text that is not an answer, in which no control token is meant."""
        return self.any.sub(self._mark, text) if self.any else text

    def own(self, text: str) -> str:
        """Text of an answer, in which no special token is meant."""
        return self.special.sub(self._mark, text) if self.special else text

    def deep(self, value: Any, foreign: bool = False) -> Any:
        """The value with the texts in it guarded."""
        if isinstance(value, str):
            return self.foreign(value) if foreign else self.own(value)
        if isinstance(value, Mapping):
            return {self.deep(key, foreign): self.deep(entry, foreign) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.deep(entry, foreign) for entry in value]
        return value


def one_of(literals: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of these texts, the longest first; None of none."""
    ordered = sorted(filter(None, literals), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
