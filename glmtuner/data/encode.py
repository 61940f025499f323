"""Conversations to token ids and labels, within the lengths of the run, with a count of what was truncated.

The template is passed in: it alone defines how turns become tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.records import REASONING, Example, Message
from glmtuner.errors import ConfigError
from glmtuner.templates.base import Encoded, Template
from glmtuner.templates.base import Message as Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Counts:
    """What became of a dataset's records; tokens of prompts and answers together unless stated otherwise.

    If each answer is a row of its own, tokens and truncations are counted over all rows of a record.
    """

    records: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    prompts_cut: int = 0  # prompts that lost text or turns
    turns_dropped: int = 0  # the oldest question-answer pairs of those
    answers_cut: int = 0  # answers that lost their end
    tokens_cut: int = 0
    bad_records: int = 0
    undesirable: int = 0  # records left out because their answer is marked as a bad one
    unlearned: int = 0  # records left out because their marks leave no answer to learn
    reasoning_dropped: int = 0  # thoughts of earlier answers, which the chat template leaves out

    def __add__(self, other: "Counts") -> "Counts":
        left, right = asdict(self), asdict(other)
        return Counts(**{name: left[name] + right[name] for name in left})

    def summary(self) -> str:
        """The counts in one line; truncations only if there were any."""
        parts = [f"{self.records:,} records, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned"]
        if self.prompts_cut:
            dropped = f" ({self.turns_dropped:,} old turns dropped)" if self.turns_dropped else ""
            parts.append(f"{self.prompts_cut:,} prompts shortened{dropped}")
        if self.answers_cut:
            parts.append(f"{self.answers_cut:,} answers shortened")
        if self.tokens_cut:
            parts.append(f"{self.tokens_cut:,} tokens cut in all")
        if self.bad_records:
            parts.append(f"{self.bad_records:,} broken records skipped")
        if self.undesirable:
            parts.append(f"{self.undesirable:,} records with an answer marked false left out")
        if self.unlearned:
            parts.append(f"{self.unlearned:,} records without an answer to learn left out")
        if self.reasoning_dropped:
            parts.append(f"{self.reasoning_dropped:,} thoughts of earlier answers left out by the chat template")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes batches of examples with one template, tokenizer and set of lengths.

    Subclasses encode other kinds of records than single answers: `accepts` are the kinds that an encoder supports,
    `usage_hint` ends the error for any other kind, and `columns` are those that a batch is made of.
    """

    template: Template
    tokenizer: "PreTrainedTokenizerBase"
    max_source_length: int
    max_target_length: int
    every_answer: bool = True
    source_prefix: str | None = None

    accepts: ClassVar[tuple[str, ...]] = ("single answers", "feedback")
    usage_hint: ClassVar[str] = "stage=sft learns single answers; name a dataset of instructions or conversations"
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    batch_size: ClassVar[int] = 250  # examples encoded at a time
    learns_undesirable: ClassVar[bool] = False  # are answers that are marked as bad ones learned from, too?
    learns: ClassVar[bool] = True  # are tokens of the records learned? (False: only their prompts are read)

    def settings(self) -> dict[str, Any]:
        """Everything besides template and tokenizer that changes the rows."""
        names = [field.name for field in fields(self) if field.name not in ("template", "tokenizer")]
        return {"encoder": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """A row for each example, and the counts.

        A row has `input_ids` and `labels` of the whole conversation, and `prompt_ids`, `prompt` and `answer` of its last
        turn. If the template teaches one answer a row, `earlier` holds the rows (`input_ids`, `labels`) of the answers
        before. Records with nothing to learn, by their marks, have no row and are counted.
        """
        examples, counts = self._with_something_to_learn(examples)
        if not examples:
            return [], counts
        conversations, encoded = self._encode_fitting([example.messages for example in examples], counts)
        prompts = self.template.prompts(self.tokenizer, [self._prefixed(turns) for turns in conversations], encoded)
        rows = [
            {
                **self._row(conversation, counts),
                "prompt_ids": prompt,
                "prompt": prompt_text(self._prefixed(messages[:-1])),
                "answer": messages[-1].content,
            }
            for messages, conversation, prompt in zip(conversations, encoded, prompts, strict=True)
        ]
        if self.every_answer and self.template.one_answer_a_row:
            self._add_earlier(rows, examples, counts)
        taught = [
            row for row, conversation in zip(rows, encoded, strict=True) if conversation.learned(self.every_answer)
        ]
        counts.unlearned += len(rows) - len(taught)  # their learned answers were dropped to shorten the prompt
        return taught, counts

    def _with_something_to_learn(self, examples: Sequence[Example]) -> tuple[list[Example], Counts]:
        """The examples with an answer that is learned, and counts of all; an undesirable answer is none."""
        counts, kept = Counts(), []
        for example in examples:
            if example.desirable is False and not self.learns_undesirable:
                counts.undesirable += 1
                continue
            if is_learned(example.messages[-1]):  # as nearly always
                kept.append(example)
                continue
            learned = [end for end, message in enumerate(example.messages, 1) if is_learned(message)]
            if not learned or not self.every_answer:
                counts.unlearned += 1
            elif self.template.one_answer_a_row:  # a row teaches its last answer
                kept.append(replace(example, messages=example.messages[: learned[-1]]))
            else:
                kept.append(example)
        counts.records = len(kept)
        return kept, counts

    def _add_earlier(self, rows: list[dict[str, Any]], examples: Sequence[Example], counts: Counts) -> None:
        """Add the rows of its conversation's earlier answers to each row."""
        owners, parts = [], []
        for index, example in enumerate(examples):
            rows[index]["earlier"] = []
            for end, message in enumerate(example.messages[:-1], 1):
                if is_learned(message):
                    owners.append(index)
                    parts.append(example.messages[:end])
        _, encoded = self._encode_fitting(parts, counts)
        for index, conversation in zip(owners, encoded, strict=True):
            rows[index]["earlier"].append(self._row(conversation, counts))

    def _row(self, conversation: Encoded, counts: Counts) -> dict[str, Any]:
        """`input_ids` and `labels`, the last answer truncated to `max_target_length`."""
        if num_removed := conversation.cut_answer(self.max_target_length):
            counts.answers_cut += 1
            counts.tokens_cut += num_removed
        counts.reasoning_dropped += conversation.dropped_reasoning
        counts.tokens += len(conversation.input_ids)
        for start, end in conversation.learned(self.every_answer):
            counts.learned_tokens += end + 1 - start
        return {"input_ids": conversation.input_ids, "labels": conversation.labels(self.every_answer)}

    def _encode_fitting(
        self, conversations: list[list[Message]], counts: Counts
    ) -> tuple[list[list[Message]], list[Encoded]]:
        """The conversations with prompts shortened to `max_source_length`, and their tokens."""
        encoded = self._encode(conversations)
        conversations = list(conversations)
        for index, conversation in enumerate(encoded):
            if conversation.source_length > self.max_source_length:
                shorter, num_dropped = self._shortened(conversations[index])
                again = self._encode([shorter])[0]
                counts.prompts_cut += 1
                counts.turns_dropped += num_dropped
                counts.tokens_cut += len(conversation.input_ids) - len(again.input_ids)
                conversations[index], encoded[index] = shorter, again
        return conversations, encoded

    def _prefixed(self, messages: Sequence[Message]) -> Sequence[Turn]:
        """The turns with `source_prefix`, where the template puts it."""
        return self.template.prefixed(messages, self.source_prefix) if self.source_prefix else messages

    def _source_length(self, messages: Sequence[Message]) -> int:
        return self._encode([messages])[0].source_length

    def _encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        if self.template.reasoning_key is None and any(turn.reasoning for turns in conversations for turn in turns):
            raise ConfigError(
                f"model.template={self.template.name}: it does not render the reasoning that answers of the data have "
                f"({', '.join(REASONING)}); write it into their content, type model.template=tokenizer if the tokenizer's "
                f"chat template renders it, or data.ignore_columns={','.join(REASONING)} to learn the answers without it"
            )
        return self.template.encode(self.tokenizer, [self._prefixed(messages) for messages in conversations])

    def _fits(self, messages: Sequence[Message]) -> bool:
        return self._source_length(messages) <= self.max_source_length

    def _fits_without_end(self, turns: list[Message], index: int, count: int) -> bool:
        return self._fits(without_end(turns, index, count))

    def _shortened(self, messages: list[Message]) -> tuple[list[Message], int]:
        """The turns with a prompt that fits, and how many old question-answer pairs were dropped.

        The oldest pairs are dropped first; then the end of the last question is cut, and if that is not enough, the end of
        the system turn. What the template adds, its closing marker above all, is never cut.
        """
        head = 1 if messages[0].role == "system" else 0
        num_pairs = (len(messages) - head - 2) // 2
        num_dropped = bisect_min(num_pairs, lambda count: self._fits(messages[:head] + messages[head + 2 * count :]))
        turns = messages[:head] + messages[head + 2 * num_dropped :]
        for index in (head, 0):
            if self._fits(turns):
                return turns, num_dropped
            num_cut = bisect_min(len(turns[index].content), partial(self._fits_without_end, turns, index))
            turns = without_end(turns, index, num_cut)
        if self._fits(turns):
            return turns, num_dropped
        needed = self._source_length(turns)
        raise ConfigError(
            f"data.max_source_length={self.max_source_length}: the template alone needs {needed} tokens; type at least "
            f"data.max_source_length={needed}"
        )


def is_learned(message: Message) -> bool:
    """Whether a turn is an answer that is learned."""
    return message.role == "assistant" and message.learned


def without_end(turns: list[Message], index: int, count: int) -> list[Message]:
    """The turns without the last `count` characters of one of them."""
    text = turns[index].content
    return [*turns[:index], turns[index]._replace(content=text[: len(text) - count]), *turns[index + 1 :]]


def bisect_min(limit: int, holds: Callable[[int], bool]) -> int:
    """The smallest count in [0, limit] for which the monotonic predicate `holds`; `limit` if there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def prompt_text(messages: Sequence[Turn]) -> str:
    """The turns of a prompt as readable text."""
    if messages[0].role == "prefix":
        return messages[0].content + prompt_text(messages[1:])
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)
