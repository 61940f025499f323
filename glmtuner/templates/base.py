"""Chat templates: how turns become tokens, the same for training, prediction and chat.

A template of ours is a list of pieces: control tokens, looked up by name, and text, which never becomes a control token
whatever a user writes in it. A model for which there is no template here keeps its tokenizer's own (jinja) template.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from glmtuner.errors import ConfigError
from glmtuner.templates.encoding import Ids, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label of a position that is not learned; what torch's cross_entropy ignores by default
OWN = "tokenizer"  # the name of the tokenizer's own chat_template


class Message(Protocol):
    """One turn: role is system, user or assistant, or observation (the result of a tool call).

    It may also have `learned` (is this answer learned?) and `reasoning` (the thought before it).
    """

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Piece(NamedTuple):
    """A control token (by name), a piece of prompt text, or the text of an answer."""

    text: str
    kind: str  # control, text, answer


@cache
def control(token: str) -> Piece:
    """The piece of a control token; one object for each name, since every row has several."""
    return Piece(token, "control")


@dataclass(slots=True)
class Encoded:
    """Token ids of a conversation and the positions of its answers.

    An answer is the half-open range of its tokens; its stop token is learned at the position right after it: that of the
    next turn's first token, or one appended after the last answer. `stop` is that token's id. `context` are the answers that
    are marked as not learned, by their numbers in `answers`; `dropped_reasoning` counts thoughts that the template left out.
    """

    input_ids: Ids
    answers: list[tuple[int, int]]
    stop: int
    context: frozenset[int] = frozenset()
    dropped_reasoning: int = 0

    def learned(self, every_answer: bool) -> list[tuple[int, int]]:
        """The ranges of the answers that are learned."""
        first = 0 if every_answer else max(len(self.answers) - 1, 0)
        if not self.context:
            return self.answers[first:]
        return [self.answers[number] for number in range(first, len(self.answers)) if number not in self.context]

    def labels(self, every_answer: bool) -> Ids:
        """Labels as long as `input_ids`, not shifted: the token to be predicted at each position, IGNORE_INDEX on prompts."""
        length = len(self.input_ids)
        is_array = isinstance(self.input_ids, array)
        labels: Ids = array("i", [IGNORE_INDEX]) * length if is_array else [IGNORE_INDEX] * length
        for start, end in self.learned(every_answer):
            labels[start:end] = self.input_ids[start:end]
            labels[end] = self.stop
        return labels

    def cut_answer(self, max_tokens: int) -> int:
        """Truncate the last answer to `max_tokens`, its stop token included; returns how many tokens were removed."""
        start, end = self.answers[-1]
        num_removed = max(end + 1 - start - max_tokens, 0)
        if num_removed:
            self.answers[-1] = (start, end - num_removed)
            self.input_ids = self.input_ids[: end - num_removed]
            self.input_ids.append(self.stop)
        return num_removed

    @property
    def source_length(self) -> int:
        """The number of tokens before the last answer."""
        return self.answers[-1][0] if self.answers else len(self.input_ids)


class Template:
    """A template as pieces; subclasses define how turns follow each other.

    `one_answer_a_row`: a row can teach its last answer only, so a conversation of n answers becomes n training rows.
    """

    name: str
    stop: str  # the control token after an answer
    prefix: tuple[str, ...] = ()  # control tokens before everything
    answer_prefix: tuple[str, ...] = ()  # control tokens between the prompt and the answer
    one_answer_a_row: ClassVar[bool] = False
    reasoning_key: str | None = (
        None  # the key of a turn under which the template renders a thought; None if it does not
    )
    calls_tokenizer: ClassVar[bool] = False  # does it call the tokenizer directly, so that threads cannot share one?

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        """The pieces of the turns; if the last turn is the user's, up to where the answer begins."""
        raise NotImplementedError

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The pieces of a conversation, the prefix included."""
        return [*map(control, self.prefix), *self.turns(messages)]

    def encode(self, tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Each conversation's tokens; a conversation that ends in an answer gets the stop token after it.

        All texts go to the tokenizer in one batch, each distinct one once.
        """
        pieces_of = [self.pieces(messages) for messages in conversations]
        distinct = dict.fromkeys(chain.from_iterable(pieces_of))
        texts = list(dict.fromkeys(piece.text for piece in distinct if piece.kind != "control"))
        ids_of = dict(zip(texts, encode_text(tokenizer, texts), strict=True))
        controls = [piece.text for piece in distinct if piece.kind == "control"]
        id_of = {token: control_id(tokenizer, token, self.name) for token in (*controls, self.stop)}
        stop = id_of[self.stop]
        empty: Ids = next(iter(ids_of.values()), [])[:0]  # a list, or an array
        encoded = []
        for pieces, messages in zip(pieces_of, conversations, strict=True):
            input_ids = empty[:]
            answers: list[tuple[int, int]] = []
            for piece in pieces:
                if piece.kind == "control":
                    input_ids.append(id_of[piece.text])
                    continue
                start = len(input_ids)
                input_ids += ids_of[piece.text]
                if piece.kind == "answer":
                    if answers and answers[-1][1] == start:  # an answer in two pieces
                        start = answers.pop()[0]
                    answers.append((start, len(input_ids)))
            if answers and answers[-1][1] == len(input_ids):
                input_ids.append(stop)
            encoded.append(Encoded(input_ids, answers, stop, _context(messages, len(answers))))
        return encoded

    def prefixed(self, messages: Sequence[Message], prefix: str) -> list[Message]:
        """The turns with `data.source_prefix` before the first question."""
        turns = list(messages)
        first = next(index for index, message in enumerate(turns) if message.role == "user")
        turns[first] = Turn("user", prefix + turns[first].content)
        return turns

    def jinja(self) -> str | None:
        """The same template in jinja, for other programs; None where jinja cannot produce these tokens."""
        return None

    def prompts(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        conversations: Sequence[Sequence[Message]],
        encoded: Sequence[Encoded],
    ) -> Sequence[Ids]:
        """The tokens before the last answer of each conversation, of which `encoded` are the tokens."""
        return [conversation.input_ids[: conversation.source_length] for conversation in encoded]

    def stop_ids(self, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
        """The ids that end an answer."""
        return {control_id(tokenizer, self.stop, self.name)}

    def documents(
        self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens with which every row of plain text begins, and each text's tokens followed by the end-of-text token.

        If the template has no tokens to begin with, a text begins as the tokenizer itself begins one.
        """
        start = [control_id(tokenizer, token, self.name) for token in (*self.prefix, *self.answer_prefix)]
        begin, end = tokenizer.bos_token_id, control_id(tokenizer, "eos", self.name)
        begins = [] if start or tokenizer("a").input_ids[0] != begin else [begin]
        return start, [[*begins, *ids, end] for ids in encode_text(tokenizer, texts)]

    def describe(self) -> dict[str, Any]:
        """The template as provenance.json stores it and the key of the cache is made of."""
        pieces = self.pieces([Turn("system", "{system}"), Turn("user", "{user}"), Turn("assistant", "{assistant}")])
        return {
            "name": self.name,
            "example": "".join(piece.text for piece in pieces),
            "tokenized_apart": [piece.text for piece in pieces if piece.kind != "control"],
            "learned": [piece.text for piece in pieces if piece.kind == "answer"],
            "one_answer_a_row": self.one_answer_a_row,
            "stop": self.stop,
        }


@dataclass(frozen=True)
class Turn:
    """A turn that stands in no record: of an example, or with a prefix."""

    role: str
    content: str


def context_answers(answers: Iterable[Message]) -> frozenset[int]:
    """The numbers of the answers that are marked as not learned."""
    return frozenset(number for number, message in enumerate(answers) if not getattr(message, "learned", True))


def _context(messages: Sequence[Message], num_answers: int) -> frozenset[int]:
    """The numbers of those of the last `num_answers` answers that are not learned; earlier ones stand in the prompt."""
    for message in messages:
        if message.role == "assistant" and not getattr(message, "learned", True):
            break
    else:
        return frozenset()
    turns = [message for message in messages if message.role == "assistant"]
    return context_answers(turns[len(turns) - num_answers :])


TEMPLATES: dict[str, Template] = {}  # ours, by name; filled by glm.py


def control_id(tokenizer: "PreTrainedTokenizerBase", token: str, template: str) -> int:
    """The id of a control token; `eos` is the tokenizer's own. Raises ConfigError if the tokenizer does not have it."""
    if token == "eos":
        eos: int | None = tokenizer.eos_token_id
        if eos is None:
            raise ConfigError(f"model.template={template}: the tokenizer has no end-of-sequence token")
        return eos
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ConfigError(
            f"model.template={template}: the tokenizer has no token {token!r}, so this template belongs to another model; "
            f"legal: {', '.join([*TEMPLATES, OWN])}"
        )
    assert isinstance(token_id, int)  # of one token
    return token_id
