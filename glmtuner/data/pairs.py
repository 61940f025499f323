"""Ranked pairs as rows, and as batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.schema import Run
from glmtuner.data import DatasetSpec
from glmtuner.data.collate import Collator
from glmtuner.data.encode import Counts, Encoder, prompt_text
from glmtuner.data.records import Example, Message
from glmtuner.data.splits import Datasets, datasets_of
from glmtuner.templates.base import Template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PairEncoder(Encoder):
    """A row for each pair: `input_ids` and `labels` with the chosen answer, `rejected_ids` and `rejected_labels` with the other."""

    accepts: ClassVar[tuple[str, ...]] = ("ranked pairs",)
    usage_hint: ClassVar[str] = (
        "this stage learns from ranked pairs: two answers to one question, the better one first (`output: [chosen, "
        "rejected]`, or columns chosen and rejected); name such a dataset, or type stage=sft"
    )
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "rejected_ids", "rejected_labels")

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """Both answers follow the same prompt, which is shortened once; each is truncated to `max_target_length`."""
        counts = Counts(records=len(examples))
        with_chosen = [[*example.messages, Message("assistant", str(example.chosen))] for example in examples]
        conversations, chosen = self._encode_fitting(with_chosen, counts)
        with_rejected = [
            [*messages[:-1], Message("assistant", str(example.rejected))]
            for messages, example in zip(conversations, examples, strict=True)
        ]
        rejected = self._encode(with_rejected)
        rows = []
        for messages, example, better, worse in zip(conversations, examples, chosen, rejected, strict=True):
            row, rejected_row = self._row(better, counts), self._row(worse, counts)
            row |= {"rejected_ids": rejected_row["input_ids"], "rejected_labels": rejected_row["labels"]}
            row |= {
                "prompt": prompt_text(self._prefixed(messages[:-1])),
                "answer": example.chosen,
                "rejected": example.rejected,
            }
            rows.append(row)
        return rows, counts


@dataclass(frozen=True, kw_only=True)
class PairCollator(Collator):
    """A batch of pairs: the chosen answers in its first half, the rejected ones, in the same order, in its second."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, int64, each [2 rows, longest]."""
        rejected = [{"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]} for row in rows]
        return super().__call__([*rows, *rejected])


def pair_datasets(
    run: Run, specs: dict[str, DatasetSpec], template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> Datasets:
    """The encoded datasets of a stage that learns from ranked pairs."""
    encoder = PairEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())
    return datasets_of(run, specs, encoder)
