"""The tokenizer's own chat template."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.errors import ConfigError
from glmtuner.templates.base import OWN, Encoded, Message, Template, context_answers
from glmtuner.templates.encoding import Ids, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Offsets = list[tuple[int, int]]


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # names by which templates read a thought


@dataclass(frozen=True)
class TokenizersOwn(Template):
    """The tokenizer's jinja template, encoded as transformers does, except that user text never becomes a control token."""

    source: str
    calls_tokenizer: ClassVar[bool] = True
    name: str = OWN
    stop: str = "eos"
    prefix: tuple[str, ...] = ()

    @cached_property
    def reasoning_key(self) -> str | None:  # type: ignore[override]  # of this template's source
        """The name by which the template reads the thought before an answer; None if it reads none."""
        return next((key for key in REASONING_KEYS if re.search(rf"\b{key}\b", self.source)), None)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        rendered = [self._render(tokenizer, messages) for messages in conversations]
        tokens = tokenizer(
            [text for text, _, _, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        encoded = []
        for messages, (text, spans, guarded, dropped), ids, offsets in zip(
            conversations, rendered, tokens.input_ids, tokens.offset_mapping, strict=True
        ):
            if guarded:
                ids, offsets = _encode_guarded(tokenizer, text, guarded)
            answers, turns, stop = [], [], tokenizer.eos_token_id
            for index, start, end in spans:
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
                turns.append(messages[index])
            ids = list(ids)
            if answers and spans and ends_in_answer(answers, ids):
                ids = [*ids[: answers[-1][1]], stop]
            encoded.append(Encoded(ids, answers, stop, context_answers(turns), dropped))
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

        turns = []
        for message in messages:
            turn = {"role": message.role, "content": guard(message.content)}
            reasoning = getattr(message, "reasoning", "")
            if reasoning and self.reasoning_key:
                turn[self.reasoning_key] = guard(reasoning)
            turns.append(turn)
        return turns, guarded

    def _render(
        self, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
    ) -> "tuple[str, list[tuple[int, int, int]], dict[str, str], int]":
        """The text, the turn and range of each answer in it, the text of each mark that replaces a user's control token, and
        how many thoughts the template leaves out.

        A thought belongs to its answer: both are what the model writes after the prompt.
        """
        turns, guarded = self._guarded(tokenizer, messages)
        text = self._apply(tokenizer, turns, add_generation_prompt=messages[-1].role != "assistant")
        spans, num_dropped = [], 0
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            is_last, content = index == len(turns) - 1, turn["content"].strip()
            thought = turn.get(self.reasoning_key or "", "").strip()
            before = self._apply(tokenizer, turns[:index], add_generation_prompt=True)
            prompt_end = len(before) if text.startswith(before) else -1
            thought_start = text.find(thought, max(prompt_end, 0)) if thought else -1
            start = text.find(content, max(prompt_end, 0) if thought_start < 0 else thought_start + len(thought))
            if thought and not 0 <= thought_start < start:
                thought_start, start = -1, text.find(content, max(prompt_end, 0))
                if is_last:
                    raise ConfigError(
                        "model.template=tokenizer: the tokenizer's chat template does not render the reasoning of the last "
                        f"answer ({self.reasoning_key}); write it into the content of the turn, or type "
                        f"data.ignore_columns={','.join(REASONING_KEYS)} to learn the answers without it"
                    )
                num_dropped += 1
            if prompt_end < 0 or start < 0:
                if is_last:
                    raise ConfigError(
                        "model.template=tokenizer: the tokenizer's chat template does not render an answer right after its "
                        "prompt; choose a template of ours with model.template="
                    )
                continue  # a template that rewrites history: such turns are context and are not learned
            spans.append((index, start if thought_start < 0 else prompt_end, start + len(content)))
        return text, spans, guarded, num_dropped

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
