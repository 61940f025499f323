"""The tokenizer's own chat template."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from glmtuner.templates.base import (
    OWN,
    Encoded,
    Message,
    Template,
    Tools,
    answer_weights,
    context_answers,
    control_id,
)
from glmtuner.templates.marked import Offsets, encode_continued, encode_ids, encode_rendered
from glmtuner.templates.rendering import Rendering, Row
from glmtuner.templates.tool_calls import Syntax

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READS_REASONING = re.compile(r"</think>|\breasoning(_content)?\b|[.\[]['\"]?thinking\b")
_RENDERINGS: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Rendering]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizersOwn(Template):
    """The tokenizer's jinja template, encoded as transformers does, except that user text never becomes a control token.

    `thinking` is data.thinking: auto, empty or strip. `asks_thinking` is the mode of a prompt that no answer follows: on, off,
    or None for the template's default. `options` are further variables of the template, such as reasoning_effort. Where it is
    `fitting`, tools and calls are given to the template in the form that it reads (GLM-4's own, content that is None); else
    in OpenAI's, of which some templates leave out the calls.
    """

    source: str
    calls_tokenizer: ClassVar[bool] = True
    rows_may_split: ClassVar[bool] = True
    name: str = OWN
    stop: str = "eos"
    prefix: tuple[str, ...] = ()
    thinking: str = "auto"
    asks_thinking: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fitting: bool = False

    @cached_property
    def renders_reasoning(self) -> bool:  # type: ignore[override]  # of this template's source
        """Whether the template renders the thought before an answer, by a key of its own or in the content."""
        return self.thinking == "strip" or READS_REASONING.search(self.source) is not None

    def rendering(self, tokenizer: "PreTrainedTokenizerBase") -> Rendering:
        """The template with the tokenizer's special tokens; made once for a tokenizer."""
        made = _RENDERINGS.setdefault(tokenizer, {})
        key = f"{self.fitting}{self.source}{sorted(self.options.items())}"
        if key not in made:
            made[key] = Rendering(tokenizer, self.source, self.options, fitting=self.fitting)
        return made[key]

    def encode(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools] = (),
    ) -> list[Encoded]:
        """Each conversation's tokens; `tools` are those of each conversation. One that ends in a question gets a prompt."""
        rendering = self.rendering(tokenizer)
        encoded: dict[int, Encoded] = {}
        rows: dict[int, Row] = {}
        prompts: dict[int, tuple[str, Mapping[str, str]]] = {}
        for index, messages in enumerate(conversations):
            described = tools[index] if tools else ()
            if messages[-1].role == "assistant":
                row = rendering.row(messages, described, thinking=self.thinking)
                rows[index] = row
                prompts[index] = row.answer.prompt, row.marks
            else:
                prompts[index] = rendering.prompt(
                    messages, described, thinking=self._asked(rendering), strip=self.thinking == "strip"
                )
        # offsets are needed to find earlier answers alone
        placed = {index: prompts[index] for index, row in rows.items() if row.earlier}
        alone = {index: prompt for index, prompt in prompts.items() if index not in placed}
        offsets = dict(zip(placed, encode_rendered(tokenizer, *_columns(placed.values())), strict=True))
        asked = dict(zip(alone, encode_ids(tokenizer, *_columns(alone.values())), strict=True))
        texts = [(row.answer.prompt + row.answer.learned, row.marks) for row in rows.values()]
        whole = dict(zip(rows, encode_ids(tokenizer, *_columns(texts)), strict=True))
        stop_of_prompts = (
            control_id(tokenizer, rendering.stop_of_answers or "eos", self.name) if len(rows) < len(prompts) else 0
        )
        for index in prompts:
            if index in rows:
                prompt = offsets[index] if index in offsets else (asked[index], [])
                encoded[index] = self._row(tokenizer, conversations[index], rows[index], prompt, whole[index])
            else:
                encoded[index] = Encoded(asked[index], [], stop_of_prompts, thinking=self._asked(rendering))
        return [encoded[index] for index in range(len(conversations))]

    def _asked(self, rendering: Rendering) -> bool | None:
        if rendering.switch is None or self.asks_thinking is not None:
            return self.asks_thinking if rendering.switch else None
        return {"auto": None, "empty": True, "strip": False}[self.thinking]

    def _row(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: Sequence[Message],
        row: Row,
        prompt: tuple[list[int], Offsets],
        whole: list[int],
    ) -> Encoded:
        """The ids of the prompt as it is served, those of what is learned, and the stop token."""
        ids, offsets = prompt
        stop = control_id(tokenizer, row.answer.stop or "eos", self.name)
        if not row.answer.learned.strip():
            said: Any = messages[-1].content.strip() or getattr(messages[-1], "tool_calls", ())
            place = (len(ids), len(ids))
            return Encoded([*ids, stop], [place], stop, thinking=row.answer.thinking, unrendered=bool(said))
        if whole[: len(ids)] != ids or len(whole) <= len(ids):
            whole = [*ids, *encode_continued(tokenizer, row.answer.learned, row.marks)]
        answers, turns, stops, outside = [], [], [], set(row.outside)
        starts = [start for start, _ in offsets]
        for index, start, end, stop_text in row.earlier:
            first = bisect_right([right for _, right in offsets], start)
            last = bisect_right(starts, end - 1)
            while last > first and starts[last - 1] >= end:
                last -= 1
            # served behind the same ids, and with a token of its own behind it
            if first < last < len(ids) and starts[first] == start and starts[last] == end:
                answers.append((first, last))
                turns.append(messages[index])
                stops.append(control_id(tokenizer, stop_text or "eos", self.name))
            else:
                outside.add(index)
        answers.append((len(ids), len(whole)))
        turns.append(messages[-1])
        return Encoded(
            [*whole, stop],
            answers,
            stop,
            context_answers(turns),
            row.dropped_reasoning,
            (*stops, stop),
            frozenset(outside),
            row.answer.thinking,
            weights=answer_weights(turns),
        )

    def stop_ids(self, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
        """The ids of the tokens that end an answer and a tool call."""
        rendering = self.rendering(tokenizer)
        return {
            control_id(tokenizer, stop or "eos", self.name)
            for stop in (rendering.stop_of_answers, rendering.stop_of_calls)
        }

    def has_modes(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the template can be asked to think or not."""
        return self.rendering(tokenizer).switch is not None

    def renders_tools(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the template renders the descriptions of tools, and calls of them."""
        return self.rendering(tokenizer).renders_tools

    def renders_calls(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the template renders calls of tools and their results, if not the descriptions of the tools."""
        return self.rendering(tokenizer).renders_calls

    def syntax(self, tokenizer: "PreTrainedTokenizerBase") -> Syntax | None:
        """The syntax in which the template writes tool calls; None if it writes none, or in a syntax that is not known."""
        return self.rendering(tokenizer).syntax

    def asking(self, thinking: bool | None) -> "TokenizersOwn":
        """The template whose prompts are of this mode."""
        return replace(self, asks_thinking=thinking)

    def always_thinking(self) -> "TokenizersOwn":
        """The template in which an answer without a thought is learned behind the thinking prompt."""
        return replace(self, thinking="empty")

    def describe(self) -> dict[str, Any]:
        """The template as provenance.json stores it and the key of the cache is made of."""
        return {
            "name": self.name,
            "jinja": self.source,
            "thinking": self.thinking,
            **({"options": dict(self.options)} if self.options else {}),
        }


def _columns(texts: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[list[str], list[Mapping[str, str]]]:
    """Texts with their marks as two lists."""
    pairs = list(texts)
    return [text for text, _ in pairs], [marks for _, marks in pairs]
