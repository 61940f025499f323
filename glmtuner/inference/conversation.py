"""Turns with a finished run's model: what was said so far goes in, the answer comes out a piece at a time."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from glmtuner.data.records import Message
from glmtuner.errors import ConfigError
from glmtuner.inference.generate import AnswerText, until_stop

if TYPE_CHECKING:
    from glmtuner.inference.finished import Finished


class Conversation:
    """A conversation; `system` and `turns` may be changed between questions."""

    def __init__(self, finished: "Finished") -> None:
        self.finished = finished
        self.system = ""
        self.turns: list[Message] = []

    def ask(self, question: str, emit: Callable[[str], None]) -> tuple[str, int]:
        """The answer, and how many old turns had to be left out to make room for it.

        `emit` gets the answer's text as it is generated. A KeyboardInterrupt while it is ends the answer there; what came
        until then stays in the conversation. Raises ConfigError for a question that leaves no room for an answer.
        """
        turns = [*self.turns, Message("user", question)]
        prompt, room, dropped = self._fitted(turns)
        streamer = Streamer(self.finished, emit)
        with suppress(KeyboardInterrupt):
            self._generate(prompt, room, streamer)
        answer = streamer.finish()
        self.turns = [*turns, Message("assistant", answer)]
        return answer, dropped

    def _fitted(self, turns: list[Message]) -> tuple[list[int], int, int]:
        """Tokens of the prompt, how many may follow, and how many of the oldest turns were left out."""
        values = self.finished.run.generation
        head = [Message("system", self.system)] if self.system else []
        dropped = 0
        while True:
            (found,) = self.finished.template.encode(self.finished.tokenizer, [[*head, *turns[dropped:]]])
            room = values.max_length - len(found.input_ids)
            wanted = values.max_new_tokens or 1
            if room >= wanted:
                return found.input_ids, values.max_new_tokens or room, dropped
            if dropped + 2 >= len(turns):
                raise ConfigError(
                    f"the question has {len(found.input_ids)} tokens, and generation.max_length={values.max_length} leaves no "
                    "room for an answer; ask in fewer words, or type a larger generation.max_length"
                )
            dropped += 2  # a question and its answer

    def _generate(self, prompt: list[int], room: int, streamer: "Streamer") -> None:
        import torch

        finished = self.finished
        ids = torch.tensor([prompt], device=finished.model.device)
        with torch.no_grad():
            out = finished.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=decoding(finished, room),
                streamer=streamer if finished.run.generation.num_beams == 1 else None,
            )
        if finished.run.generation.num_beams > 1:  # beams are known at the end only
            streamer.take(out[0, len(prompt) :].tolist())


def decoding(finished: "Finished", room: int, **typed: Any) -> Any:
    """transformers' GenerationConfig of the run's `generation` values, `typed` ones over them."""
    from transformers import GenerationConfig

    values = finished.run.generation
    sampling = (
        {"temperature": values.temperature, "top_p": values.top_p, "top_k": values.top_k} if values.do_sample else {}
    )
    return GenerationConfig(
        **{
            "max_new_tokens": room, "do_sample": values.do_sample, "num_beams": values.num_beams,
            "repetition_penalty": values.repetition_penalty, "eos_token_id": list(finished.stops),
            "pad_token_id": finished.tokenizer.pad_token_id, "use_cache": True, **sampling, **typed,
        }
    )  # fmt: skip


class Streamer:
    """transformers calls `put` with the prompt, then with each token; text goes on to `emit` as soon as it is sure."""

    def __init__(self, finished: "Finished", emit: Callable[[str], None]) -> None:
        self.stops, self.emit = finished.stops, emit
        self.answer = AnswerText(finished.tokenizer)
        self.told = ""
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.take(value.reshape(-1).tolist())

    def end(self) -> None:
        """transformers' word that nothing follows."""

    def take(self, tokens: Sequence[int]) -> None:
        for token in until_stop(tokens, self.stops):
            self._tell(self.answer.put(token))

    def finish(self) -> str:
        """The whole answer; what was not told of it yet is."""
        self._tell(self.answer.finish())
        return self.told

    def _tell(self, text: str) -> None:
        if text:
            self.told += text
            self.emit(text)
