"""Batches without padding on what models do besides causal attention: plain transformers, each sample alone, is the reference."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.kernels.choose import choose_optimizations
from glmtuner.kernels.exact import PLANTED, in_float32, loss_problem
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.kernels.segment_attention import disable_segment_attention, enable_segment_attention
from glmtuner.kernels.segment_states import by_length

VOCABULARY = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
STATES = {
    "state_size": 8,
    "n_groups": 1,
    "expand": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "time_step_rank": 4,
}
# shorter than the samples, and given to the attention function, only to the mask, or to neither
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "phimoe": {"sliding_window": 6, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "mixtral": {"sliding_window": 6},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 6, **MIXED},
    "starcoder2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, **MIXED},
    "gpt_oss": {"sliding_window": 6, **MIXED},  # with attention sinks
    "gemma2": {"sliding_window": 6, **MIXED},  # with eager attention, whose scores are capped
    "llama4_text": {
        "attention_chunk_size": 7, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 48, "moe_layers": [1],
    },
}  # fmt: skip
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": STATES,
    "mamba2": STATES | {"num_heads": 8, "chunk_size": 8},
    "falcon_mamba": STATES,
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 6},
    "jamba": STATES | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": STATES | {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "granitemoehybrid": STATES | {"layer_types": ["mamba", "attention"]},
}
KNOWN = WINDOWS | RECURRENT


def built(name: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    default = AutoConfig.for_model(name)
    known = {*vars(default), *dir(type(default)), *getattr(default, "attribute_map", {})}
    sizes = {key: value for key, value in (SIZES | EXPERTS).items() if key in known}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **sizes | KNOWN.get(name, {}) | values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # so that every token counts
    return model.to(dtype).eval()


def samples() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in (23, 31, 3, 17, 9)]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in rows]


def learned(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def alone(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """The mean loss of the labelled tokens, each sample in a forward pass of its own."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        count += int(labels.ne(-100).sum())
    return total / count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradients_are_those_of_each_sample_alone(name, checkpointing):
    model = built(name)
    loss = alone(model, samples())
    wanted = learned(model, loss)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = choose_optimizations(model, samples()[:2], Collator(pad_id=0))
    assert isinstance(chosen.collate, SegmentCollator), chosen.left_out
    for batch in (samples(), [samples()[:3], samples()[3:]]):  # one by one, and in packs
        model.train(checkpointing)  # nothing is computed again in evaluations; there is no dropout
        found = model(**chosen.collate(batch)).loss
        assert found.item() == pytest.approx(loss.item(), abs=2e-5)
        gradients = learned(model, found)
        size = max(float(each.abs().max()) for each in wanted.values())
        for weight, gradient in wanted.items():
            assert float((gradients[weight] - gradient).abs().max()) <= 1e-4 * size, weight
    disable_segment_attention(model)
    model.eval()
    assert "forward" not in {key for module in model.modules() for key in module.__dict__ if module is not model}
    assert alone(model, samples()).item() == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_a_segment_does_not_see_the_one_before(name):
    model = built(name)
    enable_segment_attention(model)
    first, second, other = samples()[:3]
    flat = SegmentCollator()
    with torch.no_grad():
        inputs = [{**flat([before, second])} for before in (first, {**first, "input_ids": first["input_ids"][::-1]})]
        for batch in inputs:
            batch.pop("labels")
        one, two = (model(**batch).logits[0, len(first["input_ids"]) :] for batch in inputs)
        batch = flat([other, second])
        batch.pop("labels")
        three = model(**batch).logits[0, len(other["input_ids"]) :]
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(one, three, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gptj", "glm_moe_dsa", "bloom"])
def test_attention_in_a_model_s_own_code_keeps_padded_rows(name):
    latent = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 4,
              "index_head_dim": 8, "index_n_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
              "num_experts_per_tok": 2}  # fmt: skip
    old = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    model = built(name, **{"glm_moe_dsa": latent, "gptj": old, "bloom": {}}[name])
    plain = Collator(pad_id=0)
    chosen = choose_optimizations(model, samples()[:2], plain)
    assert chosen.collate is plain
    assert (
        "does not compute attention through transformers' AttentionInterface"
        in chosen.left_out[FastPath.without_padding]
    )


