"""The official chat templates of ../shared/goldens/templates: their texts, small tokenizers for them, what transformers renders."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

MODELS = [
    "chatglm3-6b", "deepseek-r1-distill", "glm-4-9b-chat", "glm-4-9b-chat-1m-hf", "glm-4.5", "glm-4.6", "glm-4.7",
    "glm-4.7-flash", "glm-5", "glm-5.1", "glm-5.2", "glm-5.3-flash", "glm-edge-4b-chat", "glm-z1-9b-0414",
    "glm-z1-rumination-32b-0414", "llama-3.1-instruct", "mistral-7b-instruct-v0.3", "mistral-nemo-instruct-2407",
    "qwen2.5-instruct", "qwen3", "qwen3-instruct-2507",
]  # fmt: skip
CONTROL = re.compile(r"<\|[^|<>{}'\s]+\|>|<｜[^｜<>]+｜>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|</?s>")
MARKUP = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
# what is learned behind a prompt that always opens a thought
OPENS = {
    "deepseek-r1-distill": "{thought}\n</think>\n\n{answer}",
    "glm-z1-9b-0414": "\n{thought}</think>\n{answer}",
}
CALLS_AS_TURNS = {"glm-4-9b-chat", "glm-4-9b-chat-1m-hf", "glm-z1-9b-0414", "glm-z1-rumination-32b-0414"}
CALLS_AS_TEXT = {"deepseek-r1-distill"}
TOOLS_IN_TURN = {"glm-4-9b-chat", "glm-4-9b-chat-1m-hf"}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Official(NamedTuple):
    """A maker's template: its text in jinja, the special tokens by role, and the tokens that end an answer."""

    name: str
    source: str
    special_tokens: dict[str, str]
    stops: list[str]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> str:
        """The text that transformers makes of the conversation."""
        texts, _ = render_jinja_template(
            [list(messages)],  # type: ignore[list-item]
            tools=list(tools) or None,  # type: ignore[arg-type]
            chat_template=self.source,
            **{**self.special_tokens, **options},
        )
        return str(texts[0])

    def native(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
        """The turns and tools as this template reads them: those of GLM-4 and GLM-Z1 read no `tool_calls`, for example."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            functions = [call["function"] for call in message.get("tool_calls", ())]
            if functions and self.name in CALLS_AS_TURNS:
                turns += [
                    {"role": "assistant", "metadata": each["name"], "content": as_json(each["arguments"])}
                    for each in functions
                ]
            elif functions and self.name in CALLS_AS_TEXT:
                calls = [
                    {"type": "function", "function": {**each, "arguments": as_json(each["arguments"])}}
                    for each in functions
                ]
                turns.append({**message, "content": None, "tool_calls": calls})
            elif message["role"] == "tool" and self.name in CALLS_AS_TURNS:
                turns.append({"role": "observation", "content": message["content"]})
            else:
                turns.append(dict(message))
        if tools and self.name in TOOLS_IN_TURN:
            return [{"role": "system", "content": "", "tools": list(tools)}, *turns], []
        return turns, list(tools)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> str:
        """The generation prompt behind these turns, in the form that the template reads."""
        turns, tools = self.native(messages, tools)
        return self.render(turns, tools, add_generation_prompt=True, **options)

    def behind(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> str:
        """What the rendering has behind the generation prompt of the last answer, up to its stop; "" where it does not continue it.

        Where the prompt always opens a thought, which no rendering continues: the thought, and what the rendering has instead.
        """
        prompt = self.prompt(messages[:-1], tools, **options)
        turns, tools = self.native(messages, tools)
        whole = self.render(turns, tools, add_generation_prompt=False, **options)
        form = OPENS.get(self.name, "")
        if form:
            prompt = prompt[: prompt.rindex("<think>")].rstrip("\n")
        if not whole.startswith(prompt):
            return ""
        rest = min((whole[len(prompt) :].split(stop)[0] for stop in self.stops), key=len)
        thought = messages[-1].get("reasoning_content", "")
        return form.format(thought=thought, answer=rest.strip("\n")) if form else rest

    def tokenizer(self, texts: Iterable[str], special_markup: bool = False) -> PreTrainedTokenizerFast:
        """A byte-level tokenizer with the template's control tokens and merges of these texts; `special_markup`: `<think>` is special."""
        alphabet = sorted(ByteLevel.alphabet())
        backend = Tokenizer(BPE())
        backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
        trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
        plain = [re.sub(f"{CONTROL.pattern}|{MARKUP.pattern}", " ", text) for text in texts]
        backend.train_from_iterator(plain, trainer)
        tokens = {*CONTROL.findall(self.source), *self.special_tokens.values(), *self.stops}
        tokens |= {*ROLES} if "<|{{" in self.source or "<|user|>" in self.source or "'<|'" in self.source else set()
        markup = {*re.findall(MARKUP, self.source)}
        backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(tokens)])
        backend.add_tokens([AddedToken(token, special=special_markup, normalized=False) for token in sorted(markup)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=self.source, **self.special_tokens)


@cache
def official(shared: Path | None, name: str) -> Official:
    """The template of this name; the test is skipped without it."""
    folder = (shared or Path()) / "goldens/templates"
    if shared is None or not (folder / f"{name}.jinja").is_file():
        pytest.skip(f"needs the template of {name} in ../shared/goldens/templates")
    about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return Official(name, source, about["special_tokens"], about["stop_tokens"])
