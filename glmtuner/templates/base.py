"""Chat templates: how turns become tokens, the same for training, prediction and chat.

A template of ours is a list of pieces: control tokens, looked up by name, and text, which never becomes a control token
whatever a user writes in it. A model that no template here knows keeps its tokenizer's own (jinja) template.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from glmtuner.errors import ConfigError
from glmtuner.templates.encoding import Ids, encode_text

IGNORE_INDEX = -100
OWN = "tokenizer"  # the tokenizer's chat_template


class Message(Protocol):
    """One turn: role is system, user or assistant, or observation (what a tool answered)."""

    role: str
    content: str


class Piece(NamedTuple):
    """A control token (by name), a piece of prompt text, or the text of an answer."""

    text: str
    kind: str  # control, text, answer


@dataclass(slots=True)
class Encoded:
    """Token ids of a conversation and the places of its answers.

    An answer is the half-open range of its tokens; its stop token is learned right behind it: in the place of the next
    turn's first token, or appended after the last answer. `stop` is that token's id.
    """

    input_ids: Ids
    answers: list[tuple[int, int]]
    stop: int

    def learned(self, every_answer: bool) -> list[tuple[int, int]]:
        """The answers that are learned."""
        return self.answers if every_answer else self.answers[-1:]

    def labels(self, every_answer: bool) -> Ids:
        """Labels as long as `input_ids`: what each position is to be predicted as, IGNORE_INDEX on prompts."""
        ignored = self.input_ids[:0]  # a list, or an array
        ignored.append(IGNORE_INDEX)
        labels = ignored * len(self.input_ids)
        for start, end in self.learned(every_answer):
            labels[start:end] = self.input_ids[start:end]
            labels[end] = self.stop
        return labels

    def cut_answer(self, most: int) -> int:
        """Shorten the last answer to `most` tokens, its stop token included; returns how many tokens that cost."""
        start, end = self.answers[-1]
        cost = max(end + 1 - start - most, 0)
        if cost:
            self.answers[-1] = (start, end - cost)
            self.input_ids = self.input_ids[: end - cost]
            self.input_ids.append(self.stop)
        return cost

    @property
    def source_length(self) -> int:
        """Tokens before the last answer."""
        return self.answers[-1][0] if self.answers else len(self.input_ids)


class Template:
    """A template as pieces; subclasses say how turns follow each other.

    `one_answer_a_row`: a row can teach its last answer alone, so a conversation of n answers is n rows to learn from.
    """

    name: str
    stop: str  # the control token behind an answer
    prefix: tuple[str, ...] = ()  # control tokens before everything
    one_answer_a_row: ClassVar[bool] = False
    asks_tokenizer: ClassVar[bool] = False  # does it call the tokenizer itself, which then is one thread's alone?

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        """The pieces of the turns; when the last turn is the user's, up to where the answer begins."""
        raise NotImplementedError

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        return [*(Piece(token, "control") for token in self.prefix), *self.turns(messages)]

    def encode(self, tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Each conversation's tokens; those that end in an answer get the stop token behind it.

        All texts go to the tokenizer in one batch, each distinct one once.
        """
        cut = [self.pieces(messages) for messages in conversations]
        texts = list(dict.fromkeys(piece.text for pieces in cut for piece in pieces if piece.kind != "control"))
        ids_of = dict(zip(texts, encode_text(tokenizer, texts), strict=True))
        controls = dict.fromkeys(piece.text for pieces in cut for piece in pieces if piece.kind == "control")
        id_of = {token: control_id(tokenizer, token, self.name) for token in (*controls, self.stop)}
        stop = id_of[self.stop]
        nothing = next(iter(ids_of.values()), [])[:0]
        encoded = []
        for pieces in cut:
            input_ids = nothing[:]
            answers = []
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
            encoded.append(Encoded(input_ids, answers, stop))
        return encoded

    def jinja(self) -> str | None:
        """The same for tools that know jinja templates only; None where one cannot give these tokens."""
        return None

    def prompts(
        self, tokenizer: Any, conversations: Sequence[Sequence[Message]], encoded: Sequence[Encoded]
    ) -> list[Ids]:
        """What stands before the last answer of each conversation, of which `encoded` are the tokens."""
        return [found.input_ids[: found.source_length] for found in encoded]

    def stop_ids(self, tokenizer: Any) -> set[int]:
        return {control_id(tokenizer, self.stop, self.name)}

    def documents(self, tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """What every row of plain text begins with, and each text's tokens with the tokenizer's end of text behind them.

        Where the template has no tokens to begin with, a text begins as the tokenizer itself begins one.
        """
        start = [control_id(tokenizer, token, self.name) for token in (*self.prefix, *getattr(self, "behind", ()))]
        begin, end = tokenizer.bos_token_id, control_id(tokenizer, "eos", self.name)
        begins = [] if start or tokenizer("a").input_ids[0] != begin else [begin]
        return start, [[*begins, *ids, end] for ids in encode_text(tokenizer, texts)]

    def describe(self) -> dict[str, Any]:
        """What provenance.json keeps of the template, and the cache's key is made of."""
        pieces = self.pieces([_Turn("system", "{system}"), _Turn("user", "{user}"), _Turn("assistant", "{assistant}")])
        return {
            "name": self.name,
            "example": "".join(piece.text for piece in pieces),
            "tokenized_apart": [piece.text for piece in pieces if piece.kind != "control"],
            "learned": [piece.text for piece in pieces if piece.kind == "answer"],
            "one_answer_a_row": self.one_answer_a_row,
            "stop": self.stop,
        }


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str


TEMPLATES: dict[str, Template] = {}  # ours, by name; glm.py fills it


def control_id(tokenizer: Any, token: str, template: str) -> int:
    """The id of a control token; `eos` is the tokenizer's own. Raises ConfigError where the tokenizer has none."""
    if token == "eos":
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.template={template}: the tokenizer has no end-of-sequence token")
        return tokenizer.eos_token_id
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ConfigError(
            f"model.template={template}: the tokenizer has no token {token!r}, so this template belongs to another model; "
            f"legal: {', '.join([*TEMPLATES, OWN])}"
        )
    return found
