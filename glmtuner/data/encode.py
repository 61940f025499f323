"""Conversations -> token ids and labels, within the lengths of the run, with a count of what was cut.

The template comes in as an argument: it alone knows how turns become tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError


@dataclass(kw_only=True)
class Counts:
    """What became of a dataset's records; tokens of prompts and answers together unless said otherwise.

    Where each answer is a row of its own, tokens and cuts are counted over all of a record's rows.
    """

    records: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    prompts_cut: int = 0  # prompts that lost text or turns
    turns_dropped: int = 0  # the oldest question-answer pairs of those
    answers_cut: int = 0  # answers that lost their end
    tokens_cut: int = 0
    bad_records: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    def told(self) -> str:
        """The counts in words; cuts only when there were some."""
        words = [f"{self.records:,} records, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned"]
        if self.prompts_cut:
            dropped = f" ({self.turns_dropped:,} old turns dropped)" if self.turns_dropped else ""
            words.append(f"{self.prompts_cut:,} prompts shortened{dropped}")
        if self.answers_cut:
            words.append(f"{self.answers_cut:,} answers shortened")
        if self.tokens_cut:
            words.append(f"{self.tokens_cut:,} tokens cut in all")
        if self.bad_records:
            words.append(f"{self.bad_records:,} broken records skipped")
        return "; ".join(words)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes batches of examples with one template, tokenizer and set of lengths.

    Subclasses encode other kinds of records than single answers; `takes` are those an encoder can use, `wanted` tells of
    them where others come, and `columns` are what a batch is made of.
    """

    template: Any
    tokenizer: Any
    max_source_length: int
    max_target_length: int
    every_answer: bool = True
    source_prefix: str | None = None

    accepts: ClassVar[tuple[str, ...]] = ("single answers", "feedback")
    usage_hint: ClassVar[str] = "stage=sft learns single answers; name a dataset of instructions or conversations"
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    batch: ClassVar[int] = 250  # examples encoded at a time
    learns: ClassVar[bool] = True  # are tokens of the records learned? (their prompts alone are not)

    def settings(self) -> dict[str, Any]:
        """What changes the rows besides template and tokenizer."""
        names = [declared.name for declared in fields(self) if declared.name not in ("template", "tokenizer")]
        return {"encoder": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def encode(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], Counts]:
        """One row an example: `input_ids` and `labels` of the whole, `prompt_ids`, `prompt` and `answer` of the last turn.

        Where the template can teach one answer a row, `earlier` holds the rows (`input_ids`, `labels`) of the answers before.
        """
        counts = Counts(records=len(examples))
        conversations, encoded = self._fitted([example.messages for example in examples], counts)
        prompts = self.template.prompts(self.tokenizer, [self._prefixed(turns) for turns in conversations], encoded)
        rows = [
            {
                **self._learned(found, counts),
                "prompt_ids": prompt,
                "prompt": shown(self._prefixed(messages[:-1])),
                "answer": messages[-1].content,
            }
            for messages, found, prompt in zip(conversations, encoded, prompts, strict=True)
        ]
        if self.every_answer and self.template.one_answer_a_row:
            self._add_earlier(rows, examples, counts)
        return rows, counts

    def _add_earlier(self, rows: list[dict[str, Any]], examples: Sequence[Example], counts: Counts) -> None:
        """Give each row the rows of its conversation's earlier answers."""
        owners, parts = [], []
        for place, example in enumerate(examples):
            rows[place]["earlier"] = []
            for end, message in enumerate(example.messages[:-1], 1):
                if message.role == "assistant":
                    owners.append(place)
                    parts.append(example.messages[:end])
        _, encoded = self._fitted(parts, counts)
        for place, found in zip(owners, encoded, strict=True):
            rows[place]["earlier"].append(self._learned(found, counts))

    def _learned(self, found: Any, counts: Counts) -> dict[str, Any]:
        """`input_ids` and `labels`, the last answer cut to its length."""
        cut = found.cut_answer(self.max_target_length)
        counts.answers_cut += cut > 0
        counts.tokens_cut += cut
        labels = found.labels(self.every_answer)
        counts.tokens += len(found.input_ids)
        counts.learned_tokens += sum(end + 1 - start for start, end in found.learned(self.every_answer))
        return {"input_ids": found.input_ids, "labels": labels}

    def _fitted(self, conversations: list[list[Message]], counts: Counts) -> tuple[list[list[Message]], list[Any]]:
        """The conversations with prompts no longer than they may be, and their tokens."""
        encoded = self._encoded(conversations)
        conversations = list(conversations)
        for place, found in enumerate(encoded):
            if found.source_length > self.max_source_length:
                shorter, dropped = self._shortened(conversations[place])
                again = self._encoded([shorter])[0]
                counts.prompts_cut += 1
                counts.turns_dropped += dropped
                counts.tokens_cut += len(found.input_ids) - len(again.input_ids)
                conversations[place], encoded[place] = shorter, again
        return conversations, encoded

    def _prefixed(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The turns with `source_prefix` before the source, that is, before the first question."""
        if not self.source_prefix:
            return messages
        turns = list(messages)
        first = next(place for place, message in enumerate(turns) if message.role == "user")
        turns[first] = Message("user", self.source_prefix + turns[first].content)
        return turns

    def _source_length(self, messages: Sequence[Message]) -> int:
        return self._encoded([messages])[0].source_length

    def _encoded(self, conversations: Sequence[Sequence[Message]]) -> list[Any]:
        return self.template.encode(self.tokenizer, [self._prefixed(messages) for messages in conversations])

    def _fits(self, messages: Sequence[Message]) -> bool:
        return self._source_length(messages) <= self.max_source_length

    def _shortened(self, messages: list[Message]) -> tuple[list[Message], int]:
        """The turns with a prompt that fits, and how many old question-answer pairs that cost.

        The oldest pairs go first; then the end of the last question is cut, and if that is not enough the end of the
        system turn. What the template writes, its closing marker above all, is never cut.
        """
        head = 1 if messages[0].role == "system" else 0
        pairs = (len(messages) - head - 2) // 2
        dropped = bisect_min(pairs, lambda count: self._fits(messages[:head] + messages[head + 2 * count :]))
        turns = messages[:head] + messages[head + 2 * dropped :]
        for place in (head, 0):
            if self._fits(turns):
                return turns, dropped
            length = len(turns[place].content)
            cut = bisect_min(
                length, lambda count, turns=turns, place=place: self._fits(strip_end_token(turns, place, count))
            )
            turns = strip_end_token(turns, place, cut)
        if self._fits(turns):
            return turns, dropped
        raise ConfigError(
            f"data.max_source_length={self.max_source_length}: the template alone needs {self._source_length(turns)} tokens; "
            "type a larger data.max_source_length"
        )


def strip_end_token(turns: list[Message], place: int, count: int) -> list[Message]:
    """The turns with the last `count` characters of one of them left out."""
    text = turns[place].content
    return [*turns[:place], Message(turns[place].role, text[: len(text) - count]), *turns[place + 1 :]]


def bisect_min(most: int, holds: Any) -> int:
    """The smallest count in [0, most] for which `holds`, which stays true once it is; `most` when none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def shown(messages: Sequence[Message]) -> str:
    """The turns of a prompt as people read them."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)
