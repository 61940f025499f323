"""The templates of ChatGLM and GLM, and the plain one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from glmtuner.templates.base import TEMPLATES, Message, Piece, Template, Turn, control


@dataclass(frozen=True)
class RoleTokens(Template):
    """A role token such as `<|user|>` before each turn (ChatGLM3, GLM-4).

    `separate_newline`: ChatGLM3 tokenizes the line break after a role separately from the text, and generates it itself.
    """

    name: str
    stop: str
    prefix: tuple[str, ...]
    separate_newline: bool = False

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        for message in messages:
            yield control(f"<|{message.role}|>")
            is_answer = message.role == "assistant"
            if is_answer or self.separate_newline:
                yield Piece("\n", "answer" if is_answer and self.separate_newline else "text")
                yield Piece(message.content, "answer" if is_answer else "text")
            else:
                yield Piece(f"\n{message.content}", "text")
        if messages[-1].role != "assistant":
            yield control("<|assistant|>")
            if not self.separate_newline:
                yield Piece("\n", "text")

    def jinja(self) -> str:
        # text tokenized separately from the line break (ChatGLM3) has the tokens of text after a space
        space, answer_start = (" ", "") if self.separate_newline else ("", "\\n")
        return (
            "[gMASK]<sop>{% for message in messages %}"
            f"{{{{ '<|' ~ message['role'] ~ '|>\\n{space}' ~ message['content'] }}}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>{answer_start}' }}}}{{% endif %}}"
        )


@dataclass(frozen=True)
class Rounds(Template):
    """Numbered rounds of question and answer, as plain text (ChatGLM2, and ChatGLM-6B as CET trains it).

    The prompt, earlier answers included, is tokenized as one text, as it is when these models chat. Only the last answer is
    tokenized separately, so only it can be learned; ChatGLM-6B also attends to the earlier ones in both directions.
    """

    name: str
    stop: str
    prefix: tuple[str, ...] = ()
    answer_prefix: tuple[str, ...] = ()
    one_answer_a_row: ClassVar[bool] = True

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        has_answer = messages[-1].role == "assistant"
        text, number = "", 0
        for message in messages[:-1] if has_answer else messages:
            if message.role == "prefix":
                text += message.content
            elif message.role == "user":
                number += 1
                text += f"[Round {number}]\n\n问：{message.content}\n\n答："
            else:
                text += f"{message.content}\n\n"
        yield Piece(text, "text")
        yield from map(control, self.answer_prefix)
        if has_answer:
            yield Piece(messages[-1].content, "answer")

    def prefixed(self, messages: Sequence[Message], prefix: str) -> list[Message]:
        """The turns with the prefix before the whole prompt, as in ChatGLM-Efficient-Tuning: `<prefix>[Round 1]…`."""
        return [Turn("prefix", prefix), *messages]

    def jinja(self) -> str | None:
        if self.answer_prefix:
            return None  # ChatGLM-6B's tokenizer does not match [gMASK] in text
        return (
            "[gMASK]<sop>{% set rounds = namespace(count=0) %}{% for message in messages %}"
            "{% if message['role'] == 'user' %}{% set rounds.count = rounds.count + 1 %}"
            "{{ '[Round ' ~ rounds.count ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}"
            "{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}{% endfor %}"
        )


@dataclass(frozen=True)
class Plain(Template):
    """Role names in plain text instead of control tokens, for base models without a chat template."""

    name: str = "plain"
    calls_tokenizer: ClassVar[bool] = True  # to learn how it begins a document
    stop: str = "eos"  # the tokenizer's end-of-sequence token
    prefix: tuple[str, ...] = ()
    role_labels: dict[str, str] = field(
        default_factory=lambda: {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}
    )

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        text = ""
        for message in messages:
            text += self.role_labels[message.role]
            if message.role == "assistant":
                yield Piece(text, "text")
                yield Piece(f" {message.content}", "answer")
                text = "\n\n"
            else:
                text += f"{message.content}\n\n"
        if messages[-1].role != "assistant":
            yield Piece(text + self.role_labels["assistant"], "text")


for _template in (
    RoleTokens(name="glm4", stop="<|user|>", prefix=("[gMASK]", "<sop>")),
    RoleTokens(name="chatglm3", stop="</s>", prefix=("[gMASK]", "sop"), separate_newline=True),
    Rounds(name="chatglm2", stop="</s>", prefix=("[gMASK]", "sop")),
    Rounds(name="chatglm", stop="<eop>", answer_prefix=("[gMASK]", "<sop>")),
    Plain(),
):
    TEMPLATES[_template.name] = _template


def with_tools(system: str, tools: Sequence[dict[str, Any]]) -> str:
    """The system turn that describes the tools to ChatGLM3."""
    return f"{system}\n{json.dumps(list(tools), indent=4, ensure_ascii=False)}"
