"""An answer read while it is generated: its thought, its text and its tool calls, each as soon as it is certain.

    reader = AnswerReader(template.syntax(tokenizer), tools, thinks=True, in_thought=prompt.endswith("<think>"))
    for piece in pieces:
        delta = reader.feed(piece)
    delta = reader.finish()

All that is fed comes back: what begins like a call and is none comes back as text, and white space between text and calls,
which belongs to the syntax, is the only thing that is left out. Nothing raises for what a model writes.
"""

from dataclasses import dataclass
from typing import Protocol

from glmtuner.templates.tool_calls import END_THINK, ONE_NAME, THINK, Calls, Syntax, ToolCall, Tools, names_of_tools

MOST_CLOSINGS = 16  # of one call; its arguments may hold the closing tag as text


@dataclass(frozen=True, slots=True)
class Delta:
    """What a piece of an answer adds to its thought, its text and its calls; calls stand behind the text."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: "Delta") -> "Delta":
        return Delta(self.reasoning + other.reasoning, self.content + other.content, (*self.calls, *other.calls))

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class _Body(Protocol):
    """Reads what stands behind the thought; with `is_end` nothing follows, and nothing is held back."""

    def read(self, text: str, is_end: bool) -> Delta: ...


class AnswerReader:
    """Reads one answer. Its text must hold the control tokens of the syntax (decode without `skip_special_tokens`), no stop.

    `syntax` is None where no call is looked for: the template writes none, or the request has no tools. `tools` are the
    functions that can be called; where calls stand between no tags, only these are calls. `thinks` says whether the template
    has thoughts, `in_thought` whether the prompt has opened one.
    """

    def __init__(
        self, syntax: Syntax | None, tools: Tools = (), *, thinks: bool = False, in_thought: bool = False
    ) -> None:
        self._state = "thought" if in_thought else "start" if thinks else "body"
        self._held = ""
        self._thought_begun = False
        self._body = _body_of(syntax, tools)
        self._strips_lines = False  # line breaks between a thought and the text belong to neither

    def feed(self, text: str) -> Delta:
        """What the next piece of the answer makes certain."""
        return self._read(text, is_end=False)

    def finish(self) -> Delta:
        """The rest, when the answer has ended."""
        return self._read("", is_end=True)

    def _read(self, text: str, is_end: bool) -> Delta:
        self._held += text
        delta = Delta()
        if self._state == "start":
            stripped = self._held.lstrip()
            if stripped.startswith(THINK):
                self._state, self._held = "thought", stripped.removeprefix(THINK)
            elif is_end or not THINK.startswith(stripped):
                self._state = "body"
        if self._state == "thought":
            thought, end, rest = self._held.partition(END_THINK)
            if not self._thought_begun:
                thought = thought.lstrip("\n")
            kept = thought.rstrip("\n") if end or is_end else thought[: _certain(thought, END_THINK)].rstrip("\n")
            self._thought_begun |= bool(kept)
            delta += Delta(reasoning=kept)
            if end:
                self._state, self._held, self._strips_lines = "body", rest, True
            else:
                self._held = "" if is_end else thought[len(kept) :]
        if self._state == "body":
            text, self._held = self._held, ""
            if self._strips_lines:
                text = text.lstrip("\n")
                self._strips_lines = not text
            delta += self._body.read(text, is_end)
        return delta


def read_answer(
    text: str, syntax: Syntax | None, tools: Tools = (), *, thinks: bool = False, in_thought: bool = False
) -> Delta:
    """A whole answer's thought, text and calls; see AnswerReader."""
    reader = AnswerReader(syntax, tools, thinks=thinks, in_thought=in_thought)
    return reader.feed(text) + reader.finish()


