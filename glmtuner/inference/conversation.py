"""A conversation with a finished run's model: the turns so far are the prompt, and the answer is streamed."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.inference.answer import answer_behind
from glmtuner.inference.generate import generator_of, until_stop
from glmtuner.templates.answers import Delta
from glmtuner.templates.tool_calls import ToolCall

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from glmtuner.inference.finished import Finished


class Conversation:
    """A conversation; `system`, `tools` and `turns` may be changed between questions.

    Calls are looked for in its answers where there are tools, and where the chat template renders calls but no tools.
    """

    def __init__(self, finished: "Finished") -> None:
        self.finished = finished
        self.system = ""
        self.tools: tuple[dict[str, Any], ...] = ()
        self.turns: list[Message] = []

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the last answer that have no result yet."""
        end = len(self.turns)
        while end and self.turns[end - 1].role == "tool":
            end -= 1
        calls = self.turns[end - 1].tool_calls if end else ()
        return calls[len(self.turns) - end :]

    def ask(
        self, question: str, emit: Callable[[str], None], emit_thought: Callable[[str], None] = lambda text: None
    ) -> tuple[str, int]:
        """The text of the answer, and how many of the oldest turns were left out to make room for it.

        `emit` gets the answer's text as it is generated, and `emit_thought` that of the thought before it; its calls are in the
        last of the turns. A KeyboardInterrupt during generation ends the answer; what was said so far stays in the
        conversation. Raises ConfigError for a question that leaves no room for an answer.

        While an answer has open calls, the question is the result of the first of them; before it is that of the last one,
        there is no answer, and the text is "".
        """
        calls = self.open_calls
        if calls:
            turns = [*self.turns, Message("tool", question, call_id=calls[0].id)]
            if len(calls) > 1:
                self.turns = turns
                return "", 0
        else:
            turns = [*self.turns, Message("user", question)]
        prompt, max_new_tokens, dropped = self._fit(turns)
        streamer = Streamer(self, prompt, emit, emit_thought)
        with suppress(KeyboardInterrupt):
            self._generate(prompt, max_new_tokens, streamer)
        said = streamer.finish()
        numbers = range(sum(len(turn.tool_calls) for turn in turns) + 1, 100_000)
        calls = tuple(_with_id(call, number) for call, number in zip(said.calls, numbers, strict=False))
        self.turns = [*turns, Message("assistant", said.content, reasoning=said.reasoning, tool_calls=calls)]
        return said.content, dropped

    def _fit(self, turns: list[Message]) -> tuple[list[int], int, int]:
        """The prompt's token ids, how many tokens may be generated, and how many of the oldest turns were left out."""
        values = self.finished.run.generation
        head = [Message("system", self.system)] if self.system else []
        template, tokenizer = self.finished.template, self.finished.tokenizer
        tools = [self.tools] if self.tools else ()
        starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
        for dropped in starts:  # a question, its calls and their results, and its answer
            (encoded,) = template.encode(tokenizer, [[*head, *turns[dropped:]]], tools)
            room = values.max_length - len(encoded.input_ids)
            if room >= (values.max_new_tokens or 1):
                return list(encoded.input_ids), values.max_new_tokens or room, dropped
        raise ConfigError(
            f"generation.max_length={values.max_length}: the question has {len(encoded.input_ids)} tokens, which "
            "leaves no room for an answer; ask a shorter question, or type a larger generation.max_length"
        )

    def _generate(self, prompt: list[int], max_new_tokens: int, streamer: "Streamer") -> None:
        import torch

        finished = self.finished
        streams = finished.run.generation.num_beams == 1  # the best beam is known at the end only
        ids = torch.tensor([prompt], device=finished.model.device)
        with torch.no_grad():
            sequences = generator_of(finished.model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation_config(finished, max_new_tokens),
                streamer=streamer if streams else None,
            )
        if not streams:
            streamer.add(sequences[0, len(prompt) :].tolist())


def _with_id(call: ToolCall, number: int) -> ToolCall:
    """The call with an id: nine characters, as Mistral's template wants them."""
    return call if call.id else ToolCall(call.name, call.arguments, f"call{number:05}")


def generation_config(finished: "Finished", max_new_tokens: int) -> "GenerationConfig":
    """transformers' GenerationConfig with the run's `generation` values."""
    from transformers import GenerationConfig

    values = finished.run.generation
    sampling = (
        {"temperature": values.temperature, "top_p": values.top_p, "top_k": values.top_k} if values.do_sample else {}
    )
    return GenerationConfig(
        **{
            "max_new_tokens": max_new_tokens, "do_sample": values.do_sample, "num_beams": values.num_beams,
            "repetition_penalty": values.repetition_penalty, "eos_token_id": list(finished.stops),
            "pad_token_id": finished.tokenizer.pad_token_id, "use_cache": True, **sampling,
        }
    )  # fmt: skip


class Streamer:
    """A streamer for `generate`, which calls `put` with the prompt and then with each token; `emit` gets the text."""

    def __init__(
        self,
        conversation: Conversation,
        prompt: Sequence[int],
        emit: Callable[[str], None],
        emit_thought: Callable[[str], None],
    ) -> None:
        finished = conversation.finished
        self.stop_ids, self.emit, self.emit_thought = finished.stops, emit, emit_thought
        template, tokenizer = finished.template, finished.tokenizer
        may_call = bool(conversation.tools) or not template.renders_tools(tokenizer)
        syntax = template.syntax(tokenizer) if may_call else None
        self.answer = answer_behind(finished, prompt, syntax, conversation.tools)
        self.emitted = Delta()
        self.prompt_seen = False

    def put(self, value: "torch.Tensor") -> None:
        """Called by `generate`: token ids of any shape, the prompt's first."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.add(value.reshape(-1).tolist())

    def end(self) -> None:
        """Called by `generate` when no token follows."""

    def add(self, tokens: Sequence[int]) -> None:
        """Emit what these tokens of the answer complete."""
        for token in until_stop(tokens, self.stop_ids):
            self._emit(self.answer.put(token))

    def finish(self) -> Delta:
        """Emit the rest; returns the whole answer."""
        self._emit(self.answer.finish())
        return self.emitted

    def _emit(self, delta: Delta) -> None:
        self.emitted += delta
        if delta.reasoning:
            self.emit_thought(delta.reasoning)
        if delta.content:
            self.emit(delta.content)
