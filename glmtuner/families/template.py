"""Chat templates: how turns become tokens, the same for training, prediction and chat.

A template of ours is a list of pieces: control tokens, looked up by name, and text, which never becomes a control token
whatever a user writes in it. A model that no template here knows keeps its tokenizer's own (jinja) template.
"""

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from glmtuner.bpe import encodes_by_backend, engine_of
from glmtuner.errors import ConfigError, UnknownName

IGNORE_INDEX = -100
OWN = "tokenizer"  # the tokenizer's chat_template


Ids = list[int] | array  # arrays of 32-bit numbers where an Engine encodes


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


@dataclass(frozen=True)
class RoleTokens(Template):
    """`<|user|>` and its like before each turn (ChatGLM3, GLM-4).

    `apart`: ChatGLM3 tokenizes the line break behind a role apart from the text, and writes it itself when it answers.
    """

    name: str
    stop: str
    prefix: tuple[str, ...]
    apart: bool = False

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        for message in messages:
            yield Piece(f"<|{message.role}|>", "control")
            answers = message.role == "assistant"
            if answers or self.apart:
                yield Piece("\n", "answer" if answers and self.apart else "text")
                yield Piece(message.content, "answer" if answers else "text")
            else:
                yield Piece(f"\n{message.content}", "text")
        if messages[-1].role != "assistant":
            yield Piece("<|assistant|>", "control")
            if not self.apart:
                yield Piece("\n", "text")

    def jinja(self) -> str:
        # ChatGLM3's text is tokenized apart from the line break, which is to say behind a space
        text, asks = (" ", "") if self.apart else ("", "\\n")
        return (
            "[gMASK]<sop>{% for message in messages %}"
            f"{{{{ '<|' ~ message['role'] ~ '|>\\n{text}' ~ message['content'] }}}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>{asks}' }}}}{{% endif %}}"
        )


@dataclass(frozen=True)
class Rounds(Template):
    """Numbered rounds of question and answer, as plain text (ChatGLM2, and ChatGLM-6B as CET trains it).

    The prompt, earlier answers and all, is one text, tokenized as one: so it is when these models chat. Only the last
    answer is a text of its own, and only it can be learned; in ChatGLM-6B every earlier one is also seen in both directions.
    """

    name: str
    stop: str
    prefix: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()  # control tokens between the prompt and the answer
    one_answer_a_row: ClassVar[bool] = True

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        answered = messages[-1].role == "assistant"
        text, number = "", 0
        for message in messages[:-1] if answered else messages:
            if message.role == "user":
                number += 1
                text += f"[Round {number}]\n\n问：{message.content}\n\n答："
            else:
                text += f"{message.content}\n\n"
        yield Piece(text, "text")
        yield from (Piece(token, "control") for token in self.behind)
        if answered:
            yield Piece(messages[-1].content, "answer")

    def jinja(self) -> str | None:
        if self.behind:
            return None  # ChatGLM-6B's tokenizer reads no [gMASK] in text
        return (
            "[gMASK]<sop>{% set rounds = namespace(count=0) %}{% for message in messages %}"
            "{% if message['role'] == 'user' %}{% set rounds.count = rounds.count + 1 %}"
            "{{ '[Round ' ~ rounds.count ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}"
            "{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}{% endfor %}"
        )


@dataclass(frozen=True)
class Plain(Template):
    """Words instead of control tokens, for base models that have no chat template."""

    name: str = "plain"
    asks_tokenizer: ClassVar[bool] = True  # how it begins a document
    stop: str = "eos"  # whatever the tokenizer calls it
    prefix: tuple[str, ...] = ()
    words: dict[str, str] = field(
        default_factory=lambda: {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}
    )

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        text = ""
        for message in messages:
            text += self.words[message.role]
            if message.role == "assistant":
                yield Piece(text, "text")
                yield Piece(f" {message.content}", "answer")
                text = "\n\n"
            else:
                text += f"{message.content}\n\n"
        if messages[-1].role != "assistant":
            yield Piece(text + self.words["assistant"], "text")