def _certain(text: str, tag: str) -> int:
    """The length of the text without the longest end of it that may be the beginning of a tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return len(text) - length
    return len(text)


def _body_of(syntax: Syntax | None, tools: Tools) -> _Body:
    if syntax is None:
        return _Text()
    if syntax.opening:
        return _Tagged(syntax, tools)
    return _Untagged(syntax, tools)


class _Text:
    """Everything is text."""

    def read(self, text: str, is_end: bool) -> Delta:
        return Delta(content=text)


class _Tagged:
    """Calls between tags, or behind a tag up to the end."""

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        self._syntax, self._tools = syntax, tools
        self._held = ""
        self._in_call = False
        self._searched = 0  # up to here no closing tag ends the call
        self._num_closings = 0
        self._space = ""  # white space that is text unless a call follows
        self._called = False
        self._leading = syntax.leading

    def read(self, text: str, is_end: bool) -> Delta:
        self._held += text
        delta = Delta()
        while self._held:
            if self._in_call:
                calls = self._calls(is_end)
                if calls is not None:
                    self._called, self._space = True, ""
                    delta += Delta(calls=tuple(calls))
                elif is_end or self._num_closings >= MOST_CLOSINGS:
                    delta += self._text(self._syntax.opening)
                    self._held, self._in_call = self._held.removeprefix(self._syntax.opening), False
                else:
                    break
                continue
            if self._leading and not is_end and self._leading.startswith(self._held):
                break  # not enough to tell
            self._held, self._leading = self._held.removeprefix(self._leading), ""
            before, opening, _ = self._held.partition(self._syntax.opening)
            end = len(before) if opening or is_end else _certain(before, self._syntax.opening)
            delta += self._text(self._held[:end])
            self._held = self._held[end:]
            if not opening:
                break
            self._in_call, self._searched, self._num_closings = True, len(opening), 0
        if is_end and not self._called:
            delta += Delta(content=self._space)
        return delta

    def _text(self, text: str) -> Delta:
        """The text up to its last white space, which is held back; behind a call white space at the start is left out."""
        text = self._space + text
        if self._called and not self._space:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :] if kept or not self._called else ""
        return Delta(content=kept)

    def _calls(self, is_end: bool) -> Calls | None:
        """The calls behind an opening tag, whose text leaves what is held; None if there are none, or not yet."""
        opening, closing = len(self._syntax.opening), self._syntax.closing
        while closing and self._num_closings < MOST_CLOSINGS:
            end = self._held.find(closing, self._searched)
            if end < 0:
                self._searched = max(opening, len(self._held) - len(closing) + 1)
                break
            calls = self._syntax.read(self._held[opening:end], self._tools)
            self._searched, self._num_closings = end + len(closing), self._num_closings + 1
            if calls is not None:
                self._held, self._in_call = self._held[end + len(closing) :], False
                return calls
        if is_end and self._syntax.may_end_open:
            calls = self._syntax.read(self._held[opening:], self._tools)
            if calls is not None:
                self._held, self._in_call = "", False
                return calls
        return None


class _Untagged:
    """Parts between separators, each of which is either calls or text; a part that may be calls is held to its end."""

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        self._syntax, self._tools = syntax, tools
        self._names = names_of_tools(tools)
        self._held = ""
        self._in_text = False
        self._has_text = False

    def read(self, text: str, is_end: bool) -> Delta:
        self._held += text
        delta = Delta()
        while self._held:
            part, separator, rest = (
                self._held.partition(self._syntax.separator) if self._syntax.separator else (self._held, "", "")
            )
            complete = bool(separator) or is_end
            if not self._in_text:
                may_be_calls = self._may_be_calls(part)
                if may_be_calls and not complete:
                    break
                calls = self._syntax.read(part, self._tools) if may_be_calls else None
                if calls is not None:
                    delta += Delta(calls=tuple(calls))
                    self._held = rest
                    continue
                if part:
                    self._in_text = True
                    part = part if self._has_text else part.removeprefix(self._syntax.leading)
            end = len(part) if complete else _certain(part, self._syntax.separator)
            self._has_text |= end > 0
            delta += Delta(content=part[:end])
            self._held = part[end:] if not complete else rest
            self._in_text = self._in_text and not complete
            if not complete:
                break
        return delta

    def _may_be_calls(self, part: str) -> bool:
        """Whether a part that begins so can be calls."""
        if not self._syntax.separator:  # an object from the first character on
            begun = part.lstrip()
            return "<|python_tag|>".startswith(begun[:14]) or begun.startswith("{")
        if part.startswith("\n"):
            return False
        name, line_break, rest = part.partition("\n")
        if not line_break:
            return any(each.startswith(name.strip()) for each in self._names) if self._names else _may_be_name(name)
        if name.strip() not in self._names if self._names else not ONE_NAME.fullmatch(name.strip()):
            return False
        begun = rest.lstrip()
        return not begun or begun.startswith(("{", "`", "tool_call"[: len(begun)])) or begun.startswith("tool_call")


def _may_be_name(text: str) -> bool:
    return not text or ONE_NAME.fullmatch(text.strip()) is not None
