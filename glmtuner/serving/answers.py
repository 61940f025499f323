"""Answers in the form of OpenAI's API: whole, and as the deltas of a stream."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from glmtuner.serving.calls import Delta


@dataclass
class WholeAnswer:
    """An answer that is put together from its deltas."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take what comes next."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.calls += [{name: value for name, value in call.items() if name != "index"} for call in delta.calls]
        self.finish_reason = delta.finish_reason or self.finish_reason

    @property
    def message(self) -> dict[str, Any]:
        """The message; its content is null beside calls if it has no text. A thought and calls are there if it has any."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        return message


def parts_of(delta: Delta) -> Iterator[dict[str, Any]]:
    """What the events of a stream say: a thought, text, and of each call its name before its arguments."""
    if delta.reasoning:
        yield {"reasoning_content": delta.reasoning}
    if delta.text:
        yield {"content": delta.text}
    for call in delta.calls:
        yield {"tool_calls": [{**call, "function": {**call["function"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}]}
