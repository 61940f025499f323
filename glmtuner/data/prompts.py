"""Prompts without answers, for a stage that generates the answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.collate import Collator
from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder, prompt_text, tools_of
from glmtuner.data.records import Example, Message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PromptEncoder(Encoder):
    """A row for each question; the answers in the records are not used."""

    accepts: ClassVar[tuple[str, ...]] = ("single answers", "feedback", "ranked pairs")
    usage_hint: ClassVar[str] = (
        "stage=ppo answers prompts; name a dataset of instructions or conversations (their answers are not used)"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    learns: ClassVar[bool] = False

    def answered(self, example: Example) -> Example:
        turns = example.messages if example.messages[-1].role != "assistant" else example.messages[:-1]
        return replace(example, messages=[*turns, Message("assistant", "a")])

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """Rows of `input_ids`, which end where the answer begins, and the readable `prompt`."""
        counts = Counts(records=len(examples))
        answered = [self.answered(example).messages for example in examples]
        conversations, encoded = self._encode_fitting(answered, counts, tools_of(examples))
        prompts = self._prompts(examples, conversations, encoded)
        counts.tokens = sum(map(len, prompts))
        modes = [
            row.thinking if self.asks_thinking is None or row.thinking is None else self.asks_thinking
            for row in encoded
        ]
        counts.thinking, counts.not_thinking = modes.count(True), modes.count(False)
        rows = [
            {"input_ids": ids, "prompt": prompt_text(self._prefixed(messages[:-1]))}
            for ids, messages in zip(prompts, conversations, strict=True)
        ]
        return rows, counts


@dataclass(frozen=True, kw_only=True)
class LabelledPromptEncoder(PromptEncoder):
    """A row for each question, with the record's own answer to it, which is compared with others and not learned."""

    usage_hint: ClassVar[str] = (
        "stage=grpo answers prompts; name a dataset of instructions or conversations (their answers are the labels of rewards)"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "prompt", "answer")

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """The rows of PromptEncoder, with the readable `answer`."""
        rows, counts = super().encode(examples)
        return [{**row, "answer": self._label(example)} for row, example in zip(rows, examples, strict=True)], counts

    def _label(self, example: Example) -> str:
        """The record's answer, of a pair the better one; "" where it is marked as a bad one, or where there is none."""
        if example.chosen is not None:
            return self.answer_text(Message("assistant", example.chosen, tool_calls=example.chosen_calls))
        last = example.messages[-1]
        return self.answer_text(last) if last.role == "assistant" and example.desirable is not False else ""


@dataclass(frozen=True, kw_only=True)
class PromptCollator(Collator):
    """A batch of prompts, padded on the right like every batch; generation pads on the left itself."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids` and `attention_mask`, int64, each [rows, longest]."""
        batch = super().__call__([{**row, "labels": row["input_ids"]} for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True, kw_only=True)
class LabelledPromptCollator(PromptCollator):
    """A batch of prompts, with their texts and the labels."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, Any]":
        """As PromptCollator, with `prompt` and `answer`, lists of texts, one a row."""
        return {**super().__call__(rows), **{name: [row[name] for row in rows] for name in ("prompt", "answer")}}


def prompts_of(batch: "dict[str, torch.Tensor]") -> list[list[int]]:
    """The prompts of a batch without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
