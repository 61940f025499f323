"""A conversation with a finished run's model: the turns so far are the prompt, and the answer is streamed."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.inference.generate import AnswerText, generator_of, until_stop

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from glmtuner.inference.finished import Finished


class Conversation:
    """A conversation; `system` and `turns` may be changed between questions."""

    def __init__(self, finished: "Finished") -> None:
        self.finished = finished
        self.system = ""
        self.turns: list[Message] = []

    def ask(self, question: str, emit: Callable[[str], None]) -> tuple[str, int]:
        """The answer, and how many of the oldest turns were left out to make room for it.

        `emit` gets the answer's text as it is generated. A KeyboardInterrupt during generation ends the answer; the text so
        far stays in the conversation. Raises ConfigError for a question that leaves no room for an answer.
        """
        turns = [*self.turns, Message("user", question)]
        prompt, max_new_tokens, dropped = self._fit(turns)
        streamer = Streamer(self.finished, emit)
        with suppress(KeyboardInterrupt):
            self._generate(prompt, max_new_tokens, streamer)
        answer = streamer.finish()
        self.turns = [*turns, Message("assistant", answer)]
        return answer, dropped

    def _fit(self, turns: list[Message]) -> tuple[list[int], int, int]:
        """The prompt's token ids, how many tokens may be generated, and how many of the oldest turns were left out."""
        values = self.finished.run.generation
        head = [Message("system", self.system)] if self.system else []
        dropped = 0
        while True:
            (encoded,) = self.finished.template.encode(self.finished.tokenizer, [[*head, *turns[dropped:]]])
            room = values.max_length - len(encoded.input_ids)
            if room >= (values.max_new_tokens or 1):
                return list(encoded.input_ids), values.max_new_tokens or room, dropped
            if dropped + 2 >= len(turns):
                raise ConfigError(
                    f"generation.max_length={values.max_length}: the question has {len(encoded.input_ids)} tokens, which "
                    "leaves no room for an answer; ask a shorter question, or type a larger generation.max_length"
                )
            dropped += 2  # a question and its answer

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

    def __init__(self, finished: "Finished", emit: Callable[[str], None]) -> None:
        self.stop_ids, self.emit = finished.stops, emit
        self.answer = AnswerText(finished.tokenizer)
        self.emitted = ""
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
        """Emit the text that these tokens of the answer complete."""
        for token in until_stop(tokens, self.stop_ids):
            self._emit(self.answer.put(token))

    def finish(self) -> str:
        """Emit the rest; returns the whole answer."""
        self._emit(self.answer.finish())
        return self.emitted

    def _emit(self, text: str) -> None:
        if text:
            self.emitted += text
            self.emit(text)