def test_segments_of_similar_length_are_rows_of_one_call():
    lengths = (100, 3, 64, 2, 127, 5, 63)
    groups = by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(7))
    for group in groups:
        assert max(lengths[index] for index in group) < 2 * min(lengths[index] for index in group)


# -- in half precision -----------------------------------------------------------------------------------------------------

bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
PRECISIONS = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16": (torch.bfloat16, contextlib.nullcontext),
    "autocast": (torch.float32, bf16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "jetmoe", "phimoe", "jamba"]
)
def test_a_router_s_loss_stays_and_counts_tokens_only(name, precision):
    """In bfloat16 it is less than the rounding that was allowed."""
    dtype, autocast = PRECISIONS[precision]
    model = built(name, dtype, output_router_logits=True)
    padded = Collator(pad_id=0)
    with torch.no_grad(), autocast():
        wanted = model(**padded(samples())).loss.item()
        without = alone(model, samples()).item()
    assert wanted - without > 5e-4
    chosen = choose_optimizations(model, samples()[:2], padded, autocast=autocast)
    assert "auxiliary loss" in chosen.left_out[FastPath.chunked_loss]
    assert isinstance(chosen.collate, SegmentCollator)
    with torch.no_grad(), autocast():
        assert model(**chosen.collate(samples())).loss.item() == pytest.approx(
            wanted, abs=2e-5 if precision == "float32" else (wanted - without) / 2
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("gemma2", {}, "scales or caps"),
        ("cohere", {"logit_scale": 0.999}, "scales or caps"),
        ("granite", {"logits_scaling": 1.001}, "scales or caps"),
        ("recurrent_gemma", {}, "scales or caps"),
        ("minicpm3", {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                      "num_key_value_heads": 4, "dim_model_base": 16}, "changes its last hidden states"),
    ],
)  # fmt: skip
def test_what_happens_around_the_head_is_seen_however_little_it_does(name, values, reason, precision):
    dtype, autocast = PRECISIONS[precision]
    model = built(name, dtype, **values)
    chosen = choose_optimizations(model, samples()[:2], Collator(pad_id=0), autocast=autocast)
    assert reason in chosen.left_out[FastPath.chunked_loss]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "mamba", "qwen3_next", "phimoe"])
def test_a_plain_loss_is_computed_in_chunks_in_every_precision(name, precision):
    dtype, autocast = PRECISIONS[precision]
    model = built(name, dtype).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    chosen = choose_optimizations(model, samples()[:2], Collator(pad_id=0), autocast=autocast)
    assert FastPath.chunked_loss in chosen.enabled and FastPath.without_padding in chosen.enabled
    assert torch.equal(torch.get_rng_state(), state), "what the training draws is what it was"
    assert model.training
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_an_error_below_the_rounding_of_bfloat16_is_found():
    model = built("mistral", torch.bfloat16)
    plain, off = type(model).forward, 1.002

    class Off(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            out = plain(self, *args, **options)
            if "segments" in options and out.loss is not None:
                out.loss = out.loss * off
            return out

    model.__class__ = Off
    chosen = choose_optimizations(model, samples()[:2], Collator(pad_id=0))
    assert "in float32 would be" in chosen.left_out[FastPath.without_padding]


def test_float32_is_what_the_same_weights_compute_and_leaves_them_as_they_were():
    model = built("mixtral", torch.bfloat16, tie_word_embeddings=True)
    pointers = {name: each.data_ptr() for name, each in model.named_parameters()}
    ids = torch.tensor([samples()[0]["input_ids"]])
    wide = built("mixtral", torch.bfloat16, tie_word_embeddings=True).float()
    with torch.no_grad():
        with in_float32(model):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, wide(input_ids=ids).logits, atol=1e-6, rtol=1e-6)
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == pointers
    with pytest.raises(ValueError), in_float32(model):
        raise ValueError
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == pointers


def test_planted_logits_are_above_what_a_new_model_gives():
    model = built("gemma2")
    assert model.config.final_logit_softcapping < PLANTED
    assert loss_problem(built("mistral"), built("mistral"), Collator(pad_id=0)(samples())) is not None, (
        "no hook is reached"
    )
