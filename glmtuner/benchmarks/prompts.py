"""Prompts as turns of the run's template, for a harness that knows prompts as text.

A template's tokens are not always those of its text: it joins pieces that are tokenized apart, and no text in a turn becomes a
control token. A prompt's text therefore stands for its tokens, which are remembered.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from glmtuner.console import say
from glmtuner.data.records import Message
from glmtuner.templates.base import Template
from glmtuner.templates.encoding import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatPrompts:
    """The prompts that were rendered: their tokens by their text."""

    def __init__(self, template: Template, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.template, self.tokenizer = template, tokenizer
        self.ids: dict[str, list[int]] = {}
        self._said = False

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of a prompt; a last turn that is an answer is one that begins like this."""
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
        begun = messages.pop().content if messages[-1].role == "assistant" else ""
        if left_out := [message for message in messages if not self.template.renders(message)]:
            if not self._said:
                say(
                    f"benchmark.chat_template=true: model.template={self.template.name} has no {left_out[0].role} turn; what it says "
                    "stands at the beginning of the first question"
                )
            self._said = True
            texts = [message.content.rstrip() for message in left_out]
            messages = [message for message in messages if self.template.renders(message)]
            prefixed = self.template.prefixed(messages, "\n\n".join(texts) + "\n\n")
        else:
            prefixed = [*messages]
        (encoded,) = self.template.encode(self.tokenizer, [prefixed])
        ids = list(encoded.input_ids)
        if begun:
            ids += list(encode_text(self.tokenizer, [begun])[0])
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str)  # of one prompt
        while self.ids.setdefault(text, ids) != ids:  # other tokens with the same text
            text += " "
        return text
