"""What `finetuning.lora_target` and freeze tuning mean on models whose blocks differ, and on those with towers."""

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from zoo import built, write_checkpoint

from glmtuner.cli.main import main
from glmtuner.config.groups import LayerPart
from glmtuner.errors import ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.freeze import Freeze
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.targets import adapted_layers, expression
from glmtuner.launch.plan import adapters_summary, sizes

torch.set_num_threads(1)
IDS = torch.arange(2, 42).view(2, 20)


def adapted(name: str, *targets: str) -> Any:
    model = built(name)
    family = family_from_structure(model)
    lora = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0, lora_target=[*targets])
    return lora.resolved(family, 2).attach(model, family)


def layers_of(model: Any) -> set[str]:
    return {
        path.partition(".lora_A")[0].removeprefix("base_model.model.")
        for path, _ in model.named_parameters()
        if ".lora_A" in path
    }


def test_a_name_means_the_language_model_and_peft_reads_the_same(tmp_path: Any) -> None:
    """Gemma-3's tower has layers of the same names."""
    model = adapted("gemma3", "q_proj")
    expected = {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert layers_of(model) == expected
    with torch.no_grad():
        for path, value in model.named_parameters():
            if ".lora_B" in path:
                value += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(built("gemma3"), tmp_path)
    assert layers_of(loaded) == expected
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.mamba.in_proj", "v_proj"], ["model.layers.0.mamba.in_proj", "model.layers.1.self_attn.v_proj"]),
        ([r".*layers\.\d+\.self_attn\.[qk]_proj"], ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]),
        (["lm_head"], ["lm_head"]),
        (["router"], ["model.layers.1.feed_forward.router"]),
        ([], [f"model.layers.1.self_attn.{letter}_proj" for letter in "kqv"]),
        ([r".*mamba\.(in|dt)_proj"], ["model.layers.0.mamba.in_proj"]),
    ],
)  # fmt: skip
def test_targets_are_names_ends_of_paths_and_expressions(targets: list[str], layers: list[str]) -> None:
    assert sorted(path for path in layers_of(adapted("jamba", *targets))) == sorted(layers)


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("jamba", "in_prj", r"lora_target=\[in_prj\]: no layer of this model is named 'in_prj'; did you mean 'in_proj'\?"),
        ("jamba", "layers.7.self_attn.q_proj", r"no layer of this model is named 'layers\.7\.self_attn\.q_proj'"),
        ("jamba", "dt_proj", r"model\.layers\.0\.mamba\.dt_proj would learn nothing: JambaMambaMixer has code .* name others: q_proj"),
        ("mamba", "x_proj", r"x_proj would learn nothing: MambaMixer has code that multiplies .* name others: in_proj"),
        ("qwen3_vl", "qkv", r"model\.visual\.blocks\.0\.attn\.qkv would learn nothing: training on text gives it no gradient; .*q_proj"),
        ("qwen3_vl", r".*visual.*\.qkv", r"would learn nothing: training on text gives it no gradient"),
        ("qwen3_vl", r".*\.qkv_proj", r"lora_target=\[\.\*\\\.qkv_proj\]: .* type a regular expression"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_be_is_one_paragraph(name: str, target: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted(name, target)


def test_a_model_without_known_projections_needs_names_only_for_lora() -> None:
    """The layers of xlstm's kind have names of their own; everything but the default target works."""
    model = built("llama")
    for layer in model.model.layers:
        for old in ("q_proj", "k_proj", "v_proj"):
            layer.self_attn.add_module(f"{old}_own", layer.self_attn._modules.pop(old))
    model.config.model_type = "own"
    family = family_from_structure(model)
    lora = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0, lora_target=[])
    with pytest.raises(
        ConfigError,
        match=r"lora_target=\[\]: no projections .* so there is no default; name layers .*q_proj_own.*\[all\]",
    ):
        lora.resolved(family, 2)
    assert len(family.blocks(model)) == 2 and family.mlps_in(family.blocks(model)[0])
    Full(finetuning_type="full").attach(model, family)


def test_what_is_excluded_is_short_and_exact() -> None:
    paths = [f"visual.blocks.{index}.attn.qkv" for index in range(30)]
    assert expression(paths, []) == r"visual\.blocks\.\d+\.attn\.qkv"
    found = expression(paths[1:], paths[:1])
    assert found is not None and [path for path in paths if re.fullmatch(found, path)] == paths[1:]
    assert expression([], paths) is None


def test_the_plan_counts_what_was_hit() -> None:
    model = adapted("jamba", "all")
    family = family_from_structure(built("jamba"))
    found = adapted_layers(model)
    assert (
        found["q_proj"] == 1 and found["in_proj"] == 1 and found["down_proj"] == 1 and found["experts.down_proj"] == 1
    )
    assert re.search(r"q_proj ×1, .*; left out: dt_proj \(JambaMambaMixer has code", adapters_summary(found, family))
    assert adapters_summary({"q_proj": 2}, family) == "q_proj ×2"


def test_the_plan_counts_the_language_model_apart_from_its_towers() -> None:
    plain = built("gemma3")
    language = sum(each.numel() for each in plain.model.language_model.parameters())  # its head is tied
    whole = sum(each.numel() for each in plain.parameters())
    model = adapted("gemma3", "q_proj")
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert sizes(model, family_from_structure(plain)) == (trained, language + trained, whole - language)


# Full and freeze tuning


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "glm_ocr"])
def test_full_tuning_trains_what_text_reaches(name: str) -> None:
    model = Full(finetuning_type="full").attach(plain := built(name), family_from_structure(plain))
    trained = {path for path, value in model.named_parameters() if value.requires_grad}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert trained == {path for path, value in model.named_parameters() if value.grad is not None}


