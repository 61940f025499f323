"""Model FLOPs utilization, against values worked out by hand."""

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, MixtralConfig, MixtralForCausalLM
from zoo import built

from glmtuner.config.groups import LayerPart
from glmtuner.families import family_named
from glmtuner.finetuning.freeze import Freeze
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.lora import Lora
from glmtuner.training.throughput import ModelFlops, attention_widths, model_flops, peak_flops, utilization

# of a block of `small`: q 8x8, k and v 4x8 each, o 8x8, gate and up 2x(16x8), down 8x16
BLOCK = 64 + 32 + 32 + 64 + 256 + 128
HEAD = 8 * 40


def small(tied: bool = False) -> GlmForCausalLM:
    config = GlmConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=16,
        vocab_size=40,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return GlmForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_full_training_computes_six_flops_a_weight_and_the_embedding_is_looked_up(tied):
    found = model_flops(Full(finetuning_type="full").attach(small(tied), family_named("glm")))
    # attention: 2 products of 2 FLOPs over 8 numbers, forward and twice that backward, half of them masked, 3 blocks
    assert found == ModelFlops(per_token=6 * (3 * BLOCK + HEAD), per_squared_length=3 * (2 * 2 * 8) * 3 // 2)


def test_lora_computes_four_flops_a_frozen_weight_and_six_a_trained_one():
    lora = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0, lora_target=["q_proj"])
    found = model_flops(lora.attach(small(), family_named("glm")))
    adapters = 3 * (2 * 8 + 8 * 2)
    assert found.per_token == 4 * (3 * BLOCK + HEAD) + 6 * adapters


def test_no_gradient_passes_below_the_first_trained_block():
    freeze = Freeze(finetuning_type="freeze", num_layer_trainable=1, name_module_trainable=LayerPart.mlp)
    found = model_flops(freeze.attach(small(), family_named("glm")))
    mlp = 256 + 128
    assert found.per_token == 2 * 2 * BLOCK + 4 * (BLOCK - mlp) + 6 * mlp + 4 * HEAD
    assert found.per_squared_length == (2 * 2 * 8) * (3 + 2 * 1) // 2


def test_experts_that_the_model_does_not_show_are_not_guessed():
    model = small()
    model.config.num_experts = 4
    assert model_flops(model) is None


def test_a_token_meets_the_experts_that_it_is_routed_to():
    """2 of 5 experts of 3 matrices 8x12, and the whole router."""
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    config = MixtralConfig(
        **sizes, intermediate_size=12, vocab_size=40, num_local_experts=5, num_experts_per_tok=2, pad_token_id=0
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    block = 64 + 32 + 32 + 64 + 5 * 8 + 2 * (3 * 8 * 12)
    found = model_flops(Full(finetuning_type="full").attach(model, family_named("glm")))
    assert found == ModelFlops(per_token=6 * (3 * block + HEAD), per_squared_length=3 * (2 * 2 * 8) * 3 // 2)


def test_attention_counts_the_widths_that_it_has_in_the_layers_that_have_it():
    """Latent attention: 4 heads, queries of 12 and values of 8. A hybrid: 1 of 2 blocks has attention. Neither: none."""
    widths = {
        name: sum(attention_widths(built(name)).values()) for name in ("deepseek_v3", "jamba", "bloom", "mamba", "rwkv")
    }
    assert widths == {
        "deepseek_v3": 2 * 4 * (12 + 8),
        "jamba": 4 * (8 + 8),
        "bloom": 2 * 4 * (8 + 8),
        "mamba": 0,
        "rwkv": 0,
    }
    for name in ("mamba", "rwkv"):
        found = model_flops(built(name))
        assert found is not None and found.per_token > 0 and found.per_squared_length == 0


def test_tables_that_are_looked_up_are_no_products():
    model = built("gpt2")  # learned positions, tied embeddings
    block = sum(value.numel() for value in model.transformer.h[0].parameters() if value.dim() > 1)
    found = model_flops(model.requires_grad_(True))
    assert found is not None and found.per_token == 6 * (2 * block + model.lm_head.weight.numel())


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(gpu, tflops):
    assert peak_flops(gpu) == (tflops and tflops * 1e12)


def test_utilization_is_the_share_of_all_gpus():
    flops = ModelFlops(per_token=10**9, per_squared_length=10**6).of(
        tokens=31_200, squared_lengths=31_200_000
    )  # 6.24e13
    assert utilization(flops, seconds=2.0, gpu="NVIDIA A100-SXM4-80GB", gpus=1) == pytest.approx(0.1)
    assert utilization(flops, seconds=2.0, gpu="NVIDIA A100-SXM4-80GB", gpus=2) == pytest.approx(0.05)
    assert utilization(flops, seconds=2.0, gpu="Riva TNT2", gpus=1) is None
