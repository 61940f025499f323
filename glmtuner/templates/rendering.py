"""What a Jinja chat template puts before an answer, what a model learns behind it, and which token ends it.

A row is the official generation prompt, then what the official template puts behind that prompt, then the stop token. Where the
full rendering does not continue the prompt (a thought that the prompt opens and the history cuts, a system text that moves),
the row is made of the prompt and the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtuner.errors import ConfigError
from glmtuner.templates.base import Message
from glmtuner.templates.forms import Turn
from glmtuner.templates.guards import PRIVATE, Guard
from glmtuner.templates.probed import REASONING_KEYS, Probed

OPENED = re.compile(r"(\s*)<think>(\s*)$")  # a thought that a prompt opens


@dataclass(frozen=True)
class Answer:
    """An answer as text: the prompt it is served behind, what is learned (without the stop token), and the stop token.

    `learned` is "" where the template renders nothing of the answer. `thinking` is the mode of the prompt: on, off, or None if
    the template has no switch.
    """

    prompt: str
    learned: str
    stop: str
    thinking: bool | None = None
    lost_reasoning: bool = False  # the template left the answer's own thought out


@dataclass(frozen=True)
class Row:
    """A conversation as text: its last answer, and the earlier answers that can be learned in the same row.

    `earlier` has for each of these the number of its turn, and where it begins and ends in the prompt; `outside` are the turns
    of the answers that need a row of their own. `marks` stand for control tokens that somebody wrote as text.
    """

    answer: Answer
    earlier: tuple[tuple[int, int, int, str], ...] = ()
    outside: frozenset[int] = frozenset()
    marks: Mapping[str, str] = field(default_factory=dict)
    dropped_reasoning: int = 0


def split_reasoning(content: str) -> tuple[str, str]:
    """The thought in an answer's content, "" if there is none, and the rest of the content."""
    if "</think>" not in content:
        return "", content
    head, _, tail = content.partition("</think>")
    return head.split("<think>", 1)[-1], tail.lstrip("\n")


