"""Conversations to token ids and labels, within the lengths of the run, with a count of what was truncated.

The template is passed in: it alone defines how turns become tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.data.counts import Counts
from glmtuner.data.records import REASONING, Example, Message, without_reasoning
from glmtuner.errors import ConfigError
from glmtuner.templates.base import OWN, TEMPLATES, Encoded, Template, Tools
from glmtuner.templates.base import Message as Turn
from glmtuner.templates.encoding import Ids
from glmtuner.templates.tool_calls import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLong(Exception):
    """A prompt does not fit however short its texts are; `num_tokens` are those that it needs."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


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
    strips_reasoning: bool = False  # are thoughts left out? A template that renders them does so itself
    asks_thinking: bool | None = None  # the mode of the prompts that are answered; None: each as it was learned

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

        A row has `input_ids`, `labels` and `weights` of the whole conversation, `prompt_ids`, `prompt` and `answer` of its last
        turn, and the record's `weight`. Answers that the conversation's own row cannot teach, since the template writes their
        prompts otherwise, have rows of their own in `earlier` (`input_ids`, `labels`, `weight`). Records with nothing to learn, by their marks or since the
        template renders nothing of their answer, have no row and are counted.
        """
        examples, counts = self._with_something_to_learn(examples)
        if not examples:
            return [], counts
        conversations, encoded = self._encode_fitting(
            [example.messages for example in examples], counts, tools_of(examples)
        )
        examples, conversations, encoded = self._rendered(examples, conversations, encoded, counts)
        prompts = self._prompts(examples, conversations, encoded)
        rows = [
            {
                **self._row(conversation, counts),
                "prompt_ids": prompt,
                "prompt": prompt_text(self._prefixed(messages[:-1])),
                "answer": self.answer_text(messages[-1]),
                "weight": example.weight,
                **self.more_of(example),
            }
            for example, messages, conversation, prompt in zip(examples, conversations, encoded, prompts, strict=True)
        ]
        with_tools = [example for example in examples if example.needs_tools]
        counts.undescribed += sum(not example.tools for example in with_tools)
        counts.uncalled += sum(has_uncalled_result(example.messages) for example in with_tools)
        counts.texts_dropped += sum(self._drops_text(turn) for example in with_tools for turn in example.messages)
        for conversation in encoded:
            counts.reasoning_dropped += conversation.dropped_reasoning
            counts.thinking += conversation.thinking is True
            counts.not_thinking += conversation.thinking is False
        outside = [self._outside(*each) for each in zip(examples, conversations, encoded, strict=True)]
        if self.every_answer and (self.template.one_answer_a_row or any(outside)):
            self._add_earlier(rows, outside, counts, tools_of(examples))
        elif self.every_answer and self.template.rows_may_split:  # all rows have the same columns
            for row in rows:
                row["earlier"] = []
        taught = [
            row for row, conversation in zip(rows, encoded, strict=True) if conversation.learned(self.every_answer)
        ]
        counts.unlearned += len(rows) - len(taught)  # their learned answers were dropped to shorten the prompt
        return taught, counts

    def answer_text(self, answer: Message) -> str:
        """The readable text of an answer: its content, and its tool calls as the model learns them."""
        if not answer.tool_calls:
            return answer.content
        syntax = self.template.syntax(self.tokenizer)
        if syntax is None:
            return with_calls(answer.content, answer.tool_calls)
        return syntax.write(answer.content, answer.tool_calls).strip()

    def _drops_text(self, answer: Message) -> bool:
        """Whether the template leaves out the text before the calls of an answer, as Llama 3.1's and Mistral's do."""
        if not answer.tool_calls or not (text := answer.content.strip()):
            return False
        syntax = self.template.syntax(self.tokenizer)
        return syntax is not None and text not in syntax.write(text, answer.tool_calls[:1])

    def more_of(self, example: Example) -> dict[str, Any]:
        """Further columns of the example's row."""
        return {}

    def answered(self, example: Example) -> Example | None:
        """The example whose last turn is the answer that its row ends in; None if it has no row."""
        kept, _ = self._with_something_to_learn([example])
        return kept[0] if kept else None

    def conversations(self, example: Example) -> list[list[Message]]:
        """The turns of each row of an example, shortened to the lengths: those of its `earlier` rows, then those of its own."""
        if (answered := self.answered(example)) is None:
            return []
        turns, encoded = self._encode_fitting([answered.messages], Counts(), [answered.tools])
        examples, turns, encoded = self._rendered([answered], turns, encoded, Counts())
        if not examples:
            return []
        outside = self._outside(examples[0], turns[0], encoded[0]) if self.every_answer else []
        parts, rows = self._encode_fitting(outside, Counts(), [answered.tools] * len(outside))
        return [*(part for part, row in zip(parts, rows, strict=True) if not row.unrendered), turns[0]]

    def with_prefix(self, messages: Sequence[Message]) -> list[Turn]:
        """The turns with `source_prefix`, as the template gets them."""
        return list(self._prefixed(messages))

    def thinking_of(self, messages: Sequence[Message], tools: Tools) -> bool | None:
        """The mode of the prompt behind which the last of the turns is learned; None for a template without modes."""
        return self._encode([messages], [tools])[0].thinking

    def _rendered(
        self, examples: list[Example], conversations: list[list[Message]], encoded: list[Encoded], counts: Counts
    ) -> tuple[list[Example], list[list[Message]], list[Encoded]]:
        """Those whose last answer the template renders; a conversation that only teaches answers outside of its row ends there."""
        for index, (messages, conversation) in enumerate(zip(conversations, encoded, strict=True)):
            apart = [turn for turn in sorted(conversation.outside) if is_learned(messages[turn])]
            if apart and self.every_answer and not conversation.learned(True):
                shorter = messages[: apart[-1] + 1]
                conversations[index], encoded[index] = shorter, self._encode([shorter], [examples[index].tools])[0]
        kept = [index for index, conversation in enumerate(encoded) if not conversation.unrendered]
        counts.unrendered += len(encoded) - len(kept)
        counts.records -= len(encoded) - len(kept)
        return [examples[at] for at in kept], [conversations[at] for at in kept], [encoded[at] for at in kept]

    def _prompts(
        self, examples: Sequence[Example], conversations: Sequence[Sequence[Message]], encoded: Sequence[Encoded]
    ) -> Sequence[Ids]:
        """The prompts of the last answers: as they are learned, or in the mode that is asked for."""
        if self.asks_thinking is None:
            return self.template.prompts(self.tokenizer, [self._prefixed(turns) for turns in conversations], encoded)
        asking = replace(self, template=self.template.asking(self.asks_thinking), asks_thinking=None)
        return [row.input_ids for row in asking._encode([turns[:-1] for turns in conversations], tools_of(examples))]

    def _outside(self, example: Example, messages: list[Message], encoded: Encoded) -> list[list[Message]]:
        """The conversations that end in an earlier answer which is learned in a row of its own."""
        if self.template.one_answer_a_row:
            return [
                example.messages[:end] for end, message in enumerate(example.messages[:-1], 1) if is_learned(message)
            ]
        return [messages[: turn + 1] for turn in sorted(encoded.outside) if is_learned(messages[turn])]

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

    def _add_earlier(
        self,
        rows: list[dict[str, Any]],
        outside: Sequence[list[list[Message]]],
        counts: Counts,
        tools: Sequence[Tools],
    ) -> None:
        """Add the rows of its conversation's answers that are `outside` of it to each row."""
        owners = [index for index, parts in enumerate(outside) for _ in parts]
        parts = [part for parts in outside for part in parts]
        _, encoded = self._encode_fitting(parts, counts, [tools[index] for index in owners])
        for row in rows:
            row["earlier"] = []
        for index, conversation in zip(owners, encoded, strict=True):
            if not conversation.unrendered:
                row = self._row(conversation, counts, every_answer=False)
                del row["weights"]  # it teaches one answer
                rows[index]["earlier"].append({**row, "weight": (conversation.weights or (1.0,))[-1]})

    def _row(self, conversation: Encoded, counts: Counts, every_answer: bool | None = None) -> dict[str, Any]:
        """`input_ids` and `labels`, the last answer truncated to `max_target_length`, and `weights` of the labels, None if all are 1."""
        every_answer = self.every_answer if every_answer is None else every_answer
        if num_removed := conversation.cut_answer(self.max_target_length):
            counts.answers_cut += 1
            counts.tokens_cut += num_removed
        counts.tokens += len(conversation.input_ids)
        for start, end in conversation.learned(every_answer):
            counts.learned_tokens += end + 1 - start
        labels = conversation.labels(every_answer)
        return {"input_ids": conversation.input_ids, "labels": labels, "weights": conversation.label_weights()}

    def _encode_fitting(
        self, conversations: list[list[Message]], counts: Counts, tools: Sequence[Tools] = ()
    ) -> tuple[list[list[Message]], list[Encoded]]:
        """The conversations with prompts shortened to `max_source_length`, and their tokens."""
        encoded = self._encode(conversations, tools)
        conversations = list(conversations)
        needed = 0
        for index, conversation in enumerate(encoded):
            if conversation.source_length > self.max_source_length:
                described = tools[index] if tools else ()
                try:
                    shorter, num_dropped = self._shortened(conversations[index], described)
                except TooLong as error:  # the longest of all is told, so that one try is enough
                    needed = max(needed, error.num_tokens)
                    continue
                again = self._encode([shorter], [described])[0]
                counts.prompts_cut += 1
                counts.turns_dropped += num_dropped
                counts.tokens_cut += len(conversation.input_ids) - len(again.input_ids)
                conversations[index], encoded[index] = shorter, again
        if needed:
            what = f"the template {'with the descriptions of the tools' if any(tools) else 'alone'} needs"
            raise ConfigError(
                f"data.max_source_length={self.max_source_length}: {what} {needed} tokens; type at least "
                f"data.max_source_length={needed}"
            )
        return conversations, encoded

    def _prefixed(self, messages: Sequence[Message]) -> Sequence[Turn]:
        """The turns with `source_prefix`, where the template puts it, and without the thoughts that are left out."""
        if self._strips:
            messages = [without_reasoning(message) for message in messages]
        return self.template.prefixed(messages, self.source_prefix) if self.source_prefix else messages

    @property
    def _strips(self) -> bool:
        return self.strips_reasoning and not self.template.renders_reasoning

    def _encode(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools] = ()) -> list[Encoded]:
        template, rendered = self.template, self.template.renders_reasoning or self._strips
        if not rendered and any(turn.reasoning for turns in conversations for turn in turns):
            raise ConfigError(
                f"model.template={template.name}: it does not render the reasoning that answers of the data have "
                f"({', '.join(REASONING)}); write it into their content, type model.template=tokenizer if the tokenizer's "
                f"chat template renders it, or data.thinking=strip (or data.ignore_columns={','.join(REASONING)}) to learn the "
                "answers without it"
            )
        prefixed = [self._prefixed(messages) for messages in conversations]
        if not any(tools) and not any(
            turn.role == "tool" or turn.tool_calls for turns in conversations for turn in turns
        ):
            return self._without_empty(template.encode(self.tokenizer, prefixed), prefixed)
        renders_calls = template.renders_calls(self.tokenizer)
        if any(tools) and renders_calls and not template.renders_tools(self.tokenizer):
            raise ConfigError(
                f"model.template={template.name}: it renders tool calls, and no descriptions of tools, which the data has; type "
                "data.ignore_columns=tools to learn without the descriptions"
            )
        if not renders_calls:
            others = [name for name, other in TEMPLATES.items() if other.renders_calls(self.tokenizer)]
            elsewhere = f"model.template={' or '.join(others)} for a model of theirs" if template.name == OWN else (
                f"model.template={OWN} if the tokenizer's chat template renders them"
            )  # fmt: skip
            raise ConfigError(
                f"model.template={template.name}: it does not render the tools and tool calls that the data has; type "
                f"{elsewhere}, or data.ignore_columns=tools,tool_calls to learn the turns without them"
            )
        return self._without_empty(template.encode(self.tokenizer, prefixed, tools), prefixed)

    def _without_empty(self, encoded: list[Encoded], conversations: Sequence[Sequence[Turn]]) -> list[Encoded]:
        """The rows, with those marked as unrendered whose last answer was nothing but a thought that is left out."""
        for row, turns in zip(encoded, conversations, strict=True) if self._strips else ():
            last = turns[-1]
            row.unrendered |= last.role == "assistant" and last.content == "" and not getattr(last, "tool_calls", ())
        return encoded

    def _shortened(self, messages: list[Message], tools: Tools = ()) -> tuple[list[Message], int]:
        """The turns with a prompt that fits, and how many old rounds (a question and its answers) were dropped.

        The oldest rounds are dropped first; then the ends of the results of tools are cut, then that of the last question,
        and if that is not enough, the end of the system turn. What the template adds, its closing marker above all, is never
        cut, and neither are descriptions of tools and calls. Raises TooLong.
        """

        def length(turns: Sequence[Message]) -> int:
            return self._encode([turns], [tools] if tools else ())[0].source_length

        def fits(turns: Sequence[Message]) -> bool:
            return length(turns) <= self.max_source_length

        head = 1 if messages[0].role == "system" else 0
        rounds = [index for index, message in enumerate(messages[:-1]) if message.role == "user"]
        num_dropped = bisect_min(len(rounds) - 1, lambda count: fits(messages[:head] + messages[rounds[count] :]))
        turns = messages[:head] + messages[rounds[num_dropped] :]
        results = [index for index, message in enumerate(turns) if message.role == "tool"]
        for index in (*results, head, 0):
            if fits(turns):
                return turns, num_dropped
            cut = partial(without_end, turns, index)
            turns = cut(bisect_min(len(turns[index].content), partial(lambda cut, count: fits(cut(count)), cut)))
        if fits(turns):
            return turns, num_dropped
        raise TooLong(length(turns))


def tools_of(examples: Sequence[Example]) -> list[Tools]:
    """The tools of each example."""
    return [example.tools for example in examples]


def has_uncalled_result(messages: Sequence[Message]) -> bool:
    """Whether a result of a tool stands behind an answer that calls none."""
    return any(
        after.role == "tool" and not (before.tool_calls or before.role == "tool")
        for before, after in pairwise(messages)
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
    return "\n".join(
        f"{message.role}: {with_calls(message.content, getattr(message, 'tool_calls', ()))}" for message in messages
    )


def with_calls(text: str, calls: Sequence[ToolCall]) -> str:
    """The text, and a line for each call: get_weather({"city": "北京"})."""
    return "\n".join(
        [*([text] if text or not calls else []), *(f"{call.name}({call.arguments_json})" for call in calls)]
    )
