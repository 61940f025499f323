"""The kernels: the results of the fast paths in half precision, compared with the plain path in higher precision.

One attention call for all samples is compared with a reference implementation in float32. Whole models are compared with
themselves on padded batches in float32: the error of a fast path may be twice that of the plain path in the same precision.

Shape letters: T tokens of all samples, H query heads, G key-value heads, D head dimension.
"""

import copy
import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from gpu_parts.record import Check

# the norm of the difference, relative to the norm of the value, for the output and for each gradient
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
AS_EXACT = 2.0  # times the plain path's own error
SLACK = 2e-3


def run(check: Check) -> None:
    with nullcontext() if check.device.type == "cuda" else cpu_varlen_attention():
        for name, case in attention_cases(check.miniature).items():
            if check.begins(f"attention, {name}"):
                with check.item(f"attention, {name}"):
                    check_attention(check, name, **case)
        for name, build in models(check.miniature).items():
            if check.begins(name):
                with check.item(name):
                    check_model(check, name, build)
    if check.begins("compiled blocks"):
        with check.item("compiled blocks"):
            check_compiled_blocks(check)


# -- attention within samples, one call ----------------------------------------------------------------------------------


@contextmanager
def cpu_varlen_attention() -> Iterator[None]:
    """On a CPU, replace torch's variable-length flash attention, which exists on GPUs only, by the reference."""
    from torch.nn.attention import varlen

    from glmtuner.kernels import segment_attention as segments

    plain, runs = varlen.varlen_attn, segments._varlen_runs

    def varlen_attn(
        query: Any, key: Any, value: Any, bounds: Any, _: Any, *lengths: int,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), **options: Any,
    ) -> Any:  # fmt: skip
        cuts = bounds.diff().tolist()
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        return reference_attention(query, key, value, cuts, window, scale).to(query.dtype)

    varlen.varlen_attn = varlen_attn
    segments._varlen_runs = lambda query: query.dtype in LIMITS
    try:
        yield
    finally:
        varlen.varlen_attn, segments._varlen_runs = plain, runs


