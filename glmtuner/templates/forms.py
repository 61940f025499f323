"""The form in which a chat template reads tools, calls of them and their results.

Turns are kept in OpenAI's form. Templates of GLM-4 and GLM-Z1 read calls as turns of their own (`metadata` is the function's
name, the content its arguments), results as turns of the role `observation`, and GLM-4's tools beside the content of a turn.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]
SHORT_ID = re.compile("[a-zA-Z0-9]{9}")  # of a call, as Mistral's templates insist


@dataclass(frozen=True)
class Form:
    """OpenAI's form, unless a field says otherwise."""

    calls_are_turns: bool = False  # by the key `metadata`
    content_is_none: bool = False  # beside calls
    arguments_are_text: bool = False
    role_of_results: str = "tool"
    tools_in_turn: bool = False  # in that of the system
    short_ids: bool = False  # of calls: others than SHORT_ID are replaced, in their order, by call00001 and so on

    def turns(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Any]]:
        """The turns in this form, and the tools that are given to the template beside them."""
        if self == OPENAI:
            return list(turns), list(tools)
        formed: list[Turn] = []
        for turn in with_short_ids(turns) if self.short_ids else turns:
            if turn["role"] == "tool":
                formed.append({**turn, "role": self.role_of_results})
            elif turn.get("tool_calls"):
                formed += self._called(turn)
            else:
                formed.append(turn)
        if not tools or not self.tools_in_turn:
            return formed, list(tools)
        first = formed[0] if formed and formed[0]["role"] == "system" else {"role": "system", "content": ""}
        return [{**first, "tools": list(tools)}, *(formed[1:] if formed and formed[0] is first else formed)], []

    def _called(self, turn: Turn) -> list[Turn]:
        functions = [call["function"] for call in turn["tool_calls"]]
        if self.calls_are_turns:
            text = {key: value for key, value in turn.items() if key != "tool_calls"}
            calls = [
                {"role": "assistant", "metadata": function["name"], "content": as_json(function["arguments"])}
                for function in functions
            ]
            return [*([text] if turn["content"] else []), *calls]
        calls = [
            {**call, "function": {**function, "arguments": as_json(function["arguments"])}}
            if self.arguments_are_text
            else call
            for call, function in zip(turn["tool_calls"], functions, strict=True)
        ]
        return [{**turn, "tool_calls": calls, **({"content": None} if self.content_is_none else {})}]


def with_short_ids(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, their calls and the results of these with ids that Mistral's templates take."""
    given = [str(call.get("id", "")) for turn in turns for call in turn.get("tool_calls") or ()]
    free = (name for number in range(1, 10**5) if (name := f"call{number:05}") not in given)
    names = {
        call_id: call_id if SHORT_ID.fullmatch(call_id) else next(free) for call_id in dict.fromkeys(given) if call_id
    }
    short: list[Turn] = []
    for turn in turns:
        if turn.get("tool_calls"):
            calls = [{**call, "id": names.get(str(call.get("id", ""))) or next(free)} for call in turn["tool_calls"]]
            turn = {**turn, "tool_calls": calls}
        elif "tool_call_id" in turn:
            turn = {**turn, "tool_call_id": names.get(turn["tool_call_id"], turn["tool_call_id"])}
        short.append(turn)
    return short


def as_json(arguments: Any) -> str:
    """The arguments of a call as their JSON; text stays as it is."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


OPENAI = Form()
FORMS = (
    OPENAI,
    Form(arguments_are_text=True),
    Form(content_is_none=True),
    Form(content_is_none=True, arguments_are_text=True),
    Form(calls_are_turns=True),
)
