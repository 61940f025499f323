"""The kernels: what the fast paths compute in half precision, beside the plain way in higher precision.

One attention call for all samples is compared with attention spelled out in float32. Whole models are compared with
themselves, padded, in float32: a fast path may be as far from that as twice the plain path in the same precision is.

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

# the difference's norm as a share of the value's norm, for the output and for each gradient
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
AS_EXACT = 2.0  # times the plain path's own difference
SLACK = 2e-3


def run(check: Check) -> None:
    with nullcontext() if check.device.type == "cuda" else stand_in():
        for name, case in attention_cases(check.miniature).items():
            if check.begins(f"attention, {name}"):
                with check.item(f"attention, {name}"):
                    attention(check, name, **case)
        for name, build in models(check.miniature).items():
            if check.begins(name):
                with check.item(name):
                    model_paths(check, name, build)
    if check.begins("compiled blocks"):
        with check.item("compiled blocks"):
            compiled(check)


# -- attention within samples, one call ----------------------------------------------------------------------------------


@contextmanager
def stand_in() -> Iterator[None]:
    """On a CPU: attention spelled out stands for torch's flash attention, which exists on GPUs alone."""
    from torch.nn.attention import varlen

    from glmtuner.kernels import segment_attention as segments

    plain, runs = varlen.varlen_attn, segments._kernel_runs

    def varlen_attn(
        query: Any, key: Any, value: Any, bounds: Any, _: Any, *lengths: int,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), **options: Any,
    ) -> Any:  # fmt: skip
        cuts = bounds.diff().tolist()
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        return spelled_out(query, key, value, cuts, window, scale).to(query.dtype)

    varlen.varlen_attn = varlen_attn
    segments._kernel_runs = lambda query: query.dtype in LIMITS
    try:
        yield
    finally:
        varlen.varlen_attn, segments._kernel_runs = plain, runs


