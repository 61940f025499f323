"""Single answers that were judged good or bad, as rows and as batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.collate import Collator
from glmtuner.data.encode import Counts, Encoder
from glmtuner.data.records import Example
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class FeedbackEncoder(Encoder):
    """One row an answer, as for stage=sft, with `is_desirable`."""

    accepts: ClassVar[tuple[str, ...]] = ("feedback",)
    usage_hint: ClassVar[str] = (
        "stage=kto learns from feedback: answers marked true (good) or false (bad) in the column that columns.kto_tag of "
        "the dataset's entry names; name such a dataset, or type stage=sft"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "other_ids", "is_desirable")

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        rows, counts = super().encode(examples)
        for row, example in zip(rows, examples, strict=True):
            row["is_desirable"] = example.desirable
        return rows, counts


def with_other_answers(rows: "Dataset") -> "Dataset":
    """The rows with `other_ids`: the answer to the next row's question, the first one's behind the last.

    KTO measures how far the policy has moved on answers that do not belong to their prompts.
    """
    from datasets import Features, List, Value, concatenate_datasets

    following = rows.select([*range(1, len(rows)), 0]).map(
        lambda row: {"other_ids": row["input_ids"][answer_start(row["labels"]) :]},
        remove_columns=rows.column_names,
        features=Features({"other_ids": List(Value("int32"))}),
    )
    return concatenate_datasets([rows.flatten_indices(), following], axis=1)


def answer_start(labels: Sequence[int]) -> int:
    """The place of the first label that is learned."""
    return next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)


@dataclass(frozen=True, kw_only=True)
class FeedbackCollator(Collator):
    """A batch of answers in its first half; the same prompts with answers that belong to others in its second."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, each [2 rows, longest], and `is_desirable`, [rows]."""
        import torch

        crossed = []
        for row in rows:
            start = answer_start(row["labels"])
            ids = [*row["input_ids"][:start], *row["other_ids"]]
            crossed.append({"input_ids": ids, "labels": [IGNORE_INDEX] * start + list(row["other_ids"])})
        return {
            **super().__call__([*rows, *crossed]),
            "is_desirable": torch.tensor([row["is_desirable"] for row in rows], dtype=torch.bool),
        }
