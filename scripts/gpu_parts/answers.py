"""Answers: tokens a second of prediction and serving at 9B size, beside transformers' `generate` and its continuous batching."""

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from gpu_parts.models import drawn_model, free, transformers_config
from gpu_parts.record import Check
from gpu_parts.right import questions, shipped_model

MODEL = "GLM-4-9B"
ROWS = (1, 8, 32, 128, 512)
PROMPT, ROOM = 128, 64  # tokens of a prompt at most, and of every answer
MOST = 512  # rows tried at once, however many would fit


def run(check: Check) -> None:
    if check.begins("greedy answers equal to generate's"):
        with check.item("greedy answers equal to generate's"):
            equal_answers(check)
    with check.item("9B size"):
        speeds(check)


def prompts_of(count: int, longest: int) -> list[list[int]]:
    """Random prompts, half as long as the longest one to as long."""
    draw = random.Random(0)
    return [[draw.randrange(300, 2900) for _ in range(draw.randint(longest // 2, longest))] for _ in range(count)]


def generated(model: Any, prompts: list[list[int]], room: int, stops: tuple[int, ...] = ()) -> list[list[int]]:
    """transformers' greedy `generate` of the prompts as one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ends = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=0, **ends
        )
    return out[:, width:].tolist()


def by_decoder(
    model: Any, prompts: list[list[int]], rows: int, room: int, stops: tuple[int, ...] = ()
) -> dict[int, list[int]]:
    """What a prediction does: greedy answers by glmtuner's continuous batching; raises where a GPU's steps are not replayed."""
    from glmtuner.inference.decoding import Decoder, greedy

    decoder = Decoder(model, 0)
    found = dict(greedy(decoder, prompts, rows=rows, room=room, stops=stops, repetition_penalty=1.0))
    if decoder.device.type == "cuda" and decoder.recorder is None:
        raise RuntimeError("steps were not replayed as a CUDA graph; the log says why")
    return found


def equal_answers(check: Check) -> None:
    """In float32, of the shipped model."""
    from glmtuner.inference.generate import until_stop

    model, stops, room = shipped_model().to(check.device), (0, 7, 9), 8 if check.miniature else 48
    prompts = questions(8 if check.miniature else 48)
    wanted = [until_stop(tokens, stops) for tokens in generated(model, prompts, room, stops)]
    found = by_decoder(model, prompts, 16, room, stops)
    equal = sum(until_stop(found[place], stops) == tokens for place, tokens in enumerate(wanted))
    check.count("greedy answers in float32 equal to generate's", equal, len(prompts))


def speeds(check: Check) -> None:
    from glmtuner.inference.generate import rows_that_fit

    config = transformers_config(MODEL, check.miniature)
    model = drawn_model(config, check.device, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    longest, room = (16, 6) if check.miniature else (PROMPT, ROOM)
    fits = min(rows_that_fit(model, longest + room, MOST), MOST)
    counts = (1, 3) if check.miniature else (*(rows for rows in ROWS if rows < fits), fits)
    by_decoder(model, prompts_of(2, longest), 2, 3)  # kernels are chosen and loaded
    chosen = rows_that_fit(model, longest + room)
    for rows in counts:
        what = f"{rows} rows at once"
        if not check.begins(what, 12.0):
            continue
        prompts = prompts_of(rows, longest)
        with check.item(f"prediction, {what}"):
            beside = rate(check, lambda prompts=prompts: generated(model, prompts, room), rows * room)
            mine = rate(check, lambda prompts=prompts, rows=rows: by_decoder(model, prompts, rows, room), rows * room)
            faster(
                check, f"prediction, {what}", mine, beside, "generate", "what a run chooses" if rows == chosen else ""
            )
    for rows in counts[-2:]:
        if not check.begins(f"serving, {rows} rows at once", 10.0):
            continue
        with check.item(f"serving, {rows} rows at once"):
            prompts = prompts_of(rows, longest)
            mine = rate(check, lambda prompts=prompts, rows=rows: served(model, prompts, rows, room), rows * room)
            check.add(f"serving, {rows} requests at once", mine, "tokens/s")
    if check.device.type != "cuda":
        check.add("transformers' continuous batching", None, note="left out: it needs a GPU")
        return
    for rows in (1, 32, counts[-1]):
        what = f"transformers' continuous batching, {rows} requests"
        if check.begins(what, 20.0):
            with check.item(what):
                check.add(what, paged(model, prompts_of(rows, longest), room), "tokens/s", note="CUDA graphs, warm")
    free()


def faster(check: Check, what: str, mine: float, beside: float, against: str, note: str) -> None:
    met = None if check.miniature else mine > beside
    note = ", ".join(filter(None, (f"{mine / beside:.2f} times it", note)))
    check.add(what, mine, "tokens/s", beside=beside, against=against, goal="faster", met=met, note=note)


def rate(check: Check, answer: Callable[[], Any], tokens: int) -> float:
    """Tokens a second, prompts being read within the time."""
    if check.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    answer()
    if check.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def served(model: Any, prompts: list[list[int]], rows: int, room: int) -> None:
    """All prompts as requests of the serving engine at once, until the last is answered."""
    from glmtuner.serving.engine import Engine, Request, Sampling

    engine = Engine(
        SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=0), stops=()), rows, len(prompts)
    )
    left, reasons = threading.Semaphore(0), []

    def end(reason: str) -> None:
        reasons.append(reason)
        left.release()

    for prompt in prompts:
        engine.submit(Request(prompt, room, Sampling(temperature=0.0), lambda token: True, end))
    engine.thread.start()
    for _ in prompts:
        left.acquire()
    engine.close()
    if set(reasons) != {"length"}:
        raise RuntimeError(f"answers ended by {sorted(set(reasons))}")


def paged(model: Any, prompts: list[list[int]], room: int) -> float:
    """Tokens a second of transformers' `generate_batch`, its warm-up left out."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    spans = [answer.lifespan for answer in found.values()]
    tokens = sum(len(answer.generated_tokens) for answer in found.values())
    if tokens < len(prompts) * room:
        raise RuntimeError(f"{tokens} tokens for {len(prompts)} prompts of {room}")
    return tokens / (max(end for _, end in spans) - min(start for start, _ in spans))
