"""Is what is trained, and what will be served, what the tokenizer's own chat template renders?

The other side of the comparison is `apply_chat_template` of plain transformers, as a server calls it, on turns in OpenAI's form;
nothing of templates/ takes part in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.data.encode import Encoder
from glmtuner.data.piecewise import PLAIN_TEXT
from glmtuner.data.preview import Row, decode, learned_ranges, sample_of, served_prompt
from glmtuner.data.records import Example, Message
from glmtuner.errors import ConfigError, GlmtunerError
from glmtuner.templates.base import OWN, TEMPLATES, Template
from glmtuner.templates.marked import begins_with_space
from glmtuner.templates.named import own_source
from glmtuner.templates.tool_calls import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AROUND = 60  # characters that are shown on each side of the first difference
MOST_ANSWERS = 16  # of a row whose prompts are compared one by one
LENGTH = 1_000_000  # of the battery's rows: nothing is cut
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn by which templates read a thought
CALL = ToolCall("get_weather", {"city": "北京", "days": 2}, "call00001")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ASKED, ANSWERED = Message("user", "你好，who are you?"), Message("assistant", "I am a model.\n\n我是一个模型。")
AGAIN, LAST = Message("user", "And 6 times 7?"), Message("assistant", "42")
SYSTEM = Message("system", "Answer in one sentence.")
BATTERY = {  # by what the error calls it
    "a question": Example([ASKED, ANSWERED]),
    "a system turn": Example([SYSTEM, ASKED, ANSWERED]),
    "several turns": Example([ASKED, ANSWERED, AGAIN, LAST, Message("user", "谢谢"), Message("assistant", "不客气。")]),
    "reasoning": Example([ASKED, ANSWERED, AGAIN, LAST._replace(reasoning="6 * 7 = 42")]),
    "reasoning in an earlier turn": Example([AGAIN, LAST._replace(reasoning="6 * 7 = 42"), ASKED, ANSWERED]),
    "a tool call": Example([ASKED, Message("assistant", "", tool_calls=(CALL,))], tools=(TOOL,)),
    "a tool's result": Example(
        [
            ASKED,
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", '{"weather": "晴"}', call_id=CALL.id),
            Message("assistant", "晴天。"),
        ],
        tools=(TOOL,),
    ),
}


@dataclass(frozen=True)
class Difference:
    """Where what is ours first differs from what the tokenizer's chat template renders: both texts, shortened around it."""

    what: str  # the prompt that is served, the row, …
    ours: str
    official: str

    def __str__(self) -> str:
        return f"{self.what} is {self.ours}, and the tokenizer's chat template renders {self.official}"