def spelled_out(
    query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, lengths: list[int], window: int | None,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of each sample by itself in float32, [T, H, D], in words that everybody can check."""
    groups, parts = query_THD.shape[1] // key_TGD.shape[1], []
    for query, key, value in zip(
        *(states.float().split(lengths) for states in (query_THD, key_TGD, value_TGD)), strict=True
    ):
        length = query.shape[0]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * (scale if scale is not None else query.shape[-1] ** -0.5)
        places = torch.arange(length, device=query.device)
        ago = places[:, None] - places[None, :]
        hidden = (ago < 0) | (ago >= (window if window is not None else length))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    return torch.cat(parts)


def attention_cases(miniature: bool) -> dict[str, dict[str, Any]]:
    """Head sizes 64 to 256, grouped heads, windows, one long sample and many short ones."""
    draw, by = random.Random(0), 32 if miniature else 1
    several = [700 // by, 512 // by, 77, 5, 1]
    short = [draw.randint(1, 40) for _ in range(300 // by)]
    found: dict[str, dict[str, Any]] = {
        f"head size {size}": {"heads": (4, 4), "size": size, "lengths": several} for size in (64, 80, 96, 128, 192, 256)
    }
    found |= {f"{heads} heads on {groups}": {"heads": (heads, groups), "size": 128, "lengths": several}
              for heads, groups in ((8, 2), (32, 2), (4, 1))}  # fmt: skip
    found |= {f"window of {window}": {"heads": (8, 2), "size": 64, "lengths": several, "window": window}
              for window in (2, 16, 128 // (4 if miniature else 1))}  # fmt: skip
    found["another scale"] = {"heads": (4, 2), "size": 64, "lengths": several, "scale": 0.5}
    found["one long sample"] = {"heads": (8, 2), "size": 128, "lengths": [8192 // (by * 2)]}
    found["many short samples"] = {"heads": (8, 2), "size": 128, "lengths": short}
    return found


def attention(
    check: Check, name: str, heads: tuple[int, int], size: int, lengths: list[int], window: int | None = None,
    scale: float | None = None,
) -> None:  # fmt: skip
    """Output and gradients of the call that all samples share, in both half precisions."""
    worst = {dtype: attention_distance(check.device, dtype, heads, size, lengths, window, scale) for dtype in LIMITS}
    met = all(found <= LIMITS[dtype] for dtype, found in worst.items())
    check.add(
        f"attention, {name}", worst[torch.bfloat16], "difference / value", against="spelled out in float32",
        goal=f"at most {LIMITS[torch.bfloat16]:g}, in float16 {LIMITS[torch.float16]:g}", met=met,
        note=f"float16: {worst[torch.float16]:.1e}",
    )  # fmt: skip


def attention_distance(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, lengths: list[int], window: int | None,
    scale: float | None,
) -> float:  # fmt: skip
    """The largest distance of the output and the three gradients from those of attention spelled out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from glmtuner.data.segments import Segments
    from glmtuner.kernels.segment_attention import _segmented

    torch.manual_seed(1)
    total, states = sum(lengths), []
    for count, spread in ((heads[0], 2.0), (heads[1], 2.0), (heads[1], 1.0)):  # some scores stand out: a scale is seen
        drawn = spread * torch.randn(1, count, total, size, device=device)
        states.append(drawn.to(dtype).requires_grad_())
    slope = torch.randn(1, total, heads[0], size, device=device).to(dtype)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads[0] // heads[1], True
    found, _ = _segmented(ALL_ATTENTION_FUNCTIONS["sdpa"])(
        module, *states, None, segments=Segments(tuple(lengths), (0,) * len(lengths), tuple(lengths)),
        sliding_window=window, scaling=scale,
    )  # fmt: skip
    found.backward(slope)
    exact = [state.detach().float().requires_grad_() for state in states]
    wanted = spelled_out(*(state[0].transpose(0, 1) for state in exact), lengths, window, scale)
    wanted.backward(slope[0].float())
    pairs = [(found[0], wanted), *((mine.grad, theirs.grad) for mine, theirs in zip(states, exact, strict=True))]
    return max(distance(mine, theirs) for mine, theirs in pairs)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of the value."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)).item()


# -- whole models --------------------------------------------------------------------------------------------------------

VOCABULARY = 480
V1 = {"bos_token_id": 470, "eos_token_id": 471, "mask_token_id": 472, "gmask_token_id": 473, "pad_token_id": 3}


def models(miniature: bool) -> dict[str, Callable[[], nn.Module]]:
    """Small ones of every family that a fast path knows; the head size follows from the width."""
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
    """Of several lengths; each reads context, [gMASK], <sop>, answer, so that every family takes it."""
    draw, by = random.Random(1), 4 if miniature else 1
    rows = []
    for asked, answered in ((60, 90), (1, 3), (200 // by, 20), (33, 40)):
        question = [draw.randrange(10, 460) for _ in range(asked)]
        answer = [draw.randrange(10, 460) for _ in range(answered)]
        ids = [*question, V1["gmask_token_id"], V1["bos_token_id"], *answer, V1["eos_token_id"]]
        rows.append({"input_ids": ids, "labels": [-100] * (asked + 2) + [*answer, V1["eos_token_id"]]})
    return rows


def with_lora(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The model in bfloat16 with float32 adapters on all linear layers, as a run trains it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # biases and norms are not what they start as
    model = get_peft_model(model.bfloat16(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).to(device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    model.config.use_cache = False
    return model.train()


def learned(model: nn.Module, batch: dict[str, Any], half: bool) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of all adapters in one row."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        loss = model(**moved).loss
    loss.backward()
    grads = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(grads)


def model_paths(check: Check, name: str, build: Callable[[], nn.Module]) -> None:
    """Each fast path alone and all together; and whether a run would take them."""
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
    flat = SegmentCollator(places=position_function(base))
    wanted = learned(copy.deepcopy(model).float(), padded(rows), half=False)
    plain = learned(model, padded(rows), half=True)
    ways: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], nn.Module, Any]] = {
        "attention by sample": (enable_segment_attention, disable_segment_attention, base, flat),
        "fused LoRA": (fuse_lora, unfuse_lora, model, padded),
        "chunked cross-entropy": (enable_chunked_loss, disable_chunked_loss, base, padded),
    }
    for way, (take, forget, whose, collate) in ways.items():
        take(whose)
        compare(check, f"{name}: {way}", learned(model, collate(rows), half=True), plain, wanted)
        forget(whose)
    for take, _, whose, _ in ways.values():
        take(whose)
    compare(check, f"{name}: all three", learned(model, flat(rows), half=True), plain, wanted)
    for _, forget, whose, _ in ways.values():
        forget(whose)
    if not has_liger(check):
        check.add(f"{name}: Liger", None, note="left out: there is no liger-kernel, or no GPU for its kernels")
    elif "Mistral" in name:
        check.add(f"{name}: Liger", None, note="left out: its kernels for Mistral are liger-kernel's own, not ours")
    else:
        from glmtuner.kernels.liger import enable_liger, restore_modules

        enable_liger(base, {})
        compare(check, f"{name}: Liger", learned(model, padded(rows), half=True), plain, wanted)
        for take, _, whose, _ in ways.values():
            take(whose)
        compare(check, f"{name}: Liger and all three", learned(model, flat(rows), half=True), plain, wanted)
        restore_modules()
    model = with_lora(build, check.device)
    taken = choose_optimizations(
        model, short_samples(rows), padded, autocast=lambda: torch.autocast(check.device.type, torch.bfloat16)
    )
    count = sum((taken.collate is not padded, taken.chunks_loss, taken.fuses_lora))
    check.count(f"{name}: fast paths that a run takes", count, 3)


def has_liger(check: Check) -> bool:
    return check.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def compare(
    check: Check, what: str, found: tuple[float, torch.Tensor], plain: tuple[float, torch.Tensor],
    wanted: tuple[float, torch.Tensor], note: str = "",
) -> None:  # fmt: skip
    """Record how far loss and gradients are from float32, beside the plain path."""
    mine, theirs = distance(found[1], wanted[1]), distance(plain[1], wanted[1])
    loss, own = (abs(it[0] - wanted[0]) / wanted[0] for it in (found, plain))
    met = mine <= AS_EXACT * theirs + SLACK and loss <= AS_EXACT * own + SLACK
    check.add(
        what, mine, "difference / gradient", beside=theirs, against="the plain path", goal=f"at most {AS_EXACT:g} times that",
        met=met, note="; ".join([f"loss off by {loss:.1e}, plain {own:.1e}", *filter(None, [note])]),
    )  # fmt: skip


def compiled(check: Check) -> None:
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
    wanted = [learned(exact, padded(part), half=False) for part in sizes.values()]
    plain = [learned(model, padded(part), half=True) for part in sizes.values()]
    enable_segment_attention(base)
    enable_chunked_loss(base)
    fuse_lora(model)
    flat = SegmentCollator(places=position_function(base))
    started = time.perf_counter()
    for block in base.model.layers:
        block.compile(dynamic=True, **({"backend": "eager"} if check.miniature else {}))
    found = [learned(model, flat(part), half=True) for part in sizes.values()]
    note = f"compiled in {time.perf_counter() - started:.0f} s"
    for size, mine, theirs, reference in zip(sizes, found, plain, wanted, strict=True):
        compare(check, f"GLM: compiled blocks and all three{size}", mine, theirs, reference, note)
