"""Single answers marked good or bad, as rows and as batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.collate import Collator
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example
from glmtuner.data.reference import reference_of_rows
from glmtuner.data.weights import weights_of_rows
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class FeedbackEncoder(Encoder):
    """A row for each answer, as for stage=sft, with `is_desirable`."""

    accepts: ClassVar[tuple[str, ...]] = ("feedback",)
    usage_hint: ClassVar[str] = (
        "stage=kto learns from feedback: answers marked true (good) or false (bad) in the column that columns.kto_tag of "
        "the dataset's entry names; name such a dataset, or type stage=sft"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "other_ids", "is_desirable")
    learns_undesirable: ClassVar[bool] = True

    def more_of(self, example: Example) -> dict[str, Any]:
        # an answer's, not its tokens'
        return {
            "is_desirable": example.desirable,
            "weight": example.weight * example.messages[-1].weight,
            "weights": None,
        }


def with_other_answers(rows: "Dataset") -> "Dataset":
    """The rows with `other_ids`: the answer of the next row, and for the last row that of the first.

    KTO estimates its KL term on prompts with answers of other prompts (Ethayarajh et al. 2024, arXiv:2402.01306).
    """
    from datasets import Features, List, Value, concatenate_datasets

    following = rows.select([*range(1, len(rows)), 0]).map(
        lambda row: {"other_ids": row["input_ids"][answer_start(row["labels"]) :]},
        remove_columns=rows.column_names,
        features=Features({"other_ids": List(Value("int32"))}),
    )
    return concatenate_datasets([rows.flatten_indices(), following], axis=1)


def answer_start(labels: Sequence[int]) -> int:
    """The index of the first label that is learned."""
    return next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)


@dataclass(frozen=True, kw_only=True)
class FeedbackCollator(Collator):
    """A batch of answers in its first half; the same prompts with answers of other prompts in its second."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, int64, each [2 rows, longest], and `is_desirable`, bool, [rows].

        Of rows with weights also `weight`, float32, [rows], of rows with log-probabilities of a reference `reference`, [2 rows].
        """
        import torch

        matched = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        mismatched = []
        for row in rows:
            start = answer_start(row["labels"])
            ids = [*row["input_ids"][:start], *row["other_ids"]]
            mismatched.append({"input_ids": ids, "labels": [IGNORE_INDEX] * start + list(row["other_ids"])})
        return {
            **super().__call__([*matched, *mismatched]),
            **weights_of_rows(rows),
            **reference_of_rows(rows),
            "is_desirable": torch.tensor([row["is_desirable"] for row in rows], dtype=torch.bool),
        }
