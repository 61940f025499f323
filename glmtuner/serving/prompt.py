"""From a request to the tokens of its conversation, and to how its answer begins and is read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.data.records import Message
from glmtuner.errors import GlmtunerError
from glmtuner.inference.finished import Finished
from glmtuner.serving.messages import AssistantMessage, NamedTool, ToolMessage, read_arguments
from glmtuner.serving.protocol import TOOLS_CODE, ApiError, ChatRequest
from glmtuner.templates.base import Template
from glmtuner.templates.tool_calls import END_THINK, Syntax, ToolCall, names_of_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ROLES = {"developer": "system"}  # the templates' names of the API's roles, where they differ
NAME = "§"  # a name of a function that stands nowhere else in a call
PROBE_ID = "call00001"  # Mistral's template wants nine characters
PROBES: tuple[dict[str, Any], ...] = ({}, {"a": "b"})  # arguments before which different tokens can stand behind a name


@dataclass(frozen=True)
class Prompt:
    """The tokens of a conversation. In the answer calls of `tools` are looked for if there is a `syntax`.

    The answer begins with one of `begins` if there are any, and ends behind its first call if it is not `parallel`.
    `call_ids` are those of earlier calls.
    """

    ids: list[int]
    syntax: Syntax | None = None
    tools: tuple[dict[str, Any], ...] = ()
    begins: tuple[tuple[int, ...], ...] = ()
    parallel: bool = True
    call_ids: frozenset[str] = frozenset()


def invalid(place: str, problem: str) -> ApiError:
    """The error for tools, calls and results that do not fit together."""
    return ApiError(400, f"'{place}': {problem}", TOOLS_CODE, place)


def turns_of(chat: ChatRequest) -> list[Message]:
    """The turns of a request, the results behind an answer in the order of its calls. Raises ApiError if one is missing."""
    turns: list[Message] = []
    open_calls: list[str] = []  # without a result yet
    place_of_calls = ""
    for number, message in enumerate(chat.messages):
        place = f"messages.{number}"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in open_calls:
                raise invalid(
                    f"{place}.tool_call_id",
                    "it should be the id of a call in the answer right before it that has no result yet",
                )
            open_calls.remove(message.tool_call_id)
            turns.append(Message("tool", message.text, call_id=message.tool_call_id))
            continue
        if open_calls:
            raise _without_result(place_of_calls, open_calls)
        if isinstance(message, AssistantMessage):
            calls = tuple(
                ToolCall(call.function.name, read_arguments(call.function.arguments), call.id)
                for call in message.tool_calls or ()
            )
            open_calls = [call.id for call in calls]
            if len({*open_calls}) < len(open_calls):
                raise invalid(f"{place}.tool_calls", "each call should have an id of its own")
            place_of_calls = f"{place}.tool_calls"
            turns.append(
                Message("assistant", message.text, reasoning=message.reasoning_content or "", tool_calls=calls)
            )
        else:
            turns.append(Message(TEMPLATE_ROLES.get(message.role, message.role), message.text))
    if open_calls:
        raise _without_result(place_of_calls, open_calls)
    return _in_order_of_calls(turns)


def _without_result(place: str, ids: Sequence[str]) -> ApiError:
    return invalid(
        place, f"a message of the role 'tool' with the result of each call should follow; {ids[0][:100]!r} has none"
    )


def _in_order_of_calls(turns: list[Message]) -> list[Message]:
    """The turns with the results behind each answer in the order of its calls, as they were learned."""
    ordered: list[Message] = []
    for turn in turns:
        if turn.role == "tool":
            calls = next(each for each in reversed(ordered) if each.role == "assistant").tool_calls
            place = {call.id: number for number, call in enumerate(calls)}
            at = len(ordered)
            while ordered[at - 1].role == "tool" and place[ordered[at - 1].call_id] > place[turn.call_id]:
                at -= 1
            ordered.insert(at, turn)
        else:
            ordered.append(turn)
    return ordered


def tools_of(chat: ChatRequest) -> tuple[dict[str, Any], ...]:
    """The tools that the model is shown: none if it is not to call any. Raises ApiError if they do not fit the choice."""
    tools = tuple(tool.described for tool in chat.tools or ())
    names = names_of_tools(tools)
    twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise invalid(f"tools.{twice}.function.name", "another function has this name")
    if isinstance(chat.tool_choice, NamedTool) and chat.tool_choice.function.name not in names:
        raise invalid("tool_choice.function.name", "legal are the names of the functions in 'tools'")
    if chat.tool_choice == "required" and not tools:
        raise invalid("tool_choice", "'required' needs functions in 'tools'")
    return () if chat.tool_choice == "none" else tools


def length_of(turns: Sequence[Message], tools: Sequence[dict[str, Any]]) -> int:
    """How many characters the turns and the tools have."""
    said = sum(len(turn.content) + len(turn.reasoning) for turn in turns)
    called = sum(len(call.name) + len(call.arguments_json) for turn in turns for call in turn.tool_calls)
    return said + called + (len(json.dumps(tools, ensure_ascii=False)) if tools else 0)


def prompt_of(chat: ChatRequest, turns: list[Message], tools: tuple[dict[str, Any], ...], finished: Finished) -> Prompt:
    """The tokens of a conversation as they were trained. Raises ApiError for what the model's chat template cannot render."""
    template, tokenizer = finished.template, finished.tokenizer
    if turns[-1].role == "assistant":
        turns = [*turns, Message("user", "")]  # templates begin an answer after a turn of the user
    syntax = template.syntax(tokenizer)
    _check_rendered(turns, tools, template, tokenizer, syntax)
    asks_thinking = chat.chat_template_kwargs.enable_thinking if chat.chat_template_kwargs else None
    if asks_thinking is not None and not template.has_modes(tokenizer):
        raise ApiError(
            400, "'chat_template_kwargs.enable_thinking': this model's chat template has no modes with and without thinking; "
            "leave it out", None, "chat_template_kwargs.enable_thinking",
        )  # fmt: skip
    is_named = isinstance(chat.tool_choice, NamedTool)
    parallel = chat.parallel_tool_calls is not False and not is_named
    call_ids = frozenset(call.id for turn in turns for call in turn.tool_calls)
    try:
        if syntax is not None and tools and (is_named or chat.tool_choice == "required"):
            names = (
                [chat.tool_choice.function.name] if isinstance(chat.tool_choice, NamedTool) else names_of_tools(tools)
            )
            if asks_thinking:
                template = template.always_thinking()
            ids, begins = _beginning_with_call(template, tokenizer, syntax, turns, tools, names)
        else:
            if asks_thinking is not None:
                template = template.asking(asks_thinking)
            (encoded,) = template.encode(tokenizer, [turns], [tools] if tools else ())
            ids, begins = list(encoded.input_ids), ()
    except GlmtunerError as error:  # a jinja template that rejects the order of the turns
        raise ApiError(400, str(error), None, "messages") from None
    # a model that learned calls behind prompts without descriptions (DeepSeek-R1's template has none) needs none to call
    may_call = bool(tools) or (chat.tool_choice != "none" and not template.renders_tools(tokenizer))
    return Prompt(ids, syntax if may_call else None, tools, begins, parallel, call_ids)


