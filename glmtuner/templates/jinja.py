"""The chat template that a tokenizer brings along."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.errors import ConfigError
from glmtuner.templates.base import OWN, Encoded, Message, Template
from glmtuner.templates.encoding import encode_text


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