def frozen_but(name: str, part: LayerPart, count: int) -> set[str]:
    model = built(name)
    method = Freeze(finetuning_type="freeze", num_layer_trainable=count, name_module_trainable=part)
    family = family_from_structure(model)
    model = method.resolved(family, 2).attach(model, family)
    return {
        re.sub(r".*(layers|h|blocks)\.", "", path).removesuffix(".weight")
        for path, value in model.named_parameters()
        if value.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "part", "count", "trained"),
    [
        ("bamba", "qkv", 2, {f"1.self_attn.{each}_proj" for each in "qkv"}),
        ("bamba", "mlp", -1, {f"0.feed_forward.{each}_proj" for each in ("gate", "up", "down")}),
        ("qwen3_next", "qkv", 2, {"0.linear_attn.in_proj_qkvz", *(f"1.self_attn.{each}_proj" for each in "qkv")}),
        ("opt", "mlp", 1, {"1.fc1", "1.fc1.bias", "1.fc2", "1.fc2.bias"}),
        ("granitemoehybrid", "mlp", 1, {
            "1.block_sparse_moe.router", "1.block_sparse_moe.experts.down_proj", "1.block_sparse_moe.experts.gate_up_proj",
            "1.shared_mlp.input_linear", "1.shared_mlp.output_linear",
        }),
        ("rwkv", "qkv", 1, {"1.attention.key", "1.attention.value", "1.attention.receptance"}),
        ("recurrent_gemma", "qkv", -2, {f"1.temporal_block.{each}_proj" for each in "qkv"}),
    ],
)  # fmt: skip
def test_freeze_trains_the_part_where_a_block_has_it(
    name: str, part: str, count: int, trained: set[str], capsys: Any
) -> None:
    assert frozen_but(name, LayerPart(part), count) == trained
    told = capsys.readouterr().out
    assert ("layer 0 (BambaDecoderLayer) has no projections of queries, keys and values" in told) == (
        name == "bamba" and part == "qkv"
    )


@pytest.mark.parametrize(
    ("name", "part", "count", "told"),
    [
        (
            "bamba",
            "qkv",
            -1,
            r"qkv: layer 0 \(BambaDecoderLayer\) has no projections .*; type finetuning\.num_layer_trainable=-2",
        ),
        ("mamba", "mlp", 2, r"mlp: layers 0, 1 \(MambaBlock\) have no MLP; type finetuning=lora or finetuning=full"),
        (
            "mamba",
            "qkv",
            1,
            r"qkv: layer 1 \(MambaBlock\) has no projections .*; type finetuning=lora or finetuning=full",
        ),
    ],
)
def test_freeze_of_layers_without_the_part_says_what_to_type(name: str, part: str, count: int, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"finetuning\.name_module_trainable={told}"):
        frozen_but(name, LayerPart(part), count)


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        (
            "jamba",
            ["finetuning.lora_target=[in_prj]"],
            "no layer of this model is named 'in_prj'; did you mean 'in_proj'?",
        ),
        ("mamba", ["finetuning=freeze", "finetuning.num_layer_trainable=1"], "layer 1 (MambaBlock) has no MLP"),
    ],
)
def test_what_does_not_fit_is_told_before_the_weights_are_read(
    name: str, words: list[str], told: str, tmp_path: Any, capsys: Any
) -> None:
    base = write_checkpoint(name, tmp_path / "base")
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "1 + 1?", "output": "2"}\n', encoding="utf-8")
    model = ["model=causal_lm", f"model.model_name_or_path={base}", "model.dtype=float32", "trainer.use_cpu=true"]
    words = [*model, f"data.dataset={data}", "tracker=none", f"trainer.output_dir={tmp_path / 'run'}", *words]
    with patch("glmtuner.launch.run.load_trainable_model", side_effect=AssertionError("the weights are read")):
        assert main(words) == 2
    assert told in (shown := capsys.readouterr()).out + shown.err
