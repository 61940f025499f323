"""Plain text, packed into rows of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.data.encode import Counts, Encoder
from glmtuner.data.records import Example
from glmtuner.errors import ConfigError
from glmtuner.templates.base import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class BlockEncoder(Encoder):
    """Documents one behind the other, each with the tokenizer's end of text, cut into rows of `block_length` tokens.

    Nothing is dropped: the last row of a batch of documents is shorter. Every row begins with the template's own prefix
    ([gMASK]<sop> in the GLM family), which is not learned and without which these models were never trained.
    """

    block_length: int

    batch: ClassVar[int] = 1000
    accepts: ClassVar[tuple[str, ...]] = ("plain text",)
    usage_hint: ClassVar[str] = (
        "stage=pt learns plain text: one column, which columns.prompt of the dataset's entry names (text in a file "
        "without an entry), or the lines of a .txt file; name such a dataset, or type stage=sft"
    )

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """Rows of `input_ids` and `labels`; records are documents here, not rows."""
        start, documents = self.template.documents(self.tokenizer, [str(example.text) for example in examples])
        room = self.block_length - len(start)
        if room < 2:
            raise ConfigError(f"stage.block_length={self.block_length}: the template alone needs {len(start)} tokens")
        tokens = [token for document in documents for token in document]
        counts = Counts(records=len(examples))
        rows = []
        for place in range(0, len(tokens), room):
            block = tokens[place : place + room]
            rows.append({"input_ids": [*start, *block], "labels": [*[IGNORE_INDEX] * len(start), *block]})
            counts.tokens += len(start) + len(block)
            counts.learned_tokens += len(block) - (not start)  # nothing stands before the first token to tell it from
        return rows, counts
