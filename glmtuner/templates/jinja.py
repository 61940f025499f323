"""The tokenizer's own chat template."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.errors import ConfigError
from glmtuner.templates.base import OWN, Encoded, Message, Template
from glmtuner.templates.encoding import Ids, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class TokenizersOwn(Template):
    """The tokenizer's jinja template, encoded as transformers does, except that user text never becomes a control token."""

    source: str
    calls_tokenizer: ClassVar[bool] = True
    name: str = OWN
    stop: str = "eos"
    prefix: tuple[str, ...] = ()

    def encode(self, tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
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
                stop_index = next((index for index in range(last, len(ids)) if ids[index] in special), None)
                if stop_index is not None and stop_index - last <= 2:  # such as "<|im_end|>", or "\n</s>"
                    last, stop = stop_index, ids[stop_index]
                answers.append((first, last))
            ids = list(ids)
            if answers and spans and ends_in_answer(answers, ids):
                ids = [*ids[: answers[-1][1]], stop]
            encoded.append(Encoded(ids, answers, stop))
        return encoded

    def prompts(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        conversations: Sequence[Sequence[Message]],
        encoded: Sequence[Encoded],
    ) -> Sequence[Ids]:
        """As transformers renders them: a jinja template may end a prompt otherwise than it begins an answer."""
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

    def _guarded(
        self, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The turns with marks in place of the control tokens that users wrote, and the text of each mark."""
        literals = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, literals))) if literals else None
        guarded: dict[str, str] = {}

        def guard(content: str) -> str:
            def new_mark(match: re.Match[str]) -> str:
                mark = chr(0xF0000 + len(guarded))  # a private-use character, one for each occurrence
                guarded[mark] = match.group()
                return mark

            return pattern.sub(new_mark, content) if pattern else content

        return [{"role": message.role, "content": guard(message.content)} for message in messages], guarded

    def _render(
        self, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
    ) -> "tuple[str, Offsets, dict[str, str]]":
        """The text, the range of each answer in it, and the text of each mark that replaces a user's control token."""
        turns, guarded = self._guarded(tokenizer, messages)
        text = self._apply(tokenizer, turns, add_generation_prompt=messages[-1].role != "assistant")
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._apply(tokenizer, turns[:index], add_generation_prompt=True)
            prompt_end = len(before) if text.startswith(before) else -1
            start = text.find(turn["content"].strip(), max(prompt_end, 0))
            if prompt_end < 0 or start < 0:
                if index == len(turns) - 1:
                    raise ConfigError(
                        "model.template=tokenizer: the tokenizer's chat template does not render an answer right after its "
                        "prompt; choose a template of ours with model.template="
                    )
                continue  # a template that rewrites history: such turns are context and are not learned
            spans.append((start, start + len(turn["content"].strip())))
        return text, spans, guarded

    def _apply(
        self, tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], add_generation_prompt: bool
    ) -> str:
        try:
            text = tokenizer.apply_chat_template(
                turns, chat_template=self.source, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever their authors chose
            raise ConfigError(
                f"model.template=tokenizer: the tokenizer's chat template refuses these turns ({error}); "
                "choose a template of ours with model.template="
            ) from None
        assert isinstance(text, str)  # tokenize=False
        return text

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "jinja": self.source}


def ends_in_answer(answers: Sequence[tuple[int, int]], ids: Sequence[int]) -> bool:
    """Whether nothing but a stop token and white space follows the last answer."""
    return len(ids) - answers[-1][1] <= 3


def _encode_guarded(
    tokenizer: "PreTrainedTokenizerBase", text: str, guarded: dict[str, str]
) -> "tuple[list[int], Offsets]":
    """Ids and offsets of a text with marks in place of users' control tokens: their text is encoded as plain text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for part in re.split(f"([{''.join(guarded)}])", text):
        if part in guarded:
            plain_ids = encode_text(tokenizer, [guarded[part]])[0]
            ids += plain_ids
            offsets += [(position, position + 1)] * len(plain_ids)
        elif part:
            tokens = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += tokens.input_ids
            offsets += [(left + position, right + position) for left, right in tokens.offset_mapping]
        position += len(part)
    return ids, offsets
