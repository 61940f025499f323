"""Prompts alone, for a stage that answers them itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.collate import Collator
from glmtuner.data.encode import Counts, Encoder, shown
from glmtuner.data.records import Example, Message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PromptEncoder(Encoder):
    """One row a question; answers that the records hold are left aside."""

    accepts: ClassVar[tuple[str, ...]] = ("single answers", "feedback", "ranked pairs")
    usage_hint: ClassVar[str] = (
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


@dataclass(frozen=True, kw_only=True)
class PromptCollator(Collator):
    """A batch of prompts, padded on the right as all batches are; whoever answers them pads on the left."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids` and `attention_mask`, each [rows, longest]."""
        batch = super().__call__([{**row, "labels": row["input_ids"]} for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def prompts_of(batch: "dict[str, torch.Tensor]") -> list[list[int]]:
    """The prompts of a batch without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