def _check_rendered(
    turns: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    syntax: Syntax | None,
) -> None:
    """Raises ApiError for tools, calls or thoughts that the template leaves out."""
    named = f"this model's chat template (model.template={template.name})"
    if tools and not template.renders_tools(tokenizer):
        raise ApiError(
            400, f"'tools': {named} renders no descriptions of tools, so the model cannot see them; leave them out",
            "unsupported_value", "tools",
        )  # fmt: skip
    if any(turn.tool_calls or turn.role == "tool" for turn in turns) and not template.renders_calls(tokenizer):
        raise ApiError(
            400, f"'messages': {named} renders no calls of tools and no results; leave them out",
            "unsupported_value", "messages",
        )  # fmt: skip
    if tools and syntax is None:
        raise ApiError(
            400, f"'tools': {named} writes tool calls in a syntax that this server cannot read; leave them out, or send "
            "tool_choice='none'", "unsupported_value", "tools",
        )  # fmt: skip
    if not template.renders_reasoning and any(turn.reasoning.strip() for turn in turns):
        raise ApiError(
            400, f"'messages': {named} renders no reasoning of earlier answers; leave 'reasoning_content' out",
            "unsupported_value", "messages",
        )  # fmt: skip


def _beginning_with_call(
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    syntax: Syntax,
    turns: list[Message],
    tools: tuple[dict[str, Any], ...],
    names: Sequence[str],
) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """The prompt behind which a call without a thought was learned, and the tokens with which calls of these functions begin."""
    calls = [ToolCall(name, arguments, PROBE_ID) for name in names for arguments in PROBES]
    answers = [Message("assistant", "", tool_calls=(call,)) for call in calls]
    (whole,) = template.encode(tokenizer, [[*turns, answers[0]]], [tools])
    asked = Message("user", "a")
    short = template.encode(tokenizer, [[asked, answer] for answer in answers])
    begins = []
    for call, encoded in zip(calls, short, strict=True):
        start, end = encoded.answers[-1] if encoded.answers else (0, 0)
        head = _head_of_call(tokenizer, list(encoded.input_ids[start:end]), syntax, call)
        if head is None or whole.unrendered or not whole.answers:
            raise ApiError(
                400, f"'tool_choice': this model's chat template (model.template={template.name}) does not show where a call "
                "begins; send 'auto'", "unsupported_value", "tool_choice",
            )  # fmt: skip
        begins.append(head)
    return list(whole.input_ids[: whole.answers[-1][0]]), tuple(dict.fromkeys(begins))


def _head_of_call(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], syntax: Syntax, call: ToolCall
) -> tuple[int, ...] | None:
    """The first of an answer's tokens, up to the one behind the function's name; None if the name is not there."""
    text = _decoded(tokenizer, ids)
    # what the syntax writes before the name
    lead = syntax.write("", [ToolCall(NAME, call.arguments, call.id)]).partition(NAME)[0].strip()
    place = text.find(lead, text.rfind(END_THINK) + 1)
    name = text.find(call.name, place + len(lead)) if place >= 0 else -1
    if name < 0:
        return None
    wanted = text[: name + len(call.name) + 1]
    length = next(length for length in range(1, len(ids) + 1) if _decoded(tokenizer, ids[:length]).startswith(wanted))
    return tuple(ids[:length])


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)  # of one sequence
    return text
