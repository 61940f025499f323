"""The text that an answer is scored against: a record's label as the tokenizer can express it, cut as in training."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from glmtuner.inference.answer import opens_thought
from glmtuner.inference.detokenize import decode_answer
from glmtuner.inference.generate import until_stop
from glmtuner.templates.answers import read_answer
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.encoding import encode_text
from glmtuner.templates.tool_calls import Syntax

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_text(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], syntax: Syntax | None = None) -> str:
    """The text of an answer's tokens, stripped: ChatGLM3 begins it with a line break. `syntax` is that of its tool calls."""
    return decode_answer(tokenizer, tokens, syntax).strip()


def reference_of(
    row: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Sequence[int],
    max_target_length: int,
    syntax: Syntax | None = None,
) -> str:
    """What a perfect answer to the encoded record decodes to, as in ChatGLM-Efficient-Tuning.

    A tokenizer may not be able to express a label (ChatGLM-6B's turns full-width punctuation into ASCII, others drop line
    breaks or accents), and a label may be longer than `max_target_length`. The tokens are those that training would learn; of a
    last answer that is not learned, those of its text alone.
    """
    if not row["answer"].strip():
        return ""
    tokens = until_stop(learned_answer(row), stop_ids)
    if not tokens:
        tokens = list(encode_text(tokenizer, [row["answer"]])[0])[: max_target_length - 1]  # and the stop token
    return answer_text(tokenizer, tokens, syntax)


def learned_answer(row: Mapping[str, Any]) -> list[int]:
    """The learned tokens of the last answer, its stop token included; empty if only earlier answers are learned."""
    start, end = _learned_range(row)
    return list(row["labels"][start:end])


def opens_reference(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the last answer is learned behind a prompt that opens its thought; the prompt that is asked may be another."""
    start, end = _learned_range(row)
    return start < end and opens_thought(tokenizer, row["input_ids"][:start])


def split_answer(text: str, in_thought: bool) -> tuple[str, str]:
    """The thought of an answer, "" if it has none, and the rest; `in_thought`: its prompt opens a thought."""
    read = read_answer(text, None, thinks=True, in_thought=in_thought)
    return read.reasoning.strip(), read.content.strip()


def _learned_range(row: Mapping[str, Any]) -> tuple[int, int]:
    """Where the learned tokens of the last answer begin and end; an empty range if only earlier answers are learned."""
    ids, labels, prompt = row["input_ids"], row["labels"], row["prompt_ids"]
    end = next((index for index in range(len(labels), 0, -1) if labels[index - 1] != IGNORE_INDEX), 0)
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    # a chat template may end a prompt otherwise than it begins an answer
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompt, strict=False)))
    return (start, end) if start >= shared else (end, end)
