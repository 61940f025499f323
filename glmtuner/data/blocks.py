"""Plain text, packed into rows of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class BlockEncoder(Encoder):
    """Documents, each followed by the end-of-text token, concatenated and cut into rows of `block_length` tokens.

    Nothing is dropped: the last row of a batch of documents is shorter. Every row begins with the template's own prefix
    ([gMASK]<sop> in the GLM family), which is not learned; these models were never trained without it.
    """

    block_length: int

    batch_size: ClassVar[int] = 1000
    accepts: ClassVar[tuple[str, ...]] = ("plain text",)
    usage_hint: ClassVar[str] = (
        "stage=pt learns plain text: one column, named by columns.prompt of the dataset's entry (`text` in a file "
        "without an entry), or the lines of a .txt file; name such a dataset, or type stage=sft"
    )

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """Rows of `input_ids` and `labels`; the counts' records are documents, not rows."""
        start, documents = self.template.documents(self.tokenizer, [str(example.text) for example in examples])
        text_length = self.block_length - len(start)
        if text_length < 2:
            raise ConfigError(
                f"stage.block_length={self.block_length}: the template alone needs {len(start)} tokens; type at least "
                f"stage.block_length={len(start) + 2}"
            )
        tokens = [token for document in documents for token in document]
        weights = None
        if any(example.weight != 1 for example in examples):
            pairs = zip(examples, documents, strict=True)
            weights = [example.weight for example, document in pairs for _ in document]
        counts = Counts(records=len(examples))
        rows = []
        for begin in range(0, len(tokens), text_length):
            block = tokens[begin : begin + text_length]
            labels = [*[IGNORE_INDEX] * len(start), *block]
            each = None if weights is None else [*[1.0] * len(start), *weights[begin : begin + text_length]]
            rows.append({"input_ids": [*start, *block], "labels": labels, "weights": each, "weight": 1.0})
            counts.tokens += len(start) + len(block)
            counts.learned_tokens += len(block) - (not start)  # the first token has nothing to be predicted from
        return rows, counts
