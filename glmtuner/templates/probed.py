"""A Jinja template with the special tokens of one tokenizer, and what rendering probes tells of it.

Templates say nothing of themselves: which token ends an answer or a call, how calls are written, and in which form tools and
calls are read, is found by rendering short conversations.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.templates.answers import read_answer
from glmtuner.templates.forms import FORMS, OPENAI, Form, Turn
from glmtuner.templates.guards import MEANT, one_of
from glmtuner.templates.new_tokens import new_tokens_of
from glmtuner.templates.tool_calls import SYNTAXES, Syntax, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # names by which templates read a thought
SWITCHES = ("enable_thinking", "thinking")  # names by which templates are asked to think or not
PROBE = "Answer"
RESULT = "Outcome"
QUESTION: Turn = {"role": "user", "content": "QUESTION"}
ASKED: list[Turn] = [QUESTION, {"role": "assistant", "content": PROBE}]
FUNCTION = "look_up"
CALLS = (
    ToolCall(FUNCTION, {"keyword": "Valletta", "days": 2, "names": ["甲"]}, "call00001"),
    ToolCall(FUNCTION, {"keyword": "乙"}, "call00002"),
)
LONG_ID = "call_0123456789abcdef01234567"  # as OpenAI's are
PROBE_TOOL = {
    "type": "function",
    "function": {"name": FUNCTION, "description": "b", "parameters": {"type": "object", "properties": {}}},
}


def called(calls: Sequence[ToolCall]) -> list[Turn]:
    """A question and an answer that is nothing but calls."""
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call.as_openai() for call in calls]}]


class Probed:
    """A Jinja template with the special tokens of one tokenizer; it keeps no reference to the tokenizer.

    Where it is `fitting`, conversations with tools are given to the template in the form that it reads; else in OpenAI's,
    whatever the template leaves out of it.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        source: str,
        options: Mapping[str, Any],
        *,
        fitting: bool = False,
    ) -> None:
        self.source, self.options, self.fitting = source, dict(options), fitting
        self.special_tokens = dict(tokenizer.special_tokens_map)
        meant = new_tokens_of(tokenizer)
        added = [token for token in tokenizer.added_tokens_decoder.values() if str(token) not in meant]
        self.literals = {str(token) for token in added}
        self.special = {*(str(token) for token in added if token.special), *tokenizer.all_special_tokens}
        self.eos = str(tokenizer.eos_token or "")
        self.any_literal = one_of(self.literals | self.special)
        self.special_literal = one_of({token for token in self.special if not MEANT.fullmatch(token)})
        names = set(re.findall(r"\b[A-Za-z_]+\b", source))
        self.switch = next((name for name in SWITCHES if name in names), None)
        if self.switch == "thinking" and re.search(r"[.\[]['\"]?thinking\b", source):  # a key of the turns
            self.switch = None
        self.reasoning_key = next((key for key in REASONING_KEYS if key in names and key != self.switch), None)
        self.reads_think_tags = "</think>" in source

    def apply(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompts: bool,
        thinking: bool | None = None,
        form: Form | None = None,
    ) -> str:
        """The turns as transformers renders them, with the generation prompt if it `prompts`; raises ConfigError."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = dict(self.options)
        if thinking is not None and self.switch and self.switch not in options:
            options[self.switch] = thinking
        has_calls = tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
        formed, described = (form or self.form).turns(turns, tools) if has_calls else (list(turns), [])
        try:
            rendered: Any = render_jinja_template(
                [formed],
                tools=described or None,
                chat_template=self.source,
                add_generation_prompt=prompts,
                **{**self.special_tokens, **options},
            )
        except Exception as error:  # templates raise whatever their authors chose
            raise ConfigError(
                f"model.template=tokenizer: the tokenizer's chat template refuses these turns ({error}); "
                "choose a template of ours with model.template="
            ) from None
        text = rendered[0][0]
        assert isinstance(text, str)  # of one conversation
        return text

    def _shows(
        self, words: Sequence[str], turns: Sequence[Turn], form: Form, tools: Sequence[Mapping[str, Any]] = ()
    ) -> bool:
        """Whether all the words are in what the template renders of the turns."""
        try:
            text = self.apply(turns, tools, prompts=False, form=form)
        except ConfigError:
            return False
        return all(word in text for word in words)

    # tools

    @cached_property
    def form(self) -> Form:
        """The form in which conversations with tools are given to the template."""
        form = self._form_of_calls
        if form is None or not self.fitting:
            return OPENAI
        roles = ("observation", "tool") if form.calls_are_turns else ("tool", "observation")
        turns = [*called(CALLS[:1]), {"role": "tool", "content": RESULT, "tool_call_id": CALLS[0].id}]
        form = next(
            (
                formed
                for formed in (replace(form, role_of_results=role) for role in roles)
                if self._shows([RESULT], turns, formed)
            ),
            form,
        )
        named = [replace(call, id=LONG_ID) for call in CALLS[:1]]
        if not self._shows([FUNCTION], called(named), form):
            short = replace(form, short_ids=True)
            form = short if self._shows([FUNCTION], called(named), short) else form
        in_turn = replace(form, tools_in_turn=True)
        asked = [PROBE_TOOL]
        beside = self._shows([FUNCTION], [QUESTION], form, asked)
        return in_turn if not beside and self._shows([FUNCTION], [QUESTION], in_turn, asked) else form

    @cached_property
    def _form_of_calls(self) -> Form | None:
        """The first of the forms in which the template shows a call; None if it shows none."""
        forms = FORMS if self.fitting else (OPENAI,)
        words = [FUNCTION, "keyword", "Valletta"]
        return next((form for form in forms if self._shows(words, called(CALLS[:1]), form)), None)

    @property
    def renders_calls(self) -> bool:
        """Whether the template renders calls of tools."""
        return self._form_of_calls is not None

    @cached_property
    def renders_tools(self) -> bool:
        """Whether the template renders the descriptions of tools, and calls of them."""
        return self.renders_calls and self._shows([FUNCTION], [QUESTION], self.form, [PROBE_TOOL])

    @cached_property
    def syntax(self) -> Syntax | None:
        """The syntax in which the template writes calls: whose writer gives its text, else whose reader finds its calls."""
        if not self.renders_calls:
            return None
        for calls in (CALLS, CALLS[:1]):
            try:
                behind = self._behind_question(calls)
            except ConfigError:  # of templates that have one call in a turn
                continue
            written = [syntax for syntax in SYNTAXES.values() if syntax.parallel or len(calls) == 1]
            for syntax in written:
                if behind.startswith(syntax.write("", calls)):
                    return syntax
            for syntax in written:
                found = read_answer(behind, syntax, [PROBE_TOOL])
                if [(call.name, call.arguments) for call in found.calls] == [
                    (call.name, call.arguments) for call in calls
                ]:
                    return syntax
        return None

    def _behind_question(self, calls: Sequence[ToolCall]) -> str:
        """What the template renders of an answer that is nothing but calls, without an empty thought before it."""
        turns = called(calls)
        full = self.apply(turns, prompts=False, thinking=False)
        prompt = self.apply(turns[:1], prompts=True, thinking=False)
        opened = prompt.rfind("<think>")
        if not full.startswith(prompt) and opened >= 0:
            prompt = prompt[:opened].rstrip()
        place = len(prompt) if full.startswith(prompt) else full.rfind(QUESTION["content"]) + len(QUESTION["content"])
        _, thought, behind = full[place:].rpartition("</think>")
        return behind.lstrip("\n") if thought and full[place:].lstrip().startswith("<think>") else full[place:]

    # stops

    @cached_property
    def stop_of_answers(self) -> str:
        """The text of the token that ends an answer, whatever follows in the conversation."""
        full = self.apply(ASKED, prompts=False)
        return self._ending(full.rpartition(PROBE)[2]) or self._following(ASKED, full, QUESTION, PROBE)

    @cached_property
    def stop_of_calls(self) -> str:
        """The text of the token that ends a tool call; that of answers where the template has no tool calls."""
        turns = called(CALLS[:1])
        if not self.renders_calls:
            return self.stop_of_answers
        full = self.apply(turns, prompts=False)
        written = self.syntax.write("", CALLS[:1]).strip() if self.syntax else ""
        if ending := self._ending(full.rpartition(written)[2] if written else full):
            return ending
        if self._ending(self.apply(ASKED, prompts=False).rpartition(PROBE)[2]):  # answers have one
            return self.stop_of_answers
        result: Turn = {"role": "tool", "content": RESULT, "tool_call_id": CALLS[0].id}
        return self._following(turns, full, result, written or "甲")

    @cached_property
    def tail_of_answers(self) -> str:
        """The text that the template writes behind an answer."""
        full = self.apply(ASKED, prompts=False)
        return full[full.rfind(PROBE) + len(PROBE) :] if PROBE in full else ""

    def _ending(self, behind: str) -> str:
        """The special token that this text ends in, "" if it ends in none."""
        behind = behind.rstrip()
        endings = [token for token in self.literals | self.special if token and behind.endswith(token)]
        return max((token for token in endings if not MEANT.fullmatch(token)), key=len, default="")

    def _following(self, turns: Sequence[Turn], full: str, following: Turn, last: str) -> str:
        """The control token that a following turn begins with; else eos. `last` is the last text of the turns."""
        try:
            longer = self.apply([*turns, following], prompts=False)
        except ConfigError:
            return self.eos
        place = longer.find(full.rstrip())
        place = place + len(full.rstrip()) if place >= 0 else longer.rfind(last) + len(last)
        found = self.any_literal.search(longer, place) if self.any_literal else None
        return found.group() if found else self.eos

    def check_answers(self) -> None:
        """Raises ConfigError if the template renders no answer at all."""
        if PROBE not in self.apply(ASKED, prompts=False):
            raise ConfigError(
                "model.template=tokenizer: the tokenizer's chat template does not render an answer right after its prompt; "
                "choose a template of ours with model.template="
            )
