"""Turns that describe tools, as the makers of ChatGLM3, GLM-4 and GLM-4-0414 write them.

Of GLM-4 the chat template (jinja) and the tokenizer's Python code differ: the template has the heading before the functions
and one line break less behind it. We follow the template, with which others serve the model, and of its two versions the one
that names the model GLM-4, as the Python code does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmtuner.errors import ConfigError
from glmtuner.templates.tool_calls import Tools, function_of

CHATGLM3 = "Answer the following questions as best as you can. You have access to the following tools:"
GLM4 = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n"
)
HEADING = "# 可用工具"
USE_JSON = "在调用上述函数时，请使用 Json 格式表示调用的参数。"


@dataclass(frozen=True)
class ToolPrompt:
    """How functions are described in a turn of the system, which stands before all others.

    `begins` is its text before the functions and `between` what stands before each of them. With `in_system_text` they stand
    as a list, as JSON, behind the conversation's own system text; `begins` is that of a conversation that has none.
    """

    begins: str
    between: str = ""
    in_system_text: bool = False

    def text(self, tools: Tools, system: str = "") -> str:
        """The text of the turn; raises ConfigError for tools that are no functions."""
        functions = [_checked(tool) for tool in tools]
        if self.in_system_text:
            return with_tools(system or self.begins, functions)
        described = [
            f"{self.between}## {function['name']}\n\n{_as_json(function)}\n{USE_JSON}" for function in functions
        ]
        return self.begins + "".join(described)

    def jinja(self, space: str) -> str:
        """What writes the turn in a chat template; `space` is what text behind a line break begins with."""
        in_turn = (
            "{% if not tools and messages and messages[0]['tools'] %}{% set tools = messages[0]['tools'] %}{% endif %}"
        )
        function = "{% set function = tool.function if tool.function is defined else tool %}"
        if self.in_system_text:
            return in_turn + (
                "{% set own = messages and messages[0]['role'] == 'system' %}{% if tools %}{% set listed = namespace(items=[]) %}"
                f"{{% for tool in tools %}}{function}{{% set listed.items = listed.items + [function] %}}{{% endfor %}}"
                f"{{{{ '<|system|>\\n{space}' ~ (messages[0]['content'] if own and messages[0]['content'] else '{self.begins}') "
                "~ '\\n' ~ (listed.items | tojson(indent=4)) }}{% endif %}"
                "{% set messages = messages[1:] if tools and own else messages %}"
            )
        begins, between = (text.replace("\n", "\\n") for text in (self.begins, self.between))
        return in_turn + (
            f"{{% if tools %}}{{{{ '<|system|>\\n{space}{begins}' }}}}{{% for tool in tools %}}{function}"
            f"{{{{ '{between}## ' ~ function.name ~ '\\n\\n' ~ (function | tojson(indent=4)) ~ '\\n{USE_JSON}' }}}}"
            "{% endfor %}{% endif %}"
        )


TOOL_PROMPTS = {
    "chatglm3": ToolPrompt(CHATGLM3, in_system_text=True),
    "glm4": ToolPrompt(GLM4 + HEADING, "\n"),
    "glm4_0414": ToolPrompt(HEADING, "\n\n"),
}


def with_tools(system: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that describes the tools to ChatGLM3."""
    return f"{system}\n{_as_json(list(tools))}"


def _checked(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = function_of(tool)
    if not function.get("name"):
        raise ConfigError(
            f"model.template: a tool without a name ({str(tool)[:60]}); our templates describe functions, each with name, "
            "description and parameters; type model.template=tokenizer for what else the tokenizer's chat template describes"
        )
    return function


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False)