def reference_attention(
    query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, lengths: list[int], window: int | None,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of each sample by itself in float32, [T, H, D], as simple as possible."""
    groups, parts = query_THD.shape[1] // key_TGD.shape[1], []
    for query, key, value in zip(
        *(states.float().split(lengths) for states in (query_THD, key_TGD, value_TGD)), strict=True
    ):
        length = query.shape[0]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * (scale if scale is not None else query.shape[-1] ** -0.5)
        positions = torch.arange(length, device=query.device)
        distance_back = positions[:, None] - positions[None, :]
        hidden = (distance_back < 0) | (distance_back >= (window if window is not None else length))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    return torch.cat(parts)


def attention_cases(miniature: bool) -> dict[str, dict[str, Any]]:
    """Head sizes 64 to 256, grouped heads, windows, one long sample and many short ones."""
    draw, divisor = random.Random(0), 32 if miniature else 1
    mixed_lengths = [700 // divisor, 512 // divisor, 77, 5, 1]
    short_lengths = [draw.randint(1, 40) for _ in range(300 // divisor)]
    cases: dict[str, dict[str, Any]] = {
        f"head size {size}": {"heads": (4, 4), "size": size, "lengths": mixed_lengths}
        for size in (64, 80, 96, 128, 192, 256)
    }
    cases |= {f"{heads} heads on {groups}": {"heads": (heads, groups), "size": 128, "lengths": mixed_lengths}
              for heads, groups in ((8, 2), (32, 2), (4, 1))}  # fmt: skip
    cases |= {f"window of {window}": {"heads": (8, 2), "size": 64, "lengths": mixed_lengths, "window": window}
              for window in (2, 16, 128 // (4 if miniature else 1))}  # fmt: skip
    cases["another scale"] = {"heads": (4, 2), "size": 64, "lengths": mixed_lengths, "scale": 0.5}
    cases["one long sample"] = {"heads": (8, 2), "size": 128, "lengths": [8192 // (divisor * 2)]}
    cases["many short samples"] = {"heads": (8, 2), "size": 128, "lengths": short_lengths}
    return cases


def check_attention(
    check: Check, name: str, heads: tuple[int, int], size: int, lengths: list[int], window: int | None = None,
    scale: float | None = None,
) -> None:  # fmt: skip
    """Record the errors of one attention call for all samples, in both half precisions."""
    errors = {dtype: attention_error(check.device, dtype, heads, size, lengths, window, scale) for dtype in LIMITS}
    met = all(error <= LIMITS[dtype] for dtype, error in errors.items())
    check.add(
        f"attention, {name}", errors[torch.bfloat16], "difference / value", against="spelled out in float32",
        goal=f"at most {LIMITS[torch.bfloat16]:g}, in float16 {LIMITS[torch.float16]:g}", met=met,
        note=f"float16: {errors[torch.float16]:.1e}",
    )  # fmt: skip


def attention_error(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, lengths: list[int], window: int | None,
    scale: float | None,
) -> float:  # fmt: skip
    """The largest relative error of the output and the three gradients."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from glmtuner.data.segments import Segments
    from glmtuner.kernels.segment_attention import _segmented

    torch.manual_seed(1)
    total, states = sum(lengths), []
    for count, std in ((heads[0], 2.0), (heads[1], 2.0), (heads[1], 1.0)):  # large scores, so that a wrong scale shows
        drawn = std * torch.randn(1, count, total, size, device=device)
        states.append(drawn.to(dtype).requires_grad_())
    output_gradient = torch.randn(1, total, heads[0], size, device=device).to(dtype)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads[0] // heads[1], True
    output, _ = _segmented(ALL_ATTENTION_FUNCTIONS["sdpa"])(
        module, *states, None, segments=Segments(tuple(lengths), (0,) * len(lengths), tuple(lengths)),
        sliding_window=window, scaling=scale,
    )  # fmt: skip
    output.backward(output_gradient)
    reference_states = [state.detach().float().requires_grad_() for state in states]
    expected = reference_attention(*(state[0].transpose(0, 1) for state in reference_states), lengths, window, scale)
    expected.backward(output_gradient[0].float())
    pairs = [
        (output[0], expected),
        *((actual.grad, reference.grad) for actual, reference in zip(states, reference_states, strict=True)),
    ]
    return max(relative_error(actual, reference) for actual, reference in pairs)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of the expected value."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()


# -- whole models --------------------------------------------------------------------------------------------------------

VOCABULARY = 480
V1 = {"bos_token_id": 470, "eos_token_id": 471, "mask_token_id": 472, "gmask_token_id": 473, "pad_token_id": 3}


def models(miniature: bool) -> dict[str, Callable[[], nn.Module]]:
    """Builders of small models of every family with fast paths, by name."""
    import transformers

    from glmtuner.models.configuration_chatglm import ChatGLM2Config, ChatGLMConfig
    from glmtuner.models.modeling_chatglm import ChatGLMForConditionalGeneration
    from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration

    head, layers = (16, 2) if miniature else (64, 4)
    width = 4 * head
    plain = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head, "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip

    def glm(**values: Any) -> nn.Module:
        return transformers.GlmForCausalLM(transformers.GlmConfig(**{**plain, "eos_token_id": 1, **values}))

    def mistral() -> nn.Module:
        return transformers.MistralForCausalLM(transformers.MistralConfig(**plain, sliding_window=24))

    def chatglm2() -> nn.Module:
        return ChatGLM2ForConditionalGeneration(ChatGLM2Config(
            padded_vocab_size=VOCABULARY, hidden_size=width, ffn_hidden_size=2 * width, num_layers=layers,
            num_attention_heads=4, kv_channels=head, multi_query_group_num=2, initializer_range=0.1,
        ))  # fmt: skip

    def chatglm() -> nn.Module:
        return ChatGLMForConditionalGeneration(ChatGLMConfig(
            vocab_size=VOCABULARY, hidden_size=width, inner_hidden_size=2 * width, num_layers=layers, num_attention_heads=4,
            **V1,
        ))  # fmt: skip

    return {
        "GLM": glm,
        "GLM, head size 128": lambda: glm(head_dim=2 * head),
        "Mistral, a window of 24": mistral,
        "ChatGLM2": chatglm2,
        "ChatGLM-6B, two-way context": chatglm,
    }


def samples(miniature: bool) -> list[dict[str, list[int]]]:
    """Samples of several lengths: context, [gMASK], <sop>, answer, which every family accepts."""
    draw, divisor = random.Random(1), 4 if miniature else 1
    rows = []
    for question_tokens, answer_tokens in ((60, 90), (1, 3), (200 // divisor, 20), (33, 40)):
        question = [draw.randrange(10, 460) for _ in range(question_tokens)]
        answer = [draw.randrange(10, 460) for _ in range(answer_tokens)]
        ids = [*question, V1["gmask_token_id"], V1["bos_token_id"], *answer, V1["eos_token_id"]]
        rows.append({"input_ids": ids, "labels": [-100] * (question_tokens + 2) + [*answer, V1["eos_token_id"]]})
    return rows


def with_lora(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The model in bfloat16 with float32 LoRA on all linear layers, as in a run."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # also biases and norms, which start as constants
    model = get_peft_model(model.bfloat16(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).to(device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    model.config.use_cache = False
    return model.train()


def loss_and_gradients(model: nn.Module, batch: dict[str, Any], half: bool) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of all adapters, flattened into one vector."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        loss = model(**moved).loss
    loss.backward()
    grads = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(grads)


def check_model(check: Check, name: str, build: Callable[[], nn.Module]) -> None:
    """Check each fast path alone and all together, and that a run would use them."""
    from glmtuner.data.collate import Collator
    from glmtuner.data.segments import SegmentCollator
    from glmtuner.kernels.choose import choose_optimizations, short_samples
    from glmtuner.kernels.chunked_loss import disable_chunked_loss, enable_chunked_loss
    from glmtuner.kernels.fused_lora import fuse_lora, unfuse_lora
    from glmtuner.kernels.segment_attention import (
        disable_segment_attention,
        enable_segment_attention,
        position_function,
    )
    from glmtuner.models.unwrap import unwrapped

    model, rows, padded = with_lora(build, check.device), samples(check.miniature), Collator(pad_id=3)
    base = unwrapped(model)
    flat = SegmentCollator(positions_of=position_function(base))
    expected = loss_and_gradients(copy.deepcopy(model).float(), padded(rows), half=False)
    plain = loss_and_gradients(model, padded(rows), half=True)
    paths: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], nn.Module, Any]] = {
        "attention by sample": (enable_segment_attention, disable_segment_attention, base, flat),
        "fused LoRA": (fuse_lora, unfuse_lora, model, padded),
        "chunked cross-entropy": (enable_chunked_loss, disable_chunked_loss, base, padded),
    }
    for path, (enable, disable, target, collate) in paths.items():
        enable(target)
        compare(check, f"{name}: {path}", loss_and_gradients(model, collate(rows), half=True), plain, expected)
        disable(target)
    for enable, _, target, _ in paths.values():
        enable(target)
    compare(check, f"{name}: all three", loss_and_gradients(model, flat(rows), half=True), plain, expected)
    for _, disable, target, _ in paths.values():
        disable(target)
    if not has_liger(check):
        check.add(f"{name}: Liger", None, note="left out: there is no liger-kernel, or no GPU for its kernels")
    elif "Mistral" in name:
        check.add(f"{name}: Liger", None, note="left out: its kernels for Mistral are liger-kernel's own, not ours")
    else:
        from glmtuner.kernels.liger import enable_liger, restore_modules

        enable_liger(base, {})
        compare(check, f"{name}: Liger", loss_and_gradients(model, padded(rows), half=True), plain, expected)
        for enable, _, target, _ in paths.values():
            enable(target)
        compare(
            check, f"{name}: Liger and all three", loss_and_gradients(model, flat(rows), half=True), plain, expected
        )
        restore_modules()
    model = with_lora(build, check.device)
    choice = choose_optimizations(
        model, short_samples(rows), padded, autocast=lambda: torch.autocast(check.device.type, torch.bfloat16)
    )
    count = sum((choice.collate is not padded, choice.chunks_loss, choice.fuses_lora))
    check.count(f"{name}: fast paths that a run takes", count, 3)


def has_liger(check: Check) -> bool:
    return check.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def compare(
    check: Check, what: str, actual: tuple[float, torch.Tensor], plain: tuple[float, torch.Tensor],
    expected: tuple[float, torch.Tensor], note: str = "",
) -> None:  # fmt: skip
    """Record the errors of loss and gradients against float32, beside those of the plain path."""
    error, plain_error = relative_error(actual[1], expected[1]), relative_error(plain[1], expected[1])
    loss_error, plain_loss_error = (abs(result[0] - expected[0]) / expected[0] for result in (actual, plain))
    met = error <= AS_EXACT * plain_error + SLACK and loss_error <= AS_EXACT * plain_loss_error + SLACK
    check.add(
        what, error, "difference / gradient", beside=plain_error, against="the plain path", goal=f"at most {AS_EXACT:g} times that",
        met=met, note="; ".join([f"loss off by {loss_error:.1e}, plain {plain_loss_error:.1e}", *filter(None, [note])]),
    )  # fmt: skip


def check_compiled_blocks(check: Check) -> None:
    """torch.compile of every block, with all fast paths, on batches of two sizes."""
    from glmtuner.data.collate import Collator
    from glmtuner.data.segments import SegmentCollator
    from glmtuner.kernels.chunked_loss import enable_chunked_loss
    from glmtuner.kernels.fused_lora import fuse_lora
    from glmtuner.kernels.segment_attention import enable_segment_attention, position_function
    from glmtuner.models.unwrap import unwrapped

    model = with_lora(models(check.miniature)["GLM"], check.device)
    rows, base = samples(check.miniature), unwrapped(model)
    sizes = {"": rows, ", a smaller batch": rows[:3]}
    exact, padded = copy.deepcopy(model).float(), Collator(pad_id=3)
    expected = [loss_and_gradients(exact, padded(part), half=False) for part in sizes.values()]
    plain = [loss_and_gradients(model, padded(part), half=True) for part in sizes.values()]
    enable_segment_attention(base)
    enable_chunked_loss(base)
    fuse_lora(model)
    flat = SegmentCollator(positions_of=position_function(base))
    started = time.perf_counter()
    for block in base.model.layers:
        block.compile(dynamic=True, **({"backend": "eager"} if check.miniature else {}))
    results = [loss_and_gradients(model, flat(part), half=True) for part in sizes.values()]
    note = f"compiled in {time.perf_counter() - started:.0f} s"
    for size, result, plain_result, expected_result in zip(sizes, results, plain, expected, strict=True):
        compare(check, f"GLM: compiled blocks and all three{size}", result, plain_result, expected_result, note)
