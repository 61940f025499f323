"""The rows of a record, each with the turns that it was made of, its parts, and what was cut from it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from glmtuner.data.counts import Counts
from glmtuner.data.encode import Encoder
from glmtuner.data.records import Example, Message
from glmtuner.templates.base import IGNORE_INDEX, Template, Tools
from glmtuner.templates.base import Message as Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SHOWN = 60  # characters of a text that was cut
MOST_TOKENS = 2**31 - 1  # no limit


@dataclass(frozen=True)
class Part:
    """Tokens in a row that are `prompt`, `learned`, or the `stop` token that ends what is learned."""

    kind: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Row:
    """A row, and the turns that it was made of as the template gets them, the answer last.

    `thinking` is the mode of its prompt, None for a template without modes. `answer_cut`: the answer has lost its end.
    """

    turns: Sequence[Turn]
    tools: Tools
    input_ids: Sequence[int]
    labels: Sequence[int]
    thinking: bool | None
    answer_cut: bool = False

    @property
    def parts(self) -> list[Part]:
        return parts_of(self.input_ids, self.labels)

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens before the last answer that is learned; all of them where none is."""
        starts = [start for start, _ in learned_ranges(self.labels)]
        return self.input_ids[: starts[-1]] if starts else self.input_ids


@dataclass(frozen=True)
class Sample:
    """The rows of one record: those of `earlier` answers that need rows of their own, and its own with its other columns."""

    own: Row
    earlier: Sequence[Row]
    columns: Mapping[str, Any]
    counts: Counts
    cut: Sequence[str]  # what was cut, a phrase each


def sample_of(encoder: Encoder, example: Example) -> tuple[Sample | None, Counts]:
    """The rows of a record, and the counts of it; None if it has no row, for which the counts say why."""
    if not example.learned and encoder.learns:
        return None, Counts(unlearned=1)
    rows, counts = encoder.encode([example])
    conversations = encoder.conversations(example) if rows else []
    if not rows or not conversations:
        return None, counts
    *outside, turns = conversations
    (columns,) = rows
    thinking = True if counts.thinking else False if counts.not_thinking else None
    unlearned = [IGNORE_INDEX] * len(columns["input_ids"])
    own = Row(
        encoder.with_prefix(turns),
        example.tools,
        list(columns["input_ids"]),
        list(columns.get("labels", unlearned)),
        thinking,
        counts.answers_cut > 0,
    )
    earlier = [
        Row(
            encoder.with_prefix(part),
            example.tools,
            list(row["input_ids"]),
            list(row["labels"]),
            encoder.thinking_of(part, example.tools),
            counts.answers_cut > 0,
        )
        for part, row in zip(outside, columns.get("earlier", ()), strict=False)
    ]
    before = encoder.answered(example)
    assert before is not None  # it has a row
    lost = lost_end(encoder, example, own) if counts.answers_cut else ()
    cut = cuts(before.messages, turns, counts, decode(encoder.tokenizer, lost))
    return Sample(own, earlier, columns, counts, tuple(cut)), counts


def served_prompt(
    template: Template, tokenizer: "PreTrainedTokenizerBase", row: Row, asks_thinking: bool | None
) -> Sequence[int]:
    """The prompt that is served for a row's last answer, in the mode in which it is learned unless another one is asked for."""
    asking = template.asking(row.thinking if asks_thinking is None else asks_thinking)
    (prompt,) = asking.encode(tokenizer, [row.turns[:-1]], [row.tools] if row.tools else ())
    return list(prompt.input_ids)


def lost_end(encoder: Encoder, example: Example, own: Row) -> Sequence[int]:
    """The tokens at the end of the answer that its row has lost; none where only another answer of the record has lost any."""
    (whole,), _ = replace(encoder, max_target_length=MOST_TOKENS).encode([example])
    (start, end), (_, whole_end) = learned_ranges(own.labels)[-1], learned_ranges(whole["labels"])[-1]
    return list(whole["labels"][end - 1 : whole_end - 1]) if start < end else ()


def learned_ranges(labels: Sequence[int]) -> list[tuple[int, int]]:
    """The half-open ranges of labels that are learned, the stop tokens included."""
    ranges: list[tuple[int, int]] = []
    start = None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            ranges.append((start, index))
            start = None
    return ranges


def parts_of(input_ids: Sequence[int], labels: Sequence[int]) -> list[Part]:
    """The row as prompts, what is learned behind each, and its stop token.

    A stop token is learned in the place of the next turn's first token, which is shown behind it where it is another one.
    """
    parts, place = [], 0
    for start, end in learned_ranges(labels):
        if start > place:
            parts.append(Part("prompt", input_ids[place:start]))
        parts += [Part("learned", labels[start : end - 1]), Part("stop", labels[end - 1 : end])]
        place = end if input_ids[end - 1] == labels[end - 1] else end - 1
    if place < len(input_ids):
        parts.append(Part("prompt", input_ids[place:]))
    return parts


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of token ids, control tokens included."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # of one row
    return text


def cuts(before: Sequence[Message], after: Sequence[Message], counts: Counts, lost_answer: str) -> Iterator[str]:
    """What was cut from a record's turns to fit the lengths, a phrase each."""
    head = 1 if before[0].role == "system" else 0
    dropped = len(before) - len(after)
    if dropped > 0:
        first = before[head]
        yield (
            f"{dropped} old turn{'s' if dropped > 1 else ''} of the prompt (data.max_source_length), from "
            f"{first.role}: {start_of(first.content)}"
        )
    for old, new in zip([*before[:head], *before[head + max(dropped, 0) :]], after, strict=False):
        lost = old.content[len(new.content) :]
        if lost and old.role != "assistant":
            characters = "one character" if len(lost) == 1 else f"{len(lost)} characters"
            yield f"{characters} at the end of a {old.role} turn (data.max_source_length): {start_of(lost)}"
    if counts.answers_cut:
        text = f": {start_of(lost_answer)}" if lost_answer else ""
        yield f"the end of the answer (data.max_target_length){text}"
    if counts.tokens_cut:
        yield f"{counts.tokens_cut} tokens in all"


def start_of(text: str) -> str:
    """The text in quotation marks, of a long one its start."""
    return json.dumps(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…", ensure_ascii=False)
