"""Answers: tokens a second of prediction and serving at 9B size, beside transformers' `generate` and continuous batching."""

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from gpu_parts.models import free, random_model, transformers_config
from gpu_parts.record import Check
from gpu_parts.right import questions, shipped_model

MODEL = "GLM-4-9B"
ROWS = (1, 8, 32, 128, 512)
PROMPT_TOKENS, NEW_TOKENS = 128, 64  # of the longest prompt, and of every answer
MAX_ROWS = 512  # at once, even if more would fit


def run(check: Check) -> None:
    if check.begins("greedy answers equal to generate's"):
        with check.item("greedy answers equal to generate's"):
            compare_answers(check)
    with check.item("9B size"):
        measure_speeds(check)


def prompts_of(count: int, longest: int) -> list[list[int]]:
    """Random prompts of longest // 2 to `longest` tokens."""
    draw = random.Random(0)
    return [[draw.randrange(300, 2900) for _ in range(draw.randint(longest // 2, longest))] for _ in range(count)]


def generate_answers(
    model: Any, prompts: list[list[int]], new_tokens: int, stops: tuple[int, ...] = ()
) -> list[list[int]]:
    """transformers' greedy `generate` of the prompts as one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ends = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **ends
        )
    return out[:, width:].tolist()


def decode_answers(
    model: Any, prompts: list[list[int]], rows: int, new_tokens: int, stops: tuple[int, ...] = ()
) -> dict[int, list[int]]:
    """Greedy answers by glmtuner's continuous batching, as in a prediction; raises if a GPU does not replay a CUDA graph."""
    from glmtuner.inference.decoding import Decoder, greedy

    decoder = Decoder(model, 0)
    continuations = greedy(
        decoder, prompts, max_rows=rows, max_new_tokens=new_tokens, stop_ids=stops, repetition_penalty=1.0
    )
    answers = dict(continuations)
    if decoder.device.type == "cuda" and decoder.recorder is None:
        raise RuntimeError("steps were not replayed as a CUDA graph; the log says why")
    return answers


def compare_answers(check: Check) -> None:
    """In float32, of the shipped model."""
    from glmtuner.inference.generate import until_stop

    model, stops, new_tokens = shipped_model().to(check.device), (0, 7, 9), 8 if check.miniature else 48
    prompts = questions(8 if check.miniature else 48)
    expected = [until_stop(tokens, stops) for tokens in generate_answers(model, prompts, new_tokens, stops)]
    answers = decode_answers(model, prompts, 16, new_tokens, stops)
    equal = sum(until_stop(answers[index], stops) == tokens for index, tokens in enumerate(expected))
    check.count("greedy answers in float32 equal to generate's", equal, len(prompts))


def measure_speeds(check: Check) -> None:
    from glmtuner.inference.generate import rows_that_fit

    config = transformers_config(MODEL, check.miniature)
    model = random_model(config, check.device, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    longest, new_tokens = (16, 6) if check.miniature else (PROMPT_TOKENS, NEW_TOKENS)
    fitting_rows = min(rows_that_fit(model, longest + new_tokens, MAX_ROWS), MAX_ROWS)
    counts = (1, 3) if check.miniature else (*(rows for rows in ROWS if rows < fitting_rows), fitting_rows)
    decode_answers(model, prompts_of(2, longest), 2, 3)  # kernels are chosen and loaded
    default_rows = rows_that_fit(model, longest + new_tokens)
    for rows in counts:
        what = f"{rows} rows at once"
        if not check.begins(what, 12.0):
            continue
        prompts = prompts_of(rows, longest)
        with check.item(f"prediction, {what}"):
            beside = tokens_per_second(
                check, lambda prompts=prompts: generate_answers(model, prompts, new_tokens), rows * new_tokens
            )
            ours = tokens_per_second(
                check,
                lambda prompts=prompts, rows=rows: decode_answers(model, prompts, rows, new_tokens),
                rows * new_tokens,
            )
            add_comparison(
                check,
                f"prediction, {what}",
                ours,
                beside,
                "generate",
                "what a run chooses" if rows == default_rows else "",
            )
    for rows in counts[-2:]:
        if not check.begins(f"serving, {rows} rows at once", 10.0):
            continue
        with check.item(f"serving, {rows} rows at once"):
            prompts = prompts_of(rows, longest)
            ours = tokens_per_second(
                check,
                lambda prompts=prompts, rows=rows: serve_requests(model, prompts, rows, new_tokens),
                rows * new_tokens,
            )
            check.add(f"serving, {rows} requests at once", ours, "tokens/s")
    if check.device.type != "cuda":
        check.add("transformers' continuous batching", None, note="left out: it needs a GPU")
        return
    for rows in (1, 32, counts[-1]):
        what = f"transformers' continuous batching, {rows} requests"
        if check.begins(what, 20.0):
            with check.item(what):
                check.add(
                    what, paged_rate(model, prompts_of(rows, longest), new_tokens), "tokens/s", note="CUDA graphs, warm"
                )
    free()


def add_comparison(check: Check, what: str, ours: float, beside: float, against: str, note: str) -> None:
    met = None if check.miniature else ours > beside
    note = ", ".join(filter(None, (f"{ours / beside:.2f} times it", note)))
    check.add(what, ours, "tokens/s", beside=beside, against=against, goal="faster", met=met, note=note)


def tokens_per_second(check: Check, answer: Callable[[], Any], tokens: int) -> float:
    """Tokens a second, prefill included in the time."""
    if check.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    answer()
    if check.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def serve_requests(model: Any, prompts: list[list[int]], rows: int, new_tokens: int) -> None:
    """Submit all prompts to the serving engine at once and wait for the last answer."""
    from glmtuner.serving.engine import Engine, Request, Sampling

    engine = Engine(
        SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=0), stops=()), rows, len(prompts)
    )
    finished, reasons = threading.Semaphore(0), []

    def on_end(reason: str) -> None:
        reasons.append(reason)
        finished.release()

    for prompt in prompts:
        engine.submit(Request(prompt, new_tokens, Sampling(temperature=0.0), lambda token: True, on_end))
    engine.thread.start()
    for _ in prompts:
        finished.acquire()
    engine.close()
    if set(reasons) != {"length"}:
        raise RuntimeError(f"answers ended by {sorted(set(reasons))}")


def paged_rate(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens a second of transformers' `generate_batch`, without its warm-up."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    spans = [answer.lifespan for answer in results.values()]
    tokens = sum(len(answer.generated_tokens) for answer in results.values())
    if tokens < len(prompts) * new_tokens:
        raise RuntimeError(f"{tokens} tokens for {len(prompts)} prompts of {new_tokens}")
    return tokens / (max(end for _, end in spans) - min(start for start, _ in spans))