@dataclass(frozen=True)
class TokenizersOwn(Template):
    """The tokenizer's jinja template, encoded as transformers does, except that user text never becomes a control token."""

    source: str
    asks_tokenizer: ClassVar[bool] = True
    name: str = OWN
    stop: str = "eos"
    prefix: tuple[str, ...] = ()

    def encode(self, tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        rendered = [self._render(tokenizer, messages) for messages in conversations]
        tokens = tokenizer(
            [text for text, _, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        encoded = []
        for (text, spans, guarded), ids, offsets in zip(rendered, tokens.input_ids, tokens.offset_mapping, strict=True):
            if guarded:
                ids, offsets = _encode_guarded(tokenizer, text, guarded)
            answers, stop = [], tokenizer.eos_token_id
            for start, end in spans:
                first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
                while first < last and offsets[first][1] == offsets[first][0]:  # a token of no text
                    first += 1
                while first < last and (offsets[last - 1][1] > end or offsets[last - 1][1] == offsets[last - 1][0]):
                    last -= 1
                if first == last:
                    continue
                ends = next((place for place in range(last, len(ids)) if ids[place] in special), None)
                if ends is not None and ends - last <= 2:  # such as "<|im_end|>", or "\n</s>"
                    last, stop = ends, ids[ends]
                answers.append((first, last))
            ids = list(ids)
            if answers and spans and messages_end(answers, ids):
                ids = [*ids[: answers[-1][1]], stop]
            encoded.append(Encoded(ids, answers, stop))
        return encoded

    def prompts(
        self, tokenizer: Any, conversations: Sequence[Sequence[Message]], encoded: Sequence[Encoded]
    ) -> list[list[int]]:
        """As transformers gives them: a jinja template may end a prompt otherwise than it begins an answer."""
        texts, guards = [], []
        for messages in conversations:
            turns, guarded = self._guarded(tokenizer, messages[:-1])
            texts.append(self._apply(tokenizer, turns, add_generation_prompt=True))
            guards.append(guarded)
        return [
            _encode_guarded(tokenizer, text, guarded)[0] if guarded else ids
            for text, guarded, ids in zip(
                texts, guards, encode_text(tokenizer, texts, reads_controls=True), strict=True
            )
        ]

    def _guarded(self, tokenizer: Any, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The turns with marks in place of the control tokens that users wrote, and what each mark stands for."""
        literals = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, literals))) if literals else None
        guarded: dict[str, str] = {}

        def guard(content: str) -> str:
            def sentinel(match: re.Match) -> str:
                mark = chr(0xF0000 + len(guarded))  # a private-use character, one for each occurrence
                guarded[mark] = match.group()
                return mark

            return pattern.sub(sentinel, content) if pattern else content

        return [{"role": message.role, "content": guard(message.content)} for message in messages], guarded

    def _render(self, tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], dict[str, str]]:
        """The text, where each answer stands in it, and what stands for control tokens that users wrote."""
        turns, guarded = self._guarded(tokenizer, messages)
        asks = messages[-1].role != "assistant"
        text = self._apply(tokenizer, turns, add_generation_prompt=asks)
        spans = []
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._apply(tokenizer, turns[:place], add_generation_prompt=True)
            start = len(before) if text.startswith(before) else -1
            found = text.find(turn["content"].strip(), max(start, 0))
            if start < 0 or found < 0:
                if place == len(turns) - 1:
                    raise ConfigError(
                        "model.template=tokenizer: the tokenizer's chat template does not render an answer right behind its "
                        "prompt; choose a template of ours with model.template="
                    )
                continue  # a template that rewrites history: such turns are context and are not learned
            spans.append((found, found + len(turn["content"].strip())))
        return text, spans, guarded

    def _apply(self, tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                turns, chat_template=self.source, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja raises what the template's author liked
            raise ConfigError(
                f"model.template=tokenizer: the tokenizer's chat template refuses these turns ({error}); "
                "choose a template of ours with model.template="
            ) from None

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "jinja": self.source}


def messages_end(answers: Sequence[tuple[int, int]], ids: Sequence[int]) -> bool:
    """Whether nothing but a stop token and white space follows the last answer."""
    return len(ids) - answers[-1][1] <= 3


def _encode_guarded(tokenizer: Any, text: str, guarded: dict[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text in which marks stand for control-token literals of users: those are encoded as text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    place = 0
    for part in re.split(f"([{''.join(guarded)}])", text):
        if part in guarded:
            inner = encode_text(tokenizer, [guarded[part]])[0]
            ids += inner
            offsets += [(place, place + 1)] * len(inner)
        elif part:
            tokens = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += tokens.input_ids
            offsets += [(left + place, right + place) for left, right in tokens.offset_mapping]
        place += len(part)
    return ids, offsets


def encode_text(tokenizer: Any, texts: Sequence[str], *, reads_controls: bool = False) -> list[Ids]:
    """Ids of plain texts: nothing added, and nothing in them read as a control token unless `reads_controls`.

    They come as arrays where an engine was prepared for the tokenizer, else as lists.
    """
    if not texts:
        return []
    if not reads_controls and (engine := engine_of(tokenizer)) is not None:
        return engine.encode(texts, lambda others: _encoded_by(backend_of(tokenizer, False), others))
    if (backend := backend_of(tokenizer, reads_controls)) is not None:
        return _encoded_by(backend, texts)
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=not reads_controls, return_attention_mask=False
    ).input_ids


def _encoded_by(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def backend_of(tokenizer: Any, reads_controls: bool) -> Any:
    """The tokenizer's backend, set to cut nothing and to pad nothing; None where the tokenizer has a way of its own.

    Asked by itself it gives ids alone: transformers would have it look for each token's place, and copy eight lists a text.
    """
    if not encodes_by_backend(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not reads_controls
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


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


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        RoleTokens(name="glm4", stop="<|user|>", prefix=("[gMASK]", "<sop>")),
        RoleTokens(name="chatglm3", stop="</s>", prefix=("[gMASK]", "sop"), apart=True),
        Rounds(name="chatglm2", stop="</s>", prefix=("[gMASK]", "sop")),
        Rounds(name="chatglm", stop="<eop>", behind=("[gMASK]", "<sop>")),
        Plain(),
    )
}


def with_tools(system: str, tools: Sequence[dict[str, Any]]) -> str:
    """The system turn with which ChatGLM3 is told of tools."""
    return f"{system}\n{json.dumps(list(tools), indent=4, ensure_ascii=False)}"


def template_named(name: str, tokenizer: Any) -> Template:
    """A template of ours, or the tokenizer's own; a tokenizer that has none gets `plain`. Raises UnknownName."""
    if name == OWN:
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, str) and not tokenizer.is_fast:
            raise ConfigError(
                f"model.template=tokenizer: {type(tokenizer).__name__} cannot tell where a text's tokens stand; leave it out, and "
                f"the family's own is used, or choose one of {', '.join(TEMPLATES)}"
            )
        return TokenizersOwn(source=source) if isinstance(source, str) else TEMPLATES["plain"]
    if name not in TEMPLATES:
        raise UnknownName("template", name, [*TEMPLATES, OWN], add_one="glmtuner/families/template.py")
    return TEMPLATES[name]
