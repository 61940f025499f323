"""Initializations that change the base, saved as plain LoRA; and the keys of LoRA that exclude each other or name nothing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_bases import base, loss
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG
from glmtuner.finetuning.initial import start_at_quantization_error
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.peft import Peft, peft_settings
from glmtuner.finetuning.trained import trained_parameters

TARGETS = ["q_proj", "v_proj"]
CHANGES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {
        "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3.0},
    },
    "dora": {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["norm"]},
}  # fmt: skip


def lora(**values: object) -> Lora:
    return Lora(
        **{
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "lora_target": TARGETS,
            **values,
        }
    )


def attached(method: Lora, seed: int = 3) -> torch.nn.Module:
    model = base("qwen3")
    torch.manual_seed(seed)
    return method.attach(model, family_from_structure(model))


def train(model: torch.nn.Module) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for value in trained_parameters(model).values():
            value += 0.05 * torch.randn_like(value)


@pytest.mark.parametrize("name", CHANGES)
def test_an_initialization_that_changes_the_base_is_saved_as_plain_lora(tmp_path: Path, name: str) -> None:
    plain = base("qwen3")
    method = lora(**CHANGES[name])
    model = attached(method)
    assert loss(model) == pytest.approx(loss(plain), abs=1e-5)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(weight, plain.model.layers[0].self_attn.q_proj.weight)
    train(model)
    expected = loss(model)
    assert abs(expected - loss(plain)) > 1e-3
    method.save(model, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["init_lora_weights"] is True
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path)) == pytest.approx(expected, abs=1e-5)

    again = attached(method)
    method.restore(again, tmp_path)
    one, other = dict(model.named_parameters()), dict(again.named_parameters())
    assert one.keys() == other.keys() and all(torch.equal(one[each], other[each]) for each in one)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_plain_lora_is_that_of_peft_s_own_conversion(tmp_path: Path, how: str) -> None:
    method = lora(init_lora_weights=how)
    model = attached(method)
    train(model)
    method.save(model, tmp_path / "own")
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=how, task_type="CAUSAL_LM")
    theirs = get_peft_model(base("qwen3"), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "initial")
    own, converted = load_file(tmp_path / "own" / ADAPTER), load_file(tmp_path / "theirs" / ADAPTER)
    assert own.keys() == converted.keys() and all(torch.equal(own[each], converted[each]) for each in own)
    own, converted = (json.loads((tmp_path / each / ADAPTER_CONFIG).read_text()) for each in ("own", "theirs"))
    assert {each for each in own if own[each] != converted[each]} <= {"target_modules", "exclude_modules"}


def test_a_checkpoint_whose_factors_have_other_bits_gives_the_same_model(tmp_path: Path) -> None:
    """Another machine may give a singular vector the other sign, and other last bits."""
    method = lora(init_lora_weights="pissa")
    model = attached(method)
    train(model)
    method.save(model, tmp_path)
    saved = load_file(tmp_path / ADAPTER)
    for name in [each for each in saved if "lora_A" in each]:
        other = name.replace("lora_A", "lora_B")
        trained, first = saved[name].chunk(2, 0)
        trained_b, first_b = saved[other].chunk(2, 1)
        saved[name] = torch.cat([2 * trained, 2.0 * first]).contiguous()
        saved[other] = torch.cat([0.5 * trained_b, 0.5 * first_b + 0.01], 1).contiguous()
    save_file(saved, tmp_path / ADAPTER, metadata={"format": "pt"})
    expected = loss(PeftModel.from_pretrained(base("qwen3"), tmp_path))
    again = attached(method)
    method.restore(again, tmp_path)
    assert loss(again) == pytest.approx(expected, abs=1e-5)
    method.save(again, tmp_path / "again")
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path / "again")) == pytest.approx(expected, abs=1e-5)


def test_loftq_starts_at_the_best_low_rank_part_of_what_was_rounded_off(tmp_path: Path) -> None:
    """The rest has the norm of the singular values that a rank of 4 leaves out (Eckart and Young 1936)."""
    model = base("qwen3")
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    layer = model.model.layers[1].self_attn.q_proj
    whole = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_((whole * 4).round() / 4)
    adapted = lora().attach(model, family_from_structure(model))
    start_at_quantization_error(adapted)
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    error = whole - layer.base_layer.weight
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rest = np.sqrt((np.linalg.svd(error.detach().numpy(), compute_uv=False)[4:] ** 2).sum())
    assert float((error - update).norm()) == pytest.approx(rest, rel=1e-4)
    assert rest < 0.9 * float(error.norm())


def test_mica_trains_a_beside_the_smallest_directions_of_the_base(tmp_path: Path) -> None:
    plain, method = base("qwen3"), lora(init_lora_weights="mica")
    model = attached(method)
    assert all("lora_A" in name for name in trained_parameters(model)) and loss(model) == loss(plain)
    weight = plain.model.layers[1].self_attn.v_proj.weight.detach()
    kept = model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight
    smallest = np.linalg.svd(weight.numpy())[0][:, -4:]
    assert np.abs(np.abs(smallest.T @ kept.detach().numpy()) - np.eye(4)).max() < 1e-3
    train(model)
    method.save(model, tmp_path)
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path)) == pytest.approx(loss(model), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"init_lora_weights": "pisa"}, "finetuning.init_lora_weights=pisa; did you mean 'pissa'?"),
        ({"use_dora": True, "lora_bias": True}, "finetuning.lora_bias=true with finetuning.use_dora=true"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, "finetuning.lora_bias=true with finetuning.init_lora_weights=pissa"),
        ({"layers_pattern": ["layers"]}, "finetuning.layers_pattern without finetuning.layers_to_transform"),
        ({"lora_target": [".*q_proj"], "layers_to_transform": [0]}, "name the layers in the expression"),
        ({"rank_pattern": {"q_proj": 0}}, "finetuning.rank_pattern={q_proj: 0}: a rank is at least 1"),
        ({"alpha_pattern": {"(": 1.0}}, "'(' is not a regular expression"),
        ({"target_parameters": ["q_proj.weight"], "use_dora": True}, "finetuning.target_parameters with finetuning.use_dora=true"),
        ({"modules_to_save": ["lm_hed"]}, "finetuning.modules_to_save=[lm_hed]: no module of this model is named 'lm_hed'; did you mean 'lm_head'?"),
        ({"exclude_modules": ["v_prj"]}, "finetuning.exclude_modules=[v_prj]: no module of this model is named 'v_prj'; did you mean 'v_proj'?"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "No modules were targeted"),
        ({"layers_to_transform": [0, 2]}, "finetuning.layers_to_transform=[0, 2]: there is no layer 2; legal: 0 to 1"),
        ({"trainable_token_indices": [64]}, "there is no token 64; legal: 0 to 63"),
        ({"target_parameters": ["mlp.down_prj.weight"]}, "did you mean 'down_proj.weight'?"),
        ({"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}, "the whole module is trained already"),
        ({"rank_pattern": {"k_proj": 2}}, "finetuning.rank_pattern: no adapted layer matches 'k_proj'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_trained_is_one_paragraph(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        attached(lora(**values))


def test_excluded_names_are_left_out_beside_what_text_does_not_train() -> None:
    model = attached(lora(exclude_modules=["layers.0.self_attn.v_proj"]))
    adapted = {name.partition(".lora_A")[0][-24:] for name in trained_parameters(model) if "lora_A" in name}
    assert adapted == {
        "layers.0.self_attn.q_proj"[-24:],
        "layers.1.self_attn.q_proj"[-24:],
        "layers.1.self_attn.v_proj"[-24:],
    }


def test_half_precision_parts_are_refused() -> None:
    model = base("qwen3").to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"would be trained in half precision.*type model\.dtype=float32"):
        lora(modules_to_save=["lm_head"]).attach(model, family_from_structure(model))


@pytest.mark.parametrize(
    ("peft_type", "config", "told"),
    [
        ("VERRA", {}, "PEFT has no such method; did you mean 'VERA'?"),
        ("PREFIX_TUNING", {}, "type finetuning=p_tuning"),
        ("LORA", {}, "type finetuning=lora"),
        ("XLORA", {}, "it mixes several trained LoRA adapters"),
        ("ADAMSS", {"use_asa": True}, "a schedule of their own during a training, which is not called here; leave it out"),
        ("vera", {"rr": 4}, "unknown key finetuning.config.rr; did you mean 'r'? the fields of VeraConfig: r, "),
        ("vera", {"r": "x"}, "finetuning.config.r=x: VeraConfig takes a whole number"),
        ("vera", {"target_modules": ["q_prj"]}, "finetuning.config.target_modules=[q_prj]: no layer of this model is named 'q_prj'"),
        ("vera", {"layers_to_transform": [2]}, "there is no layer 2; legal: 0 to 1"),
        ("oft", {"bias": "some"}, "finetuning.config.bias=some: OFTConfig takes none, all, oft_only"),
        ("shira", {"r": 400}, "does not fit this model: "),
    ],
)  # fmt: skip
def test_what_peft_does_not_have_is_one_paragraph(peft_type: str, config: dict, told: str) -> None:
    model = base("qwen3")
    with pytest.raises(ConfigError, match=re.escape(told)):
        Peft(finetuning_type="peft", peft_type=peft_type, config=config).attach(model, family_from_structure(model))


def test_a_saved_adapter_with_unknown_settings_is_refused(tmp_path: Path) -> None:
    model = base("qwen3")
    method = Peft(finetuning_type="peft", peft_type="IA3")
    method.save(method.attach(model, family_from_structure(model)), tmp_path)
    assert peft_settings(tmp_path)["config"]["target_modules"] == ["q_proj", "v_proj"]
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_future": True}))
    with pytest.raises(CheckpointError, match="the installed PEFT does not know use_future of IA3"):
        peft_settings(tmp_path)
