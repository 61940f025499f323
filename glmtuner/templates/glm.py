"""The templates of ChatGLM and GLM, and the plain one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from glmtuner.templates.base import TEMPLATES, Message, Piece, Template


@dataclass(frozen=True)
class RoleTokens(Template):
    """`<|user|>` and its like before each turn (ChatGLM3, GLM-4).

    `apart`: ChatGLM3 tokenizes the line break behind a role apart from the text, and writes it itself when it answers.
    """

    name: str
    stop: str
    prefix: tuple[str, ...]
    apart: bool = False

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        for message in messages:
            yield Piece(f"<|{message.role}|>", "control")
            answers = message.role == "assistant"
            if answers or self.apart:
                yield Piece("\n", "answer" if answers and self.apart else "text")
                yield Piece(message.content, "answer" if answers else "text")
            else:
                yield Piece(f"\n{message.content}", "text")
        if messages[-1].role != "assistant":
            yield Piece("<|assistant|>", "control")
            if not self.apart:
                yield Piece("\n", "text")

    def jinja(self) -> str:
        # ChatGLM3's text is tokenized apart from the line break, which is to say behind a space
        text, asks = (" ", "") if self.apart else ("", "\\n")
        return (
            "[gMASK]<sop>{% for message in messages %}"
            f"{{{{ '<|' ~ message['role'] ~ '|>\\n{text}' ~ message['content'] }}}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>{asks}' }}}}{{% endif %}}"
        )


@dataclass(frozen=True)
class Rounds(Template):
    """Numbered rounds of question and answer, as plain text (ChatGLM2, and ChatGLM-6B as CET trains it).

    The prompt, earlier answers and all, is one text, tokenized as one: so it is when these models chat. Only the last
    answer is a text of its own, and only it can be learned; in ChatGLM-6B every earlier one is also seen in both directions.
    """

    name: str
    stop: str
    prefix: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()  # control tokens between the prompt and the answer
    one_answer_a_row: ClassVar[bool] = True

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        answered = messages[-1].role == "assistant"
        text, number = "", 0
        for message in messages[:-1] if answered else messages:
            if message.role == "user":
                number += 1
                text += f"[Round {number}]\n\n问：{message.content}\n\n答："
            else:
                text += f"{message.content}\n\n"
        yield Piece(text, "text")
        yield from (Piece(token, "control") for token in self.behind)
        if answered:
            yield Piece(messages[-1].content, "answer")

    def jinja(self) -> str | None:
        if self.behind:
            return None  # ChatGLM-6B's tokenizer reads no [gMASK] in text
        return (
            "[gMASK]<sop>{% set rounds = namespace(count=0) %}{% for message in messages %}"
            "{% if message['role'] == 'user' %}{% set rounds.count = rounds.count + 1 %}"
            "{{ '[Round ' ~ rounds.count ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}"
            "{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}{% endfor %}"
        )


@dataclass(frozen=True)
class Plain(Template):
    """Words instead of control tokens, for base models that have no chat template."""

    name: str = "plain"
    asks_tokenizer: ClassVar[bool] = True  # how it begins a document
    stop: str = "eos"  # whatever the tokenizer calls it
    prefix: tuple[str, ...] = ()
    words: dict[str, str] = field(
        default_factory=lambda: {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}
    )

    def turns(self, messages: Sequence[Message]) -> Iterable[Piece]:
        text = ""
        for message in messages:
            text += self.words[message.role]
            if message.role == "assistant":
                yield Piece(text, "text")
                yield Piece(f" {message.content}", "answer")
                text = "\n\n"
            else:
                text += f"{message.content}\n\n"
        if messages[-1].role != "assistant":
            yield Piece(text + self.words["assistant"], "text")


for _template in (
    RoleTokens(name="glm4", stop="<|user|>", prefix=("[gMASK]", "<sop>")),
    RoleTokens(name="chatglm3", stop="</s>", prefix=("[gMASK]", "sop"), apart=True),
    Rounds(name="chatglm2", stop="</s>", prefix=("[gMASK]", "sop")),
    Rounds(name="chatglm", stop="<eop>", behind=("[gMASK]", "<sop>")),
    Plain(),
):
    TEMPLATES[_template.name] = _template


def with_tools(system: str, tools: Sequence[dict[str, Any]]) -> str:
    """The system turn with which ChatGLM3 is told of tools."""
    return f"{system}\n{json.dumps(list(tools), indent=4, ensure_ascii=False)}"
