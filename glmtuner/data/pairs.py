"""Ranked pairs as rows, and as batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.collate import Collator
from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder, prompt_text, tools_of
from glmtuner.data.records import Example, Message
from glmtuner.data.reference import reference_of_rows
from glmtuner.data.weights import weights_of_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PairEncoder(Encoder):
    """A row for each pair: `input_ids` and `labels` with the chosen answer, `rejected_ids` and `rejected_labels` with the other."""

    accepts: ClassVar[tuple[str, ...]] = ("ranked pairs",)
    usage_hint: ClassVar[str] = (
        "this stage learns from ranked pairs: two answers to one question, the better one first (`output: [chosen, "
        "rejected]`, or columns chosen and rejected); name such a dataset, or type stage=sft"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "rejected_ids", "rejected_labels")

    def answered(self, example: Example) -> Example:
        return replace(example, messages=[*example.messages, chosen_of(example)])

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """Both answers follow the same prompt, which is shortened once; each is truncated to `max_target_length`."""
        counts = Counts(records=len(examples))
        with_chosen = [[*example.messages, chosen_of(example)] for example in examples]
        conversations, chosen = self._encode_fitting(with_chosen, counts, tools_of(examples))
        with_rejected = [
            [*messages[:-1], rejected_of(example)] for messages, example in zip(conversations, examples, strict=True)
        ]
        rejected = self._encode(with_rejected, tools_of(examples))
        rows = []
        for index, messages in enumerate(conversations):
            example, better, worse = examples[index], chosen[index], rejected[index]
            if (
                better.thinking != worse.thinking
            ):  # both answer the same prompt: the one without a thought learns an empty one
                thinking = replace(self, template=self.template.always_thinking())
                pair = [messages, with_rejected[index]]
                better, worse = thinking._encode(pair, [example.tools] * 2)
            if better.unrendered or worse.unrendered:
                counts.unrendered += 1
                counts.records -= 1
                continue
            counts.thinking += better.thinking is True
            counts.not_thinking += better.thinking is False
            row, rejected_row = self._row(better, counts), self._row(worse, counts)
            row |= {"weights": None, "weight": example.weight}  # a pair's, not its tokens'
            row |= {"rejected_ids": rejected_row["input_ids"], "rejected_labels": rejected_row["labels"]}
            row |= {
                "prompt": prompt_text(self._prefixed(messages[:-1])),
                "answer": self.answer_text(chosen_of(example)),
                "rejected": self.answer_text(rejected_of(example)),
            }
            rows.append(row)
        return rows, counts


def chosen_of(example: Example) -> Message:
    """The better answer of a pair."""
    return Message("assistant", str(example.chosen), tool_calls=example.chosen_calls)


def rejected_of(example: Example) -> Message:
    """The worse answer of a pair."""
    return Message("assistant", str(example.rejected), tool_calls=example.rejected_calls)


@dataclass(frozen=True, kw_only=True)
class PairCollator(Collator):
    """A batch of pairs: the chosen answers in its first half, the rejected ones, in the same order, in its second."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, int64, each [2 rows, longest]; of rows with weights also `weight`, [rows].

        Of rows with log-probabilities of a reference also `reference`, float32, [2 rows].
        """
        chosen = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        rejected = [{"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]} for row in rows]
        return super().__call__([*chosen, *rejected]) | weights_of_rows(rows) | reference_of_rows(rows)
