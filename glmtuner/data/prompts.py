"""Prompts alone, for a stage that answers them itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.data.encode import Counts, Encoder, shown
from glmtuner.data.records import Example, Message


@dataclass(frozen=True, kw_only=True)
class PromptEncoder(Encoder):
    """One row a question; answers that the records hold are left aside."""

    takes: ClassVar[tuple[str, ...]] = ("single answers", "feedback", "ranked pairs")
    wanted: ClassVar[str] = (
        "stage=ppo answers prompts; name a dataset of instructions or conversations (their answers are not read)"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    learns: ClassVar[bool] = False

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """`input_ids` up to where the answer begins, and the `prompt` as people read it."""
        counts = Counts(records=len(examples))
        asked = [
            [*(messages if messages[-1].role == "user" else messages[:-1]), Message("assistant", "a")]
            for messages in (example.messages for example in examples)
        ]
        conversations, encoded = self._fitted(asked, counts)
        prompts = self.template.prompts(self.tokenizer, [self._prefixed(turns) for turns in conversations], encoded)
        counts.tokens = sum(map(len, prompts))
        rows = [
            {"input_ids": ids, "prompt": shown(self._prefixed(messages[:-1]))}
            for ids, messages in zip(prompts, conversations, strict=True)
        ]
        return rows, counts


def as_they_are(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """A batch of prompts, not padded: they are padded on the left to be answered, and on the right with their answers."""
    return {"input_ids": [list(row["input_ids"]) for row in rows]}
