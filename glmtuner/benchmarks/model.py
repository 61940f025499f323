"""The model that a run has loaded, by lm-evaluation-harness' own interface."""

import json
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from glmtuner.benchmarks.likelihood import Continuation, Likelihood, Scorer
from glmtuner.benchmarks.prompts import ChatPrompts
from glmtuner.console import say, tracked
from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError, DataError
from glmtuner.families.stop_tokens import stop_ids
from glmtuner.inference.context import RunContext
from glmtuner.inference.generate import Decoding, answers, by_length, rows_that_fit
from glmtuner.inference.sampling import Sampler

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

SEED = 1234  # of samples and of the choice of examples: the harness' own
MAX_NEW_TOKENS = 256  # of an answer, where the task does not say: the harness' own
DEFAULT_LENGTH = 2048  # of a row in tokens, where neither config.json nor the tokenizer says: the harness' own
LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "seq_length", "max_sequence_length")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the tasks' words for one thing
# What a task may say of an answer's decoding without effect on it, and the value that has none.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "use_cache": True, "early_stopping": False, "length_penalty": 1.0}


class LoadedModel(TemplateLM):
    """Answers the harness' requests: log-likelihoods without padding, generation by continuous batching."""

    def __init__(self, context: RunContext) -> None:
        super().__init__()
        self.context, self.tokenizer, self.model = context, context.tokenizer, context.model
        self.chat = ChatPrompts(context.template, context.tokenizer)
        self.max_length = longest_row(context)
        self.scorer = Scorer(context.model, context.tokenizer.pad_token_id, self.max_length)
        self.shows_progress = ranks.is_main() and not context.run.trainer.disable_tqdm
        self._chosen = False
        self._rank, self._world_size = ranks.rank(), ranks.world_size()
        plain = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a")
        # special tokens behind a text, as ChatGLM-6B's tokenizer has them: a continuation stands behind these
        self.closes = bool(plain) and whole[-len(plain) :] != plain

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-sequence token."""
        token_id = self.tokenizer.eos_token_id
        assert isinstance(token_id, int)
        return token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def device(self) -> "torch.device":
        """Where the model computes."""
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the run's template, which renders the turns."""
        return self.context.template_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that stands for the prompt of these turns."""
        return self.chat.render(chat_history)

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The number of each rank, [ranks]."""
        import torch

        return torch.tensor(ranks.all_gather(int(tensor)))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on rank `dst`, else None."""
        gathered = ranks.all_gather(obj)
        return gathered if ranks.rank() == dst else None

    def barrier(self) -> None:
        """Wait for the other ranks."""
        ranks.barrier()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text; of a rendered prompt its own, else with the special tokens that the tokenizer adds, unless it begins with one."""
        if add_special_tokens is None and string in self.chat.ids:
            return [*self.chat.ids[string]]
        if add_special_tokens is None:
            first = text_of(self.tokenizer, [self.prefix_token_id])
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context, and those of what follows it, as they are tokenized together."""
        if context in self.chat.ids:
            return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
        if not self.closes:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        stripped = context.rstrip()
        before = self.tok_encode(stripped, add_special_tokens=False)
        whole = self.tok_encode(context + continuation, add_special_tokens=False)
        return self.tok_encode(stripped), whole[len(before) :]

    def loglikelihood(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # no bar for tokenizing
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """The same for tokens: (texts, those of the context, those of the continuation)."""
        for texts, context, target in requests:
            if not target:
                raise DataError(f"benchmark: the option {texts[1]!r} has no token of its own behind its question")
            assert context
        continuations = [Continuation(context, target) for _, context, target in requests]
        cut = sum(len(context) + len(target) > self.max_length + 1 for context, target in continuations)
        if cut:
            say(
                f"benchmark: {cut:,} of {len(requests):,} prompts are longer than {self.max_length:,} tokens, and lose their beginning; "
                "type a smaller benchmark.num_fewshot"
            )
        if not self._chosen:
            self.scorer.choose(continuations[:50])
            self._chosen = True
        scored = self.scorer.scores(continuations)
        found: dict[int, Likelihood] = dict(tracked(scored, len(continuations), "benchmark", shown=self.shows_progress))
        return [(found[index].logprob, found[index].is_greedy) for index in range(len(continuations))]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats, each token predicted once behind as much of the text as there is room for."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        texts: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, **({"add_special_tokens": False} if self.closes else {}))
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, target = make_disjoint_window(window)
                windows.append(((None, text), context, target))
                texts.append(index)
        sums = [0.0] * len(requests)
        for index, (logprob, _) in zip(texts, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += logprob
        return sums

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of the task's stop texts."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        found: dict[int, str] = {}
        for indices in groups.values():
            settings = requests[indices[0]].args[1]
            texts = self._generated([requests[index].args[0] for index in indices], settings)
            found |= zip(indices, texts, strict=True)
        return [found[index] for index in range(len(requests))]

    def _generated(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """The answers to prompts that are decoded in one way."""
        decoding, stops, temperature = self._decoding(settings)
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"benchmark: the task asks for answers of {decoding.max_new_tokens:,} tokens, and the model has room for {self.max_length:,}; "
                "leave it out, or set max_gen_toks in a task of your own"
            )
        prompts = [self.tok_encode(context) for context in contexts]
        if cut := sum(len(prompt) > room for prompt in prompts):
            say(
                f"benchmark: {cut:,} of {len(prompts):,} prompts are longer than {room:,} tokens, and lose their beginning; type a "
                "smaller benchmark.num_fewshot"
            )
        prompts = [prompt[-room:] for prompt in prompts]
        if temperature is not None:
            sampler = Sampler(
                self.model, max_new_tokens=decoding.max_new_tokens, stop_ids=decoding.stop_ids, pad_id=decoding.pad_id,
                temperature=temperature,
            )  # fmt: skip
            states = [Random(f"{SEED} {index}") for index in range(len(prompts))]
            return [self._text(tokens, stops) for tokens in sampler.answers(prompts, states)]
        texts = StopTexts(self.tokenizer, stops)
        longest = max(map(len, prompts)) + decoding.max_new_tokens
        rows = self.context.run.generation.max_batch_size or rows_that_fit(self.model, longest)
        order = by_length(prompts)  # so that those which are read together need little padding
        produced = answers(self.model, [prompts[index] for index in order], decoding, rows, ends=texts.reached)
        found = dict(tracked(produced, len(prompts), "benchmark", shown=self.shows_progress))
        text_at = {index: self._text(found[place], stops) for place, index in enumerate(order)}
        return [text_at[index] for index in range(len(prompts))]

    def _decoding(self, settings: dict[str, Any]) -> tuple[Decoding, list[str], float | None]:
        """How a task's answers are decoded, the texts that end them, and the temperature if they are sampled."""
        left = dict(settings)
        until = left.pop("until", None) or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        lengths = [left.pop(name) for name in LENGTHS if name in left]
        temperature = float(left.pop("temperature", 0.0) or 0.0)
        samples = bool(left.pop("do_sample", temperature > 0))
        beams, penalty = int(left.pop("num_beams", 1)), float(left.pop("repetition_penalty", 1.0))
        if samples and not temperature:
            temperature = 1.0
        ignored = {name for name in ("top_p", "top_k") if not samples}  # of a greedy answer
        unknown = {
            name: value
            for name, value in left.items()
            if name not in ignored and (name not in NEUTRAL or value != NEUTRAL[name])
        }
        if samples and (beams > 1 or penalty != 1):
            unknown |= {"num_beams": beams} if beams > 1 else {"repetition_penalty": penalty}
        if unknown:
            listed = ", ".join(f"{name}: {value}" for name, value in unknown.items())
            raise ConfigError(
                f"benchmark: the task's generation_kwargs have {listed}, which has no effect here; legal are until, do_sample, "
                f"temperature, num_beams and repetition_penalty of greedy answers, and {LENGTHS[0]}; set them in a task of your own"
            )
        ends = {self.eot_token_id}
        of_config = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends |= {
            end for end in (of_config if isinstance(of_config, list | tuple) else [of_config]) if isinstance(end, int)
        }
        if self.context.run.benchmark.chat_template:
            ends |= {*stop_ids(self.context.template, self.tokenizer, self.context.family.name, self.model)}
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        ends |= {special[text] for text in stops if text in special}
        eos = text_of(self.tokenizer, [self.eot_token_id])
        decoding = Decoding(
            max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
            num_beams=beams,
            repetition_penalty=penalty,
            stop_ids=tuple(sorted(ends)),
            pad_id=self.tokenizer.pad_token_id,
        )
        return decoding, [*stops, *([eos] if eos else [])], temperature if samples else None

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """The text of an answer, without special tokens, up to its first stop text."""
        text = text_of(self.tokenizer, tokens, skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0]
        return text


class StopTexts:
    """Whether an answer has reached a stop text, from its last tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # a token is a byte at least; with those before it a byte-pair token may be written otherwise
        self.tokens = max((len(stop.encode()) for stop in stops), default=0) + 8

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether one of the texts is within the last tokens."""
        text = text_of(self.tokenizer, tokens[-self.tokens :])
        return any(stop in text for stop in self.stops)


def text_of(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one sequence of tokens."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text


def longest_row(context: RunContext) -> int:
    """The most tokens that a row may have, by config.json, else by the tokenizer."""
    from glmtuner.models.unwrap import unwrapped

    config = unwrapped(context.model).config.get_text_config()
    for key in LENGTH_KEYS:
        if isinstance(value := getattr(config, key, None), int):
            return value
    length = context.tokenizer.model_max_length
    return int(length) if length and length < 10**9 else DEFAULT_LENGTH