class Official:
    """The tokenizer's own chat template, called as plain transformers calls it; `template` is the one to compare with it.

    `refusal` is why the last turns could not be rendered, "" if they could.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str, template: Template, strip: bool) -> None:
        self.tokenizer, self.source, self.template, self.strip = tokenizer, source, template, strip
        self.options = dict(getattr(template, "options", {}))
        self.switch = next((name for name in ("enable_thinking", "thinking") if name in source), None)
        self.thought = next((key for key in THOUGHTS if key in source), THOUGHTS[0])
        # a template of ours is tokenized in pieces, at whose start sentencepiece puts a space that the whole text does not have
        self.ignores_spaces = template.name != OWN and begins_with_space(tokenizer)
        self._ends: str | None = None
        self.refusal = ""

    @cached_property
    def renders_tools(self) -> bool:
        """Whether the template renders the description of a tool, and a call of it."""
        described = self.render([ASKED], [TOOL], prompts=True, thinking=None) or ""
        called = self.render(BATTERY["a tool call"].messages, [TOOL], prompts=False, thinking=None) or ""
        return CALL.name in described and called.count(CALL.name) > described.count(CALL.name)

    def render(
        self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], *, prompts: bool, thinking: bool | None
    ) -> str | None:
        """The turns as text; None where the template refuses them."""
        mode = {self.switch: thinking} if self.switch and thinking is not None else {}
        try:
            text = self.tokenizer.apply_chat_template(
                [self._turn(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                add_generation_prompt=prompts,
                tokenize=False,
                **{**mode, **self.options},
            )
        except Exception as error:  # templates raise whatever their authors chose
            self.refusal = " ".join(str(error).split())[:200]
            return None
        assert isinstance(text, str)  # of one conversation
        return text

    def _turn(self, message: Any) -> dict[str, Any]:
        """A turn as OpenAI writes it; without the thought of an answer where data.thinking=strip leaves it out."""
        content, thought = message.content, getattr(message, "reasoning", "")
        if message.role != "assistant":
            call_id = getattr(message, "call_id", "")
            return {"role": message.role, "content": content, **({"tool_call_id": call_id} if call_id else {})}
        if self.strip:
            content, thought = content.split("</think>", 1)[-1].lstrip("\n") if "</think>" in content else content, ""
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        if thought.strip():
            turn[self.thought] = thought
        if calls := getattr(message, "tool_calls", ()):
            turn["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in calls
            ]
        return turn

    # comparisons

    def comparable(self, row: Row) -> bool:
        """Whether the template renders all that the row is made of: makers have published ones that leave out tools."""
        used = row.tools or any(turn.role == "tool" or getattr(turn, "tool_calls", ()) for turn in row.turns)
        return not used or self.renders_tools

    def difference(self, row: Row, asks_thinking: bool | None = None) -> Difference | None:
        """The first difference of a row, or of the prompt that is served for its last answer.

        That is in the mode `asks_thinking`, or by default in the one in which the answer is learned.
        """
        asked, mode = row.turns[:-1], row.thinking if asks_thinking is None else asks_thinking
        prompt = served_prompt(self.template, self.tokenizer, row, asks_thinking)
        expected = self.render(asked, row.tools, prompts=True, thinking=mode)
        if expected is None:
            ours = shortened(decode(self.tokenizer, prompt))
            return Difference("the prompt that is served", ours, f"nothing: it refuses these turns ({self.refusal})")
        if found := self._differs("the prompt that is served", prompt, expected):
            return found
        ranges = learned_ranges(row.labels)
        if not ranges:  # a prompt alone
            return self._differs("the prompt of the row", row.input_ids, expected)
        if mode != row.thinking:
            expected = self.render(asked, row.tools, prompts=True, thinking=row.thinking) or ""
        if ranges[-1][1] < len(row.input_ids):  # the last answer is context
            return self._prompts(row, ranges)
        return (
            self._differs("the prompt of the row", row.input_ids[: ranges[-1][0]], expected)
            or self._prompts(row, ranges[:-1])
            or self._whole(row, ranges[-1], expected)
        )

    def _prompts(self, row: Row, ranges: Sequence[tuple[int, int]]) -> Difference | None:
        """The first earlier answer of a row that does not stand behind a prompt that is served."""
        if len(ranges) > MOST_ANSWERS or not ranges:
            return None
        ends = [index for index, turn in enumerate(row.turns) if turn.role == "assistant"]
        modes = (None,) if row.thinking is None else (True, False)
        prompts = [
            text
            for end in ends
            for mode in modes
            if (text := self.render(row.turns[:end], row.tools, prompts=True, thinking=mode)) is not None
        ]
        for start, _ in ranges:
            found = [self._differs("the prompt of an earlier answer", row.input_ids[:start], text) for text in prompts]
            if found and all(found):
                return max(found, key=lambda each: len(str(each)))
        return None

    def _whole(self, row: Row, last: tuple[int, int], prompt: str) -> Difference | None:
        """How the row differs from the full rendering, where that continues the prompt; else whether it has the answer in it."""
        start, end = last
        full = self.render(row.turns, row.tools, prompts=False, thinking=row.thinking)
        learned = row.input_ids[start : end - 1]
        ours = self._text(row.input_ids[: end - 1])
        if full is None or not full.startswith(prompt):
            text = decode(self.tokenizer, learned)
            calls = getattr(row.turns[-1], "tool_calls", ())  # some templates leave out the text before a call
            said = [call.name for call in calls] or [row.turns[-1].content.rpartition("</think>")[2].strip()]
            lost = [each for each in said if each not in text and not row.answer_cut]
            return Difference("what is learned", shortened(text), f"{shortened(lost[0])} in it") if lost else None
        expected = self._as_tokenized(full)
        if row.answer_cut:  # it may end inside of a character
            ours = ours.rstrip("\ufffd")
            return None if expected.startswith(ours) else between("the row", ours, expected)
        stop = decode(self.tokenizer, row.input_ids[end - 1 : end])
        if expected.startswith(ours) and self._is_end(expected[len(ours) :], stop):
            return None
        return between("the row", ours, expected)

    def _is_end(self, text: str, stop: str) -> bool:
        """Whether the text is all that may stand behind an answer: nothing, its stop token, or what stands behind every answer."""
        if self._ends is None:
            probe = "answer"
            full = self.render([ASKED, Message("assistant", probe)], (), prompts=False, thinking=None) or ""
            self._ends = self._as_tokenized(full[full.rfind(probe) + len(probe) :])
        return text.strip() in ("", stop.strip(), self._ends.strip())

    def _differs(self, what: str, ids: Sequence[int], official: str) -> Difference | None:
        official_ids = self._ids(official)
        if list(ids) == official_ids:
            return None
        ours, expected = self._text(ids), self._text(official_ids)
        # other ids of the same text: control tokens that somebody wrote are text here, and pieces are tokenized apart
        return None if ours in (expected, official) else between(what, ours, expected)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _as_tokenized(self, text: str) -> str:
        """The text after it has been token ids, as ours has been."""
        return self._text(self._ids(text))

    def _text(self, ids: Sequence[int]) -> str:
        text = decode(self.tokenizer, ids)
        return text.replace(" ", "") if self.ignores_spaces else text


def between(what: str, ours: str, official: str) -> Difference:
    """The difference of two texts, shortened around its first character."""
    place = next(
        (index for index, (a, b) in enumerate(zip(ours, official, strict=False)) if a != b),
        min(len(ours), len(official)),
    )
    return Difference(what, shortened(ours, place), shortened(official, place))


def shortened(text: str, place: int = 0) -> str:
    """The text around a place, in quotation marks."""
    first, last = max(place - AROUND, 0), place + AROUND
    return json.dumps(f"{'…' if first else ''}{text[first:last]}{'…' if last < len(text) else ''}", ensure_ascii=False)


def official_of(run: Run, encoder: Encoder | None) -> Official | None:
    """The tokenizer's own chat template, to compare the encoder's with; None if it has none, or the rows have no turns."""
    if encoder is None or encoder.accepts == PLAIN_TEXT:
        return None
    try:
        source = own_source(encoder.tokenizer)
    except ConfigError:  # several templates by name, and no default among them
        return None
    if source is None:
        return None
    return Official(encoder.tokenizer, source, encoder.template, run.data.thinking.value == "strip")


@dataclass(frozen=True)
class Compared:
    """The conversations of the battery that were compared, by their names; in the last one `difference` was found, if any was."""

    names: tuple[str, ...]
    difference: Difference | None

    def __str__(self) -> str:
        return f"with {self.names[-1]}, {self.difference}" if self.difference else ", ".join(self.names)


_COMPARED: dict[str, Compared] = {}  # of this process, by template and tokenizer


def compare_battery(official: Official) -> Compared:
    """The battery, up to the first conversation that differs."""
    tokenizer, template = official.tokenizer, official.template
    determinants = [template.describe(), official.source, str(tokenizer.name_or_path), len(tokenizer), official.strip]
    key = json.dumps(determinants, sort_keys=True, ensure_ascii=False)
    if key not in _COMPARED:
        _COMPARED[key] = _compare_battery(official)
    return _COMPARED[key]


def _compare_battery(official: Official) -> Compared:
    encoder = Encoder(
        template=official.template, tokenizer=official.tokenizer, max_source_length=LENGTH, max_target_length=LENGTH
    )
    names: list[str] = []
    for name, example in BATTERY.items():
        row = row_of(encoder, example)
        if row is None or not official.comparable(row):
            continue
        if official.render(row.turns[:-1], row.tools, prompts=True, thinking=None) is None:
            continue  # such turns are refused: a system turn, tools
        names.append(name)
        if found := first_difference(official, encoder, [example], None):
            return Compared(tuple(names), found)
    return Compared(tuple(names), None)


def row_of(encoder: Encoder, example: Example) -> Row | None:
    """The row of a record; None where the encoder refuses it, or has no row for it."""
    try:
        sample, _ = sample_of(encoder, example)
    except GlmtunerError:
        return None
    return sample.own if sample else None


def first_difference(
    official: Official, encoder: Encoder, examples: Sequence[Example], asks_thinking: bool | None
) -> Difference | None:
    """The first difference in the rows of these records; those that the encoder refuses are left to the run itself."""
    for example in examples:
        try:
            sample, _ = sample_of(encoder, example)
        except GlmtunerError:
            continue
        if sample is None or not official.comparable(sample.own):
            continue
        for row in (*sample.earlier, sample.own):
            if found := official.difference(row, asks_thinking):
                return found
    return None


def check_template(run: Run, encoder: Encoder | None, name: str) -> bool:
    """Whether the template renders the battery as the tokenizer's own chat template does.

    A difference is a ConfigError where the family chose the template; it is said where the user, or the checkpoint that is
    trained further, did, and where only turns with tools differ.
    """
    official = official_of(run, encoder)
    compared = compare_battery(official) if official else None
    if official is None or compared is None or compared.difference is None:
        return True
    if BATTERY[compared.names[-1]].needs_tools:  # records that have tools are compared by themselves
        say(f"model.template={name}: {compared}; other programs have to render tools as this template does")
    else:
        report_difference(run, official.template, name, str(compared))
    return False


def check_first_rows(run: Run, encoder: Encoder | None, name: str, firsts: Mapping[str, Sequence[Example]]) -> None:
    """The same for the rows of the first records of each dataset, by its name."""
    official = official_of(run, encoder)
    if official is None or encoder is None:
        return
    for dataset, examples in firsts.items():
        if found := first_difference(official, encoder, examples, run.generation.asks_thinking):
            report_difference(run, encoder.template, name, f"with dataset {dataset!r}, {found}")
            return


def report_difference(run: Run, template: Template, name: str, difference: str) -> None:
    """Raise ConfigError, or say the difference where the template was not chosen by the family alone."""
    about = f"model.template={name}: {difference}"
    if run.model.template is not None or template is not TEMPLATES.get(name, template):
        say(f"{about}; the model is trained and served with model.template={name}")
        return
    other = f"model.template={OWN} for the tokenizer's, or " if name != OWN else ""
    raise ConfigError(
        f"{about}; a model that is trained with one and asked with the other answers worse: type {other}"
        f"model.template={name} to keep this one"
    )
