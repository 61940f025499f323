"""How many parameters a model has, and how many of them compute a token: against published numbers and against gradients."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import built

from glmtuner.errors import ConfigError
from glmtuner.families.experts import expert_parameters
from glmtuner.models.positions import check_positions, most_positions
from glmtuner.models.sizes import active_parameters, active_summary, parameter_count, routed_shares, towers

# The sizes of the published config.json where they differ from the defaults of transformers' classes.
AIR = {"head_dim": 128, "attention_bias": True}
LARGE = {
    "hidden_size": 5120, "num_hidden_layers": 92, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
    "first_k_dense_replace": 3, "head_dim": 128, "attention_bias": True, "use_qk_norm": True,
}  # fmt: skip
# What the makers publish, in billions: parameters, and those that are active. The layers for multi-token prediction, which are
# not built, are in the maker's number for GLM-4.5.
PUBLISHED = {
    "GLM-4.7-Flash": ("glm4_moe_lite", {}, 30, 3),
    "GLM-4.5-Air": ("glm4_moe", AIR, 106, 12),
    "GLM-4.5, 4.6, 4.7": ("glm4_moe", LARGE, 355, 32),
    "GLM-5": ("glm_moe_dsa", {}, 744, 40),
}
EXPERTS = (
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "gpt_oss", "deepseek_v2",
    "ernie4_5_moe", "hunyuan_v1_moe", "granitemoe", "minimax", "minimax_m2", "jamba", "lfm2_moe", "qwen3_next", "granitemoehybrid",
)  # fmt: skip


def on_meta(kind: str, sizes: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name):
    kind, sizes, total, active = PUBLISHED[name]
    model = on_meta(kind, sizes)
    assert parameter_count(model) == pytest.approx(total * 1e9, rel=0.01)
    assert active_parameters(model) == pytest.approx(active * 1e9, abs=0.5e9)


@pytest.mark.parametrize("name", EXPERTS)
def test_active_are_the_experts_that_a_token_gives_a_gradient(name):
    """By plain transformers: a token's gradient is 0 in every expert to which it is not routed."""
    model = built(name).eval()
    model.config._experts_implementation = "eager"
    model(input_ids=torch.tensor([[17]]), use_cache=False).logits.float().square().sum().backward()
    owners = {path.rpartition(".")[0]: value.shape[0] for path, value in expert_parameters(model).items()}
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    expected = 0
    for path, value in model.named_parameters():
        owner = next((owner for owner in owners if path.startswith(f"{owner}.")), None)
        if value in ends:
            continue
        if owner is None:
            expected += value.numel()
        else:
            used = value.grad.reshape(owners[owner], -1).abs().sum(1) > 0
            expected += value.numel() // owners[owner] * int(used.sum())
    assert active_parameters(model) == expected < parameter_count(model)


def test_without_experts_there_is_nothing_to_tell_and_unknown_numbers_are_not_guessed():
    assert routed_shares(built("llama")) == {} and active_summary(built("llama")) is None
    model = built("deepseek_v2")
    assert active_summary(model) == f"{active_parameters(model):,} a token, without embeddings and output head"
    model.config.num_experts_per_tok = None
    assert active_parameters(model) is None
    assert active_summary(model) == "unknown, since config.json does not say how many experts compute a token"


@pytest.mark.parametrize("target", ["q_proj", "experts"])
def test_adapters_of_experts_are_shared_as_the_experts_are(target):
    from peft import LoraConfig, get_peft_model

    given: Any = (
        {"target_modules": [target]}
        if target == "q_proj"
        else {"target_parameters": ["experts.gate_up_proj"], "target_modules": []}
    )
    model = built("mixtral")
    before, share = active_parameters(model), 0.5
    adapted = get_peft_model(model, LoraConfig(r=2, **given))
    added = parameter_count(adapted, trained=True)
    assert added > 0
    assert active_parameters(adapted) == before + (added if target == "q_proj" else round(share * added))


def test_packed_weights_count_as_what_they_stand_for():
    from bitsandbytes.functional import quantize_4bit

    from glmtuner.models.quantized_experts import From4Bits, store

    model = built("mixtral")
    whole, active = parameter_count(model), active_parameters(model)
    experts = model.model.layers[0].mlp.experts
    packed, state = quantize_4bit(experts.gate_up_proj.data, quant_type="nf4")
    experts.gate_up_proj = torch.nn.Parameter(packed, requires_grad=False)
    store(experts, "gate_up_proj", From4Bits(state))
    assert parameter_count(model) == whole and active_parameters(model) == active


def test_towers_for_images_compute_no_text():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    unused = {value for tower in towers(model) for value in tower.parameters()}
    assert unused == {
        value for path, value in model.named_parameters() if "vision_tower" in path or "multi_modal" in path
    }
    decoder = model.model.language_model
    embedding = decoder.get_input_embeddings().weight
    assert active_parameters(model) == sum(value.numel() for value in decoder.parameters() if value is not embedding)


@pytest.mark.parametrize(
    ("name", "most"), [("gpt2", 512), ("opt", 512), ("gpt_neo", 512), ("gptj", 512), ("llama", None), ("bloom", None)]
)
def test_learned_positions_end_and_computed_ones_do_not(name, most):
    """Plain transformers computes a row of that length, and fails at a longer one."""
    model = built(name).eval()
    assert most_positions(model) == most
    check_positions(model, 512)
    with torch.no_grad():
        model(input_ids=torch.full((1, 512), 5))
        if most is None:
            model(input_ids=torch.full((1, 600), 5))
            check_positions(model, 600)
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 600), 5))
    with pytest.raises(
        ConfigError, match=r"longest row has 600 tokens, and \w+ has positions for 512 .*; type data\.max_source_length"
    ):
        check_positions(model, 600)
