"""An answer while its tokens are generated: its thought, its text and its tool calls, each as soon as it is certain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmtuner.inference.finished import Finished
from glmtuner.inference.generate import TokenText, TrimmedText
from glmtuner.templates.answers import AnswerReader, Delta
from glmtuner.templates.tool_calls import THINK, Syntax, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAIL = 16  # tokens at a prompt's end among which the one that opens a thought is


class Answer:
    """Reads one answer token by token. The text is stripped at both ends and ends before the first of the `stops`."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        syntax: Syntax | None,
        reader: AnswerReader,
        stops: Sequence[str] = (),
    ) -> None:
        self.text, self.reader, self.trimmed = TokenText(tokenizer, syntax), reader, TrimmedText(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text is reached."""
        return self.trimmed.stopped

    def put(self, token: int) -> Delta:
        """Add a token; returns what it makes certain."""
        return self._shown(self.reader.feed(self.text.put(token)))

    def finish(self) -> Delta:
        """The rest; nothing is held back any more."""
        rest = self.reader.feed(self.text.finish()) + self.reader.finish()
        return self._shown(rest, final=True)

    def _shown(self, delta: Delta, final: bool = False) -> Delta:
        if self.stopped:
            return Delta()
        content = self.trimmed.add(delta.content, final)
        return Delta(delta.reasoning, content, () if self.stopped else delta.calls)


def answer_behind(
    finished: Finished, prompt: Sequence[int], syntax: Syntax | None, tools: Tools = (), stops: Sequence[str] = ()
) -> Answer:
    """An answer of the run's model behind this prompt, in which calls are looked for if there is a `syntax`.

    Without one, a call that the model writes is text, its markers included.
    """
    thinks = finished.template.renders_reasoning
    in_thought = thinks and opens_thought(finished.tokenizer, prompt)
    reader = AnswerReader(syntax, tools, thinks=thinks, in_thought=in_thought)
    return Answer(finished.tokenizer, finished.template.syntax(finished.tokenizer), reader, stops)


def opens_thought(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with the beginning of a thought, be `<think>` one token or text."""
    tail = tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False)
    assert isinstance(tail, str)  # of one sequence
    return tail.rstrip().endswith(THINK)
