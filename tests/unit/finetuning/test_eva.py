"""EVA: the ranks, values and configuration that PEFT's own call gives on the same rows, on every kind of base, and after a resume."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_bases import base, loss
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file

from glmtuner.data.collate import Collator
from glmtuner.errors import ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG
from glmtuner.finetuning.eva import Batches
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.trained import trained_parameters
from glmtuner.templates.base import IGNORE_INDEX

TARGETS = {"qwen3": ["q_proj", "v_proj", "down_proj"], "glm": ["q_proj", "v_proj", "down_proj"], "chatglm2": ["query_key_value", "dense_h_to_4h"]}  # fmt: skip


def rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows whose first four tokens are the prompt."""
    drawn = torch.Generator().manual_seed(7)
    found = []
    for index in range(count):
        ids = torch.randint(4, 48, (10 + index % 5,), generator=drawn).tolist()
        found.append({"input_ids": ids, "labels": [IGNORE_INDEX] * 4 + ids[4:]})
    return found


def lora(name: str = "qwen3", **values: object) -> Lora:
    return Lora(
        **{
            "finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target": TARGETS[name],
            "init_lora_weights": "eva", **values,
        }
    )  # fmt: skip


def started(method: Lora, name: str = "qwen3", checkpoint: Path | None = None, seed: int = 3) -> torch.nn.Module:
    model = base(name)
    torch.manual_seed(seed)
    adapted = method.attach(model, family_from_structure(model))
    method.initialize(adapted, rows(), Collator(pad_id=0), 5, checkpoint)
    return adapted


def by_peft(name: str, method: Lora, **values: object) -> torch.nn.Module:
    """PEFT's own way, on the batches of the same order, with its own masks."""
    eva = {key: getattr(method, f"eva_{key}") for key in ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors")}  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights="eva", eva_config=EvaConfig(**eva), task_type="CAUSAL_LM", **values,
    )  # fmt: skip
    model = get_peft_model(base(name), config)
    order, size, collate = Batches(rows(), Collator(pad_id=0), 5, method, 1), method.eva_batch_size, Collator(pad_id=0)
    indices = [index for part in order.parts for index in part]
    batches = [collate([rows()[index] for index in indices[at : at + size]]) for at in range(0, len(indices), size)]
    initialize_lora_eva_weights(model, dataloader=batches, show_progress_bar=False)
    return model


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen3", {}),
        ("glm", {}),
        ("chatglm2", {}),
        ("qwen3", {"eva_rho": 1.0, "eva_whiten": True}),
        ("qwen3", {"eva_adjust_scaling_factors": False, "eva_use_label_mask": False, "eva_tau": 0.9}),
        ("qwen3", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        ("qwen3", {"use_dora": True}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_ranks_values_and_configuration_are_peft_s_own(name: str, values: dict, tmp_path: Path) -> None:
    method = lora(name, eva_batch_size=8, **values)
    ours = started(method, name)
    theirs = by_peft(name, method, **{key: value for key, value in values.items() if not key.startswith("eva")})
    one, other = trained_parameters(ours), trained_parameters(theirs)
    assert one.keys() == other.keys() and any("lora_A" in each for each in one)
    assert all(torch.equal(one[each], other[each]) for each in one if "lora_A" in each or "lora_B" in each)
    configs = [model.peft_config["default"] for model in (ours, theirs)]
    for key in ("rank_pattern", "alpha_pattern", "eva_config"):
        assert getattr(configs[0], key) == getattr(configs[1], key)
    assert {*configs[0].target_modules} == {*configs[1].target_modules}
    assert bool(configs[0].rank_pattern) == (values.get("eva_rho") != 1.0 and name != "chatglm2")
    assert loss(ours) == pytest.approx(loss(base(name)), abs=1e-5)

    with torch.no_grad():
        for value in one.values():
            value += 0.05 * torch.randn_like(value)
    expected = loss(ours)
    method.save(ours, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["rank_pattern"] == configs[0].rank_pattern
    assert loss(PeftModel.from_pretrained(base(name), tmp_path)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_resume_takes_ranks_and_values_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = lora(lora_rank=1, eva_rho=6.0, eva_batch_size=8)  # some layers have no rank
    model = started(method)
    ranks = {path: module.r["default"] for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(ranks) < 6 and sum(ranks.values()) == 6
    with torch.no_grad():
        for value in trained_parameters(model).values():
            value += 0.05 * torch.randn_like(value)
    method.save_trained(model, tmp_path)
    monkeypatch.setattr("glmtuner.finetuning.eva.computed", None)  # nothing is computed again
    again = started(method, checkpoint=tmp_path, seed=9)
    method.restore(again, tmp_path)
    one, other = dict(model.named_parameters()), dict(again.named_parameters())
    assert one.keys() == other.keys() and all(torch.equal(one[each], other[each]) for each in one)
    method.save(again, tmp_path / "again")
    before, after = (load_file(folder / ADAPTER) for folder in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[each], after[each]) for each in before)
    texts = [json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_of_a_half_precision_base_is_float32() -> None:
    model = base("qwen3").bfloat16()
    method = lora(eva_batch_size=8)
    adapted = method.attach(model, family_from_structure(model))
    method.initialize(adapted, rows(), Collator(pad_id=0), 5, None)
    trained = trained_parameters(adapted)
    assert adapted.peft_config["default"].rank_pattern
    assert {value.dtype for value in trained.values()} == {torch.float32}
    # values of a bfloat16 matrix would be those of eight bits
    assert not any(torch.equal(value, value.bfloat16().float()) for name, value in trained.items() if "lora_A" in name)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"eva_rho": 0.5}, "finetuning.eva_rho=0.5: 1 (all ranks stay) or more"),
        ({"eva_tau": 1.0}, "finetuning.eva_tau=1.0: a cosine in [0, 1)"),
        ({"init_lora_weights": True, "eva_whiten": True}, "finetuning.eva_whiten=true without finetuning.init_lora_weights=eva has no effect"),
        ({"trainable_token_indices": [3]}, "finetuning.init_lora_weights=eva with data.new_tokens or finetuning.trainable_token_indices"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "finetuning.target_parameters with finetuning.init_lora_weights=eva: parameters are adapted without it"),
        ({"lora_rank": 32}, "no batch of finetuning.eva_batch_size=4 rows has the 64 learned tokens"),
        ({"lora_rank": 32, "eva_batch_size": 48, "eva_rho": 2.0}, "PEFT does not find 64 directions of each layer's inputs"),
        ({"eva_tau": 0.99999999, "eva_max_batches": 3, "eva_batch_size": 8}, "after 3 batches the directions still turn"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_eva_cannot_start_from_is_one_paragraph(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        started(lora(**values))


def test_sharded_weights_are_refused() -> None:
    assert "type parallel=ddp" in next(lora().impossible(None, True))
