"""What a model's modules tell, of every architecture of the matrix: blocks, attention, MLPs, towers, and LoRA's default targets.

The values to compare with are those of transformers and PEFT: the config's number of layers, which weights get a gradient from
text, which layers PEFT adapts by itself, and which adapters learn.
"""

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import ARCHITECTURES, MULTIMODAL, built, config_of

from glmtuner.errors import ConfigError
from glmtuner.families.family import ROUTES, Family
from glmtuner.families.structure import family_from_structure

torch.set_num_threads(1)
IDS = torch.arange(2, 42).view(2, 20)
WITHOUT_ATTENTION = {"mamba", "mamba2", "falcon_mamba"}
MIXED = [
    "jamba",
    "bamba",
    "lfm2",
    "lfm2_moe",
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "recurrent_gemma",
    "olmo_hybrid",
    "minimax",
]
TOWERS = ["gemma3", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "llava",
          "internvl", "mistral3"]  # fmt: skip


def on_meta(name: str) -> Any:
    if name in MULTIMODAL:
        return built(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name))


def names_in(modules: list[nn.Module], block: nn.Module) -> list[str]:
    paths = {id(module): path for path, module in block.named_modules()}
    return [paths[id(module)] for module in modules]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_blocks_with_attention_and_an_mlp(name: str) -> None:
    model = on_meta(name)
    family = family_from_structure(model)
    blocks = family.blocks(model)
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    assert bool(family.towers) == (name in MULTIMODAL)
    assert any(family.projections_in(block) for block in blocks) == (name not in WITHOUT_ATTENTION)
    assert all(family.mlps_in(block) for block in blocks) == (name not in WITHOUT_ATTENTION)
    assert family.lora_targets and {*family.lora_targets} <= {*family.linears}
    for block in blocks:
        inside = {id(each) for mlp in family.mlps_in(block) for each in mlp.modules()}
        assert inside.isdisjoint(id(each) for each in family.projections_in(block))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jamba", [(None, [], ["feed_forward"]), ("self_attn", "qkv", ["feed_forward"])]),
        ("bamba", [(None, [], ["feed_forward"]), ("self_attn", "qkv", ["feed_forward"])]),
        ("granitemoehybrid", [(None, [], ["block_sparse_moe", "shared_mlp"]), ("self_attn", "qkv", ["block_sparse_moe", "shared_mlp"])]),
        ("recurrent_gemma", [(None, [], ["mlp_block"]), ("temporal_block", "qkv", ["mlp_block"])]),
        ("qwen3_next", [("linear_attn", ["in_proj_qkvz"], ["mlp"]), ("self_attn", "qkv", ["mlp"])]),
        ("olmo_hybrid", [("linear_attn", "qkv", ["mlp"]), ("self_attn", "qkv", ["mlp"])]),
        ("rwkv", [("attention", ["key", "value", "receptance"], ["feed_forward"])] * 2),
        ("opt", [("self_attn", "kvq", ["fc1", "fc2"])] * 2),
        ("gpt_neo", [("attn.attention", "kvq", ["mlp"])] * 2),
        ("jetmoe", [("self_attention", ["kv_proj"], ["mlp"])] * 2),
        ("mamba", [(None, [], [])] * 2),
    ],
)  # fmt: skip
def test_each_block_of_a_hybrid_is_read(name: str, expected: list[Any]) -> None:
    model = on_meta(name)
    family = family_from_structure(model)
    for block, (attention, projections, mlps) in zip(family.blocks(model), expected, strict=True):
        found = family.attention_in(block)
        assert (names_in([found], block)[0] if found is not None else None) == attention
        names = [f"{letter}_proj" for letter in projections] if isinstance(projections, str) else projections
        assert names_in(family.projections_in(block), block) == [f"{attention}.{each}" for each in names]
        assert names_in(family.mlps_in(block), block) == mlps


def adapted_by_peft(model: Any, **targets: Any) -> set[str]:
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    return {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mistral", "gemma2", "phi", "gpt2", "gptj", "gpt_neo", "gpt_neox", "bloom", "mpt", "falcon", "codegen", "opt",
             "stablelm", "gpt_bigcode", "rwkv"]
)  # fmt: skip
def test_the_default_is_what_peft_adapts_by_itself(name: str) -> None:
    family = family_from_structure(on_meta(name))
    assert adapted_by_peft(built(name), target_modules=[*family.lora_targets]) == adapted_by_peft(built(name))


@pytest.mark.parametrize("name", [*MIXED, "mamba2", "rwkv", "hunyuan_v1_moe", "llama4_text", "glm4v_moe", "qwen3_5"])
def test_each_layer_of_all_learns(name: str) -> None:
    """The gradient of a LoRA's B is that of the layer's output, which is zero only where the layer's own forward is not used."""
    model = built(name)
    family = family_from_structure(model)
    frozen = family.frozen_linears(model)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in frozen
             and family.is_in_blocks(path) and path.rpartition(".")[2] in family.linears]  # fmt: skip
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=paths))
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    idle = [path for path, value in adapted.named_parameters() if ".lora_B" in path and not value.grad.abs().max() > 0]
    assert paths and not idle


def test_what_is_left_out_of_all_would_not_learn() -> None:
    model = built("jamba")
    family = family_from_structure(model)
    (path,) = (path for path, why in family.frozen_linears(model).items() if why != ROUTES)
    assert path == "model.layers.0.mamba.dt_proj"
    assert family.left_out["dt_proj"].startswith("JambaMambaMixer has code that multiplies by its weight itself")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[path]))
    with pytest.raises(RuntimeError, match="does not require grad"):
        adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def test_a_layer_is_not_left_out_for_a_way_that_the_model_does_not_take() -> None:
    """BLOOM's code reads the weight of its output projection only if its products are sliced."""
    family = family_from_structure(on_meta("bloom"))
    assert "dense" in family.other_linears and not family.left_out


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_the_weights_that_text_gives_no_gradient(name: str) -> None:
    model = built(name)
    towers = tuple(f"{tower}." for tower in family_from_structure(model).towers)
    model(input_ids=IDS, labels=IDS).loss.backward()
    without = {path for path, value in model.named_parameters() if value.grad is None}
    assert without == {path for path, _ in model.named_parameters() if path.startswith(towers)}


def test_a_model_without_a_list_of_blocks_is_one_paragraph() -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config_of("llama"))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(
        ConfigError, match=r"model\.family=auto: LlamaForCausalLM has no list of blocks, .* model\.family="
    ):
        family_from_structure(model)


@pytest.mark.parametrize("name", [*MIXED, "deepseek_v3", "glm_moe_dsa", "gpt_neox", "gpt_oss"])
def test_routers_are_no_part_of_all(name: str) -> None:
    model = on_meta(name)
    family: Family = family_from_structure(model)
    assert not any(
        re.search(r"(^|_)(router|gate|wg)$", each)
        for each in family.linears
        if each not in ("output_gate", "shared_expert_gate")
    )
