"""Tool calls as the families of models write them: one `Syntax` each, which writes calls and finds them in an answer.

A text that looks like a call and is none stays text: nothing here raises for what a model writes. `answers.py` reads an answer
piece by piece while it is generated.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from glmtuner.errors import UnknownName


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `id` names it for its result and is "" where the model writes none."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON, with Chinese unescaped, as `tojson` of transformers writes them."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def as_openai(self) -> dict[str, Any]:
        """The call as chat templates read it: in OpenAI's form, the arguments an object."""
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"id": self.id, **call} if self.id else call


Tools = Sequence[Mapping[str, Any]]  # descriptions of functions, bare or in OpenAI's form
Calls = list[ToolCall]
CALL = "<|assistant|>"  # stands between the text of an answer and its calls, and between calls, in GLM-4 and ChatGLM3
THINK, END_THINK = "<think>", "</think>"
ONE_NAME = re.compile(r"[A-Za-z_][\w.-]{0,127}")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which no answer of a server can hold


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls.

    `write` makes the text of an answer from its text and its calls, as the official template puts it behind the prompt.
    `read` returns the calls of a text that is nothing but calls, or None.
    `opening` and `closing` enclose what `read` takes. Without `opening` an answer is a call or begins with its text.
    """

    name: str
    write: Callable[[str, Sequence[ToolCall]], str]
    read: Callable[[str, Tools], Calls | None]
    opening: str = ""
    closing: str = ""  # "" where the end of the answer closes the calls
    may_end_open: bool = False  # are calls read at the end of an answer although `closing` is missing?
    leading: str = ""  # what the template writes before the text of an answer
    separator: str = ""  # without `opening`: what stands between text and calls
    parallel: bool = True  # can one answer hold several calls?


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The bare description of a function: its name, description and parameters."""
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def names_of_tools(tools: Tools) -> list[str]:
    """The names of the functions."""
    return [str(function_of(tool).get("name", "")) for tool in tools]


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a text is the JSON of; None if it is none, or holds what JSON has not, such as NaN."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and is_writable(value) else None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def is_writable(value: Any) -> bool:
    """Whether JSON in UTF-8 can hold the value."""
    try:
        return not SURROGATE.search(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def named_call(value: Any, keys: Sequence[str]) -> ToolCall | None:
    """The call of an object that has a name and, under one of the keys, arguments: an object, its JSON, or nothing."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        return None
    given = [key for key in keys if key in value]
    arguments = value[given[0]] if len(given) == 1 else None
    if isinstance(arguments, str):
        arguments = json_object(arguments) if arguments.strip() else {}
    call_id = value.get("id")
    if not isinstance(arguments, dict) or not is_writable([value["name"], arguments]):
        return None
    return ToolCall(
        value["name"], arguments, call_id if isinstance(call_id, str) and not SURROGATE.search(call_id) else ""
    )


def _values(text: str, separators: str) -> list[Any] | None:
    """The JSON values that a text consists of, with nothing but these characters and white space between them."""
    decoder, values, position = json.JSONDecoder(parse_constant=_no_constant), [], 0
    skipped = re.compile(rf"[\s{re.escape(separators)}]*")
    while (match := skipped.match(text, position)) and match.end() < len(text):
        try:
            value, position = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return None
        values.append(value)
    return values


def _all_calls(values: Sequence[Any] | None, keys: Sequence[str]) -> Calls | None:
    """The calls of objects; None if there is none, or one of the objects is not a call."""
    calls = [named_call(value, keys) for value in values or ()]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


# GLM-4 and GLM-4-0414: `<|assistant|>get_weather\n{"city": "北京"}`, an answer in text `<|assistant|>\n…`


def _write_glm4(content: str, calls: Sequence[ToolCall]) -> str:
    text = [f"\n{content}"] if content or not calls else []
    return CALL.join([*text, *(f"{call.name}\n{call.arguments_json}" for call in calls)])


def _read_glm4(text: str, tools: Tools) -> Calls | None:
    """Calls one behind the other, whether or not the token between them is in the text."""
    known, calls, rest = names_of_tools(tools), [], text
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    while rest.strip():
        name, line_break, rest = rest.removeprefix(CALL).partition("\n")
        name, rest = name.strip(), rest.lstrip()
        if not line_break or (name not in known if known else not ONE_NAME.fullmatch(name)):
            return None
        if not rest.startswith("{"):
            return None
        try:
            arguments, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        if not is_writable(arguments):
            return None
        calls.append(ToolCall(name, arguments))
        rest = rest[end:].lstrip()
    return calls or None


# ChatGLM3: `<|assistant|>get_weather\n```python\ntool_call(city='北京')\n````, from its finetune_demo/preprocess_utils.py

FENCED = re.compile(r"\s*(?:```(?:python)?\s*)?tool_call\((?P<arguments>.*)\)\s*(?:```)?\s*", re.DOTALL)
KEYWORD = re.compile(r"\s*([^\s=,'\"(){}\[\]*]+)\s*=(?!=)")


def _write_chatglm3(content: str, calls: Sequence[ToolCall]) -> str:
    text = [f"\n{content}"] if content or not calls else []
    return CALL.join([*text, *(f"{call.name}\n```python\n{python_call(call)}\n```" for call in calls)])


def python_call(call: ToolCall) -> str:
    """The call as Python code: `tool_call(city='北京', days=2)`; names that no keyword can be stand in `**{…}`."""
    plain = {key: value for key, value in call.arguments.items() if KEYWORD.fullmatch(f"{key}=")}
    others = {key: value for key, value in call.arguments.items() if key not in plain}
    parts = [f"{key}={value!r}" for key, value in plain.items()]
    return f"tool_call({', '.join([*parts, *([f'**{others!r}'] if others else [])])})"


def _read_chatglm3(text: str, tools: Tools) -> Calls | None:
    calls: Calls = []
    for part in text.split(CALL):
        name, line_break, body = part.partition("\n")
        match = FENCED.fullmatch(body) if line_break else None
        if match is None:
            if (others := _read_glm4(part, tools)) is None:
                return None
            calls += others
            continue
        arguments = _keyword_arguments(match["arguments"])
        name, known = name.strip(), names_of_tools(tools)
        if arguments is None or (name not in known if known else not ONE_NAME.fullmatch(name)):
            return None
        calls.append(ToolCall(name, arguments))
    return calls or None


def _keyword_arguments(code: str) -> dict[str, Any] | None:
    """The arguments of a Python call whose values are literals; also those that are named like a Python keyword (`from`)."""
    arguments: dict[str, Any] = {}
    for part in _split_at_commas(code):
        try:
            if part.lstrip().startswith("**"):
                given = ast.literal_eval(part.strip()[2:])
            elif match := KEYWORD.match(part):
                given = {match[1]: ast.literal_eval(part[match.end() :].strip())}
            else:
                return None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            return None
        arguments |= given
    # a set, bytes, a complex number, or inf are no JSON; tuples are lists
    return json_object(json.dumps(arguments)) if is_writable(arguments) else None


def _split_at_commas(code: str) -> list[str]:
    """The parts between the commas that stand outside of quotes and brackets."""
    parts, start, depth, quote, position = [], 0, 0, "", 0
    while position < len(code):
        character = code[position]
        if quote:
            position += character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(code[start:position])
            start = position + 1
        position += 1
    return [*parts, code[start:]] if code[start:].strip() else parts


# GLM-4.5 and later: `<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call>`;
# 4.7 and 5 without line breaks. Strings stand as they are, all else as JSON, so that reading needs the types.

ARGUMENT = re.compile(r"\s*<arg_key>([^<>]*)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*(?=<arg_key>|\Z)", re.DOTALL)


def _write_glm_tags(content: str, calls: Sequence[ToolCall], line_break: str) -> str:
    text = f"{line_break}{content.strip()}" if content.strip() else ""
    for call in calls:
        text += f"{line_break}<tool_call>{call.name}{line_break}"
        for key, value in call.arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += f"<arg_key>{key}</arg_key>{line_break}<arg_value>{shown}</arg_value>{line_break}"
        text += "</tool_call>"
    return text


def _read_glm_tags(text: str, tools: Tools) -> Calls | None:
    name = text.partition("<arg_key>")[0]
    position, name = len(name), name.strip()
    if not name or re.search(r"[\s<>{}]", name):
        return None
    properties = next((_properties(tool) for tool in tools if function_of(tool).get("name") == name), {})
    arguments: dict[str, Any] = {}
    while position < len(text):
        if (match := ARGUMENT.match(text, position)) is None:
            return None
        key, value = match.groups()
        arguments[key.strip()] = _typed(value, properties.get(key.strip()))
        position = match.end()
    return [ToolCall(name, arguments)] if is_writable([name, arguments]) else None


def _properties(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function_of(tool).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _typed(text: str, schema: Any) -> Any:
    """The value of an argument: what the text is the JSON of, if its type may be other than string, else the text itself."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str) or not is_writable(value):  # official templates write no quotes around a string
        return text
    return text if "string" in types and not _json_types(value) & types else value


def _json_types(value: Any) -> set[str]:
    """The names of the types of JSON schema that a value has; "other" stands for all but string in an enumeration."""
    if isinstance(value, bool) or value is None:
        return {"boolean" if value is not None else "null", "other"}
    if isinstance(value, int):
        return {"integer", "number", "other"}
    return {"number" if isinstance(value, float) else "array" if isinstance(value, list) else "object", "other"}


def _types(schema: Any) -> set[str]:
    """The types that a JSON schema names."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {each for each in named or () if isinstance(each, str)}
    if "enum" in schema and not types and isinstance(schema["enum"], list):
        types = {"string" if isinstance(each, str) else "other" for each in schema["enum"]}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            types = types.union(*(_types(each) for each in schema[key]))
    return types


# Qwen, and others that follow Hermes: `<tool_call>\n{"name": "get_weather", "arguments": {…}}\n</tool_call>`


def _write_hermes(content: str, calls: Sequence[ToolCall]) -> str:
    texts = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments_json}}}\n</tool_call>' for call in calls
    ]
    return "\n".join([*([content] if content else []), *texts])


def _read_hermes(text: str, tools: Tools) -> Calls | None:
    value = json_object(text)
    return None if value is None else _all_calls([value], ("arguments", "parameters"))


# Llama 3.1: the answer is `{"name": "get_weather", "parameters": {…}}`, with or without <|python_tag|> before it


def _write_llama3(content: str, calls: Sequence[ToolCall]) -> str:
    assert len(calls) < 2, "Llama 3.1 calls one function at a time"
    return "".join(f'{{"name": "{call.name}", "parameters": {call.arguments_json}}}' for call in calls) or content


def _read_llama3(text: str, tools: Tools) -> Calls | None:
    calls = _all_calls(_values(text.strip().removeprefix("<|python_tag|>"), ";"), ("parameters", "arguments"))
    known = names_of_tools(tools)
    return calls if calls and all(not known or call.name in known for call in calls) else None


# Mistral: `[TOOL_CALLS] [{"name": "get_weather", "arguments": {…}, "id": "123456789"}]`; Nemo without the space


def _write_mistral(content: str, calls: Sequence[ToolCall], space: str) -> str:
    if not calls:
        return f"{space}{content.strip()}" if space else content
    ids = [f', "id": {json.dumps(call.id)}' if call.id else "" for call in calls]
    texts = [
        f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments_json}{call_id}}}'
        for call, call_id in zip(calls, ids, strict=True)
    ]
    return f"[TOOL_CALLS]{space}[{', '.join(texts)}]"


def _read_mistral(text: str, tools: Tools) -> Calls | None:
    values = _values(text, "")
    listed = values[0] if values is not None and len(values) == 1 else None
    return _all_calls(listed, ("arguments",)) if isinstance(listed, list) else None


# DeepSeek-R1: fenced JSON between markers; its template closes the group only behind a second call

DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>[^<]*<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```\s*<｜tool▁call▁end｜>\s*", re.DOTALL
)


def _write_deepseek(content: str, calls: Sequence[ToolCall]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.arguments_json}\n```<｜tool▁call▁end｜>"
        for call in calls
    ]
    closing = "<｜tool▁calls▁end｜>" if len(calls) > 1 else ""
    return f"{content}<｜tool▁calls▁begin｜>{chr(10).join(texts)}{closing}" if calls else content


def _read_deepseek(text: str, tools: Tools) -> Calls | None:
    calls: Calls = []
    position = 0
    while position < len(text):
        match = DEEPSEEK_CALL.match(text, position)
        arguments = json_object(match[2]) if match else None
        if match is None or arguments is None:
            return None
        calls.append(ToolCall(match[1].strip(), arguments))
        position = match.end()
    return calls or None


SYNTAXES = {
    syntax.name: syntax
    for syntax in (
        Syntax("glm4", _write_glm4, _read_glm4, leading="\n", separator=CALL),
        Syntax("chatglm3", _write_chatglm3, _read_chatglm3, leading="\n", separator=CALL),
        Syntax(
            "glm4.5",
            partial(_write_glm_tags, line_break="\n"),
            _read_glm_tags,
            "<tool_call>",
            "</tool_call>",
            leading="\n",
        ),
        Syntax("glm4.7", partial(_write_glm_tags, line_break=""), _read_glm_tags, "<tool_call>", "</tool_call>"),
        Syntax("hermes", _write_hermes, _read_hermes, "<tool_call>", "</tool_call>"),
        Syntax("llama3", _write_llama3, _read_llama3, parallel=False),
        Syntax(
            "mistral", partial(_write_mistral, space=" "), _read_mistral, "[TOOL_CALLS]", may_end_open=True, leading=" "
        ),
        Syntax("mistral_nemo", partial(_write_mistral, space=""), _read_mistral, "[TOOL_CALLS]", may_end_open=True),
        Syntax(
            "deepseek",
            _write_deepseek,
            _read_deepseek,
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            may_end_open=True,
        ),
    )
}


def syntax(name: str) -> Syntax:
    """The syntax of this name; raises UnknownName."""
    if name not in SYNTAXES:
        raise UnknownName("syntax of tool calls", name, list(SYNTAXES), add_one="glmtuner/templates/tool_calls.py")
    return SYNTAXES[name]
