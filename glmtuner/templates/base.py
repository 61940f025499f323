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
from glmtuner.templates.tool_calls import Syntax
from glmtuner.templates.tool_calls import Tools as Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label of a position that is not learned; what torch's cross_entropy ignores by default
OWN = "tokenizer"  # the name of the tokenizer's own chat_template


class Message(Protocol):
    """One turn: role is system, user, assistant, or tool (the result of a call).

    It may also have `learned` (is this answer learned?), `weight` (how much), `reasoning` (the thought before it), `tool_calls`, and `call_id`, which
    of a result is the id of its call.
    """

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Piece(NamedTuple):
    """A control token (by name), a piece of prompt text, or the text of an answer; `stop` is the token that ends the answer.

    Of one answer in several pieces the stop is that of the last one.
    """

    text: str
    kind: str  # control, generated control (inside an answer), text, answer
    stop: str = ""  # "" for the template's


@cache
def control(token: str) -> Piece:
    """The piece of a control token; one object for each name, since every row has several."""
    return Piece(token, "control")


@dataclass(slots=True)
class Encoded:
    """Token ids of a conversation and the positions of its answers.

    An answer is the half-open range of its tokens; its stop token is learned at the position right after it: that of the
    next turn's first token, or one appended after the last answer. `stop` is the id of the last one, and `stops` those of all
    answers where they differ. `context` are the answers that are marked as not learned, by their numbers in `answers`;
    `outside` are the turns whose answers need a row of their own. `weights` are those of the answers, empty if all weigh 1.
    `dropped_reasoning` counts thoughts that the template left
    out; `thinking` is the mode of the last answer's prompt (None: the template has none). `unrendered`: the template renders
    nothing of the last answer.
    """

    input_ids: Ids
    answers: list[tuple[int, int]]
    stop: int
    context: frozenset[int] = frozenset()
    dropped_reasoning: int = 0
    stops: tuple[int, ...] = ()
    outside: frozenset[int] = frozenset()
    thinking: bool | None = None
    unrendered: bool = False
    weights: tuple[float, ...] = ()

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
        stop_at = {end: stop for (_, end), stop in zip(self.answers, self.stops, strict=False)}
        for start, end in self.learned(every_answer):
            labels[start:end] = self.input_ids[start:end]
            labels[end] = stop_at.get(end, self.stop)
        return labels

    def label_weights(self) -> list[float] | None:
        """The weight of each label, as many as `input_ids`; None if all answers weigh 1."""
        if not self.weights:
            return None
        weights = [1.0] * len(self.input_ids)
        for (start, end), weight in zip(self.answers, self.weights, strict=True):
            weights[start : end + 1] = [weight] * (end + 1 - start)
        return weights

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
    rows_may_split: ClassVar[bool] = False  # may an earlier answer need a row of its own?
    renders_reasoning: bool = False  # does it render the thought before an answer?
    calls_tokenizer: ClassVar[bool] = False  # does it call the tokenizer directly, so that threads cannot share one?

    def turns(self, messages: Sequence[Message], tools: Tools = ()) -> Iterable[Piece]:
        """The pieces of the turns, behind those that describe the tools; if the last turn is the user's, up to where the answer begins."""
        raise NotImplementedError

    def renders(self, message: Message) -> bool:
        """Whether a turn is rendered."""
        return True

    def pieces(self, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
        """The pieces of a conversation, the prefix included."""
        return [*map(control, self.prefix), *self.turns(messages, tools)]

    def renders_tools(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the template renders the descriptions of tools, and calls of them."""
        return False

    def renders_calls(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the template renders calls of tools and their results, if not the descriptions of the tools."""
        return self.renders_tools(tokenizer)

    def syntax(self, tokenizer: "PreTrainedTokenizerBase") -> Syntax | None:
        """The syntax in which the template writes tool calls; None if it writes none, or in a syntax that is not known."""
        return None

    def has_modes(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether prompts can ask for a thought, or for none."""
        return False

    def asking(self, thinking: bool | None) -> "Template":
        """The template whose prompts ask for a thought, or for none; the same where it has no such modes."""
        return self

    def always_thinking(self) -> "Template":
        """The template in which an answer without a thought is learned behind the thinking prompt; the same without modes."""
        return self

    def encode(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools] = (),
    ) -> list[Encoded]:
        """Each conversation's tokens; a conversation that ends in an answer gets the stop token after it.

        All texts go to the tokenizer in one batch, each distinct one once.
        """
        pieces_of = [
            self.pieces(messages, tools[index] if tools else ()) for index, messages in enumerate(conversations)
        ]
        kinds = ("control", "generated control")
        distinct = dict.fromkeys(chain.from_iterable(pieces_of))
        texts = list(dict.fromkeys(piece.text for piece in distinct if piece.kind not in kinds))
        ids_of = dict(zip(texts, encode_text(tokenizer, texts), strict=True))
        controls = [piece.text for piece in distinct if piece.kind in kinds]
        controls += [piece.stop for piece in distinct if piece.stop]
        id_of = {token: control_id(tokenizer, token, self.name) for token in dict.fromkeys((*controls, self.stop))}
        empty: Ids = next(iter(ids_of.values()), [])[:0]  # a list, or an array
        encoded = []
        for pieces, messages in zip(pieces_of, conversations, strict=True):
            input_ids = empty[:]
            answers: list[tuple[int, int]] = []
            stops: list[int] = []
            for text, kind, stop in pieces:
                start = len(input_ids)
                if kind in kinds:
                    input_ids.append(id_of[text])
                else:
                    input_ids += ids_of[text]
                if kind not in ("control", "text"):
                    if answers and answers[-1][1] == start:  # an answer in several pieces
                        start = answers.pop()[0]
                        stops.pop()
                    answers.append((start, len(input_ids)))
                    stops.append(id_of[stop or self.stop])
            last = stops[-1] if stops else id_of[self.stop]
            if answers and answers[-1][1] == len(input_ids):
                input_ids.append(last)
            turns = [message for message in messages if self.renders(message)]
            differing = tuple(stops) if len({*stops}) > 1 else ()
            context, weights = _context(turns, len(answers)), _weights(turns, len(answers))
            encoded.append(Encoded(input_ids, answers, last, context, stops=differing, weights=weights))
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


def answer_weights(answers: Iterable[Message]) -> tuple[float, ...]:
    """The weights of the answers; empty if all weigh 1."""
    weights = tuple(getattr(message, "weight", 1.0) for message in answers)
    return weights if any(weight != 1 for weight in weights) else ()


def _weights(messages: Sequence[Message], num_answers: int) -> tuple[float, ...]:
    """The weights of the last `num_answers` answers; empty if all weigh 1."""
    if all(getattr(message, "weight", 1.0) == 1 for message in messages):
        return ()
    turns = [message for message in messages if message.role == "assistant"]
    return answer_weights(turns[len(turns) - num_answers :])


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