class Rendering(Probed):
    """A Jinja template as it makes prompts, and rows of conversations."""

    # turns

    def turns(self, messages: Sequence[Message], *, strip: bool = False) -> tuple[list[Turn], dict[str, str]]:
        """The turns as the template reads them, and the marks in them, each with the control token that it stands for.

        In what users, system texts and tools say every control token is text. In an answer only special tokens are: its
        `<think>` and `<tool_call>` are meant. `strip` leaves the thoughts of answers out.
        """
        marks: dict[str, str] = {}
        taken = "".join(map(_all_text, messages))
        free = (chr(code) for code in PRIVATE if chr(code) not in taken)
        guard = Guard(self.any_literal, self.special_literal, marks, free)
        turns = [self._turn(message, guard, strip) for message in messages]
        return turns, {mark: literal for literal, mark in marks.items()}

    def _turn(self, message: Message, guard: Guard, strip: bool) -> Turn:
        if message.role != "assistant":
            turn: Turn = {"role": message.role, "content": guard.foreign(message.content)}
            if call_id := getattr(message, "call_id", ""):
                turn["tool_call_id"] = call_id
            return turn
        content, reasoning = message.content, getattr(message, "reasoning", "")
        if strip:
            content, reasoning = split_reasoning(content)[1], ""
        turn = {"role": "assistant", "content": guard.own(content)}
        if reasoning.strip():
            # a template without a key for it has it in prompts that open a thought alone, or leaves it out
            turn[self.reasoning_key or REASONING_KEYS[0]] = guard.own(reasoning)
        calls = getattr(message, "tool_calls", ())
        if calls:
            turn["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {"name": guard.own(call.name), "arguments": guard.deep(call.arguments)},
                }
                for call in calls
            ]
        return turn

    def tools(self, tools: Sequence[Mapping[str, Any]], marks: dict[str, str]) -> list[Any]:
        """The descriptions of the tools, in which every control token is text."""
        used = {literal: mark for mark, literal in marks.items()}
        taken = json.dumps(list(tools), ensure_ascii=False)
        free = (chr(code) for code in PRIVATE if chr(code) not in marks and chr(code) not in taken)
        guard = Guard(self.any_literal, self.special_literal, used, free)
        guarded = [guard.deep(tool, foreign=True) for tool in tools]
        marks.update({mark: literal for literal, mark in used.items()})
        return guarded

    # answers

    def row(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, thinking: str = "auto"
    ) -> Row:
        """The last answer and those of the earlier ones that its row can teach; `thinking` is data.thinking."""
        turns, marks = self.turns(messages, strip=thinking == "strip")
        described = self.tools(tools, marks) if tools else []
        ends = [index for index, message in enumerate(messages) if message.role == "assistant"]
        last = self.answer(turns, described, thinking)
        earlier, outside, dropped = [], set(), int(last.lost_reasoning)
        for index in ends[:-1]:
            reasoning = self._reasoning(turns[index])
            if reasoning.strip() and reasoning.strip() not in last.prompt:
                dropped += 1
            before = self.answer(turns[: index + 1], described, thinking)
            if not before.learned:
                continue
            whole = before.prompt + before.learned
            if last.prompt.startswith(whole) and self._at_control(last.prompt, len(whole)):
                earlier.append((index, len(before.prompt), len(whole), before.stop))
            else:
                outside.add(index)
        return Row(last, tuple(earlier), frozenset(outside), marks, dropped)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        thinking: bool | None,
        strip: bool,
    ) -> tuple[str, dict[str, str]]:
        """The generation prompt behind these turns, and the marks in it."""
        turns, marks = self.turns(messages, strip=strip)
        described = self.tools(tools, marks) if tools else []
        return self.apply(turns, described, prompts=True, thinking=thinking), marks

    def answer(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], thinking: str) -> Answer:
        """The last turn, which is the assistant's, as an answer behind its prompt."""
        last = turns[-1]
        reasoning = self._reasoning(last)
        mode = None if self.switch is None else bool(reasoning.strip()) or thinking == "empty"
        prompt = self.apply(turns[:-1], tools, prompts=True, thinking=mode)
        full = self.apply(turns, tools, prompts=False, thinking=mode)
        stop = self.stop_of_calls if last.get("tool_calls") else self.stop_of_answers
        learned = self._behind(prompt, full, turns, tools, reasoning, mode)
        if learned is None or not self._holds(learned, last):
            self.check_answers()
            return Answer(prompt, "", stop, mode)
        end = learned.rfind(stop) if stop else -1
        tail = self.tail_of_answers
        if end >= 0 and not learned[end + len(stop) :].strip():
            learned = learned[:end]
        elif tail and learned.endswith(tail) and not last.get("tool_calls"):  # text that is no token
            learned = learned[: -len(tail)]
        lost = bool(reasoning.strip()) and reasoning.strip() not in learned
        if lost and self.reasoning_key and last.get(self.reasoning_key):
            raise ConfigError(
                "model.template=tokenizer: the tokenizer's chat template does not render the reasoning of the last answer "
                f"({self.reasoning_key}); write it into the content of the turn, or type data.thinking=strip to learn the "
                "answers without it"
            )
        return Answer(prompt, learned, stop, mode, lost)

    def _reasoning(self, turn: Turn) -> str:
        return str(turn.get(self.reasoning_key or REASONING_KEYS[0]) or split_reasoning(turn["content"] or "")[0])

    def _behind(
        self,
        prompt: str,
        full: str,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]],
        reasoning: str,
        mode: bool | None,
    ) -> str | None:
        """What the template puts behind the prompt; None if it cannot be found."""
        if full.startswith(prompt):
            return full[len(prompt) :]
        opened = OPENED.search(prompt)
        base = prompt[: opened.start()] if opened else prompt
        if full.startswith(base):
            rest = full[len(base) :]
        else:
            without = self.apply(turns[:-1], tools, prompts=False, thinking=mode)
            tail = base[len(without) :] if base.startswith(without) else ""
            if not tail.strip():
                asked = (turns[-2].get("content") or "").strip() if len(turns) > 1 else ""
                tail = base[base.rfind(asked) + len(asked) :] if asked else ""
            place = full.rfind(tail) if tail.strip() else -1
            if place < 0 or full.count(tail) < base.count(tail):
                return None
            rest = full[place + len(tail) :]
        if not opened:
            return rest
        if rest.lstrip().startswith("</think>"):
            return rest.lstrip()
        answer = rest.lstrip("\n")
        thought = reasoning.strip("\n")
        if opened.group(2):  # the prompt ends in "<think>\n"
            return f"{thought}\n</think>\n\n{answer}"
        return f"\n{thought}</think>\n{answer}"

    def _holds(self, learned: str, turn: Turn) -> bool:
        """Whether what is learned has the answer in it."""
        calls = turn.get("tool_calls") or [] if self.renders_calls else []
        if calls:  # some templates leave out the text before a call
            return all(call["function"]["name"] in learned for call in calls)
        content = (turn["content"] or "").rpartition("</think>")[2].strip()
        return content in learned if content else bool(learned.replace(self.stop_of_answers, "").strip())

    def _at_control(self, text: str, position: int) -> bool:
        return self.any_literal is not None and self.any_literal.match(text, position) is not None


def _all_text(message: Message) -> str:
    calls = [(call.name, call.arguments) for call in getattr(message, "tool_calls", ())]
    return (
        f"{message.content}{getattr(message, 'reasoning', '')}{json.dumps(calls, ensure_ascii=False) if calls else ''}"
    )
