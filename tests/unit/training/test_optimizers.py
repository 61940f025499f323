"""Optimizers and rates against torch's own, PEFT's own and the formulas, and the words that cannot be."""

import copy
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from glmtuner.config.compose import compose
from glmtuner.config.groups import Finetuning
from glmtuner.config.groups import Trainer as TrainerConfig
from glmtuner.config.run_rules import unused_values
from glmtuner.config.trainer_arguments import OptimizerNames
from glmtuner.errors import ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.lora import Lora
from glmtuner.launch.register import register_presets
from glmtuner.training.muon import MuonWithAdamW
from glmtuner.training.optimizers import Optimizers, grouped, layer_factors, matrices_of, with_projectors

register_presets()

BASE = ["model=tiny_glm", "tracker=none"]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}


def llama(**changed: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changed}))


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=False))


def made(model: nn.Module, method: Finetuning, **values: object) -> torch.optim.Optimizer:
    """The optimizer of the model for these values of the trainer."""
    config = TrainerConfig(**{**values, "optim": OptimizerNames(values.get("optim", "adamw_torch"))})
    own = config.optim.value in ("muon", "adam_mini")
    arguments = TrainingArguments(
        "run", report_to="none", use_cpu=True, optim="adamw_torch" if own else config.optim.value,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        optim_args=None if own else config.optim_args, optim_target_modules=config.optim_target_modules,
    )  # fmt: skip
    trainer = Trainer(model, arguments)
    decaying = trainer.get_decay_parameter_names(model)
    blocks = family_from_structure(model.get_base_model() if hasattr(model, "get_base_model") else model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    maker = Optimizers(config, method, lambda: blocks.blocks(inner))
    return maker.create(model, arguments, decaying, trainer.create_optimizer)


def settings(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[float, float]]:
    """Parameter -> its rate and its weight decay."""
    return {
        value: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for value in group["params"]
    }


def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int = 4) -> list[torch.Tensor]:
    """The trained parameters after some steps on a fixed loss."""
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [value.detach() for value in model.parameters() if value.requires_grad]


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"]])
def test_loraplus_has_the_groups_of_peft(targets: list[str]) -> None:
    model = lora(llama(), targets)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=2e-6
    )
    method = Lora(
        finetuning_type="lora", lora_rank=2, lora_alpha=8, lora_dropout=0, lora_target=targets, loraplus_lr_ratio=16,
        loraplus_lr_embedding=2e-6,
    )  # fmt: skip
    ours = made(model, method, learning_rate=1e-3, weight_decay=0.1)
    assert settings(ours) == settings(theirs) and len(settings(ours)) >= 4
    assert ours.param_groups[0]["lr"] == 1e-3 or "v_proj" not in targets  # the logged rate is that of A
    twin = copy.deepcopy(model)
    again = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=2e-6
    )
    assert all(map(torch.equal, steps(model, [ours]), steps(twin, [again])))


def test_without_rates_the_groups_are_those_of_transformers() -> None:
    model = llama()
    ours = made(model, Finetuning(finetuning_type="full"), weight_decay=0.1)
    theirs = Trainer(
        model, TrainingArguments("run", report_to="none", use_cpu=True, optim="adamw_torch", weight_decay=0.1)
    ).create_optimizer()
    assert [group["params"] for group in ours.param_groups] == [group["params"] for group in theirs.param_groups]
    assert grouped(model, set(), 0.1)[0]["params"] == []


@pytest.mark.parametrize("tied", [False, True])
def test_rates_by_layer_are_those_of_the_formula(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    optimizer = made(
        model, Finetuning(finetuning_type="full"), learning_rate=0.08, layerwise_lr_decay=0.5, weight_decay=0.1
    )
    rates = {name: settings(optimizer)[value][0] for name, value in model.named_parameters()}
    assert rates["model.embed_tokens.weight"] == pytest.approx(0.01)
    assert (
        rates["model.layers.0.mlp.up_proj.weight"]
        == rates["model.layers.0.input_layernorm.weight"]
        == pytest.approx(0.02)
    )
    assert rates["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.04)
    assert rates["model.norm.weight"] == rates.get("lm_head.weight", 0.08) == pytest.approx(0.08)
    decays = {name: settings(optimizer)[value][1] for name, value in model.named_parameters()}
    assert decays["model.norm.weight"] == 0 and decays["model.embed_tokens.weight"] == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == sorted(
        (group["lr"] for group in optimizer.param_groups), reverse=True
    )
    assert {*layer_factors(model, [], 1.0).values()} == {1.0}


def test_muon_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_others() -> None:
    model = llama()
    twin = copy.deepcopy(model)
    full = Finetuning(finetuning_type="full")
    ours = made(model, full, optim="muon", learning_rate=1e-2, weight_decay=0.1, optim_args="momentum=0.9")
    names = {name for name, value in twin.named_parameters() if value.ndim == 2} - {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert {name for name, _ in matrices_of(twin)} == names
    parts = dict(twin.named_parameters())
    theirs = [
        torch.optim.Muon(
            [parts[name] for name in sorted(names)],
            lr=1e-2,
            weight_decay=0.1,
            momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([parts["model.embed_tokens.weight"], parts["lm_head.weight"]], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([value for value in parts.values() if value.ndim == 1], lr=1e-2, weight_decay=0.0),
    ]
    assert all(map(torch.equal, steps(model, [ours]), steps(twin, theirs)))
    # its state, read by another one, goes on as if nothing had been
    cut = copy.deepcopy(model)
    again = made(cut, full, optim="muon", learning_rate=1e-2, weight_decay=0.1, optim_args="momentum=0.9")
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert all(map(torch.equal, steps(model, [ours]), steps(cut, [again])))


def test_muon_trains_both_matrices_of_a_lora_and_no_tied_head() -> None:
    adapted = lora(llama(), ["q_proj"])
    optimizer = made(adapted, Finetuning(finetuning_type="lora"), optim="muon")
    assert isinstance(optimizer, MuonWithAdamW) and all(
        group["matrices"] for group in optimizer.param_groups if group["params"]
    )
    assert len(settings(optimizer)) == 4
    assert "lm_head.weight" not in {name for name, _ in matrices_of(llama(tie_word_embeddings=True))}


@pytest.mark.skipif(find_spec("adam_mini") is None, reason="needs adam-mini")
def test_adam_mini_has_a_second_moment_for_each_head_and_each_row() -> None:
    model = llama()
    optimizer = made(model, Finetuning(finetuning_type="full"), optim="adam_mini", learning_rate=1e-2, weight_decay=0.1)
    steps(model, [optimizer])
    moments = {name: optimizer.state[value] for name, value in model.named_parameters()}
    assert moments["model.layers.0.self_attn.q_proj.weight"]["vmean"].numel() == 4  # heads
    assert moments["model.layers.0.self_attn.v_proj.weight"]["vmean"].numel() == 16  # rows
    assert moments["model.embed_tokens.weight"]["vmean"].numel() == 40
    assert moments["model.norm.weight"]["v"].numel() == 16
    assert {decay for _, decay in settings(optimizer).values()} == {0.0, 0.1}


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_projected_optimizers_hold_what_is_trained_with_its_decay(name: str) -> None:
    package = {"galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch"}[name]
    pytest.importorskip(package)
    model = lora(llama(), ["q_proj"])
    optimizer = made(
        model,
        Finetuning(finetuning_type="lora"),
        optim=name,
        optim_target_modules="all-linear",
        optim_args="rank=1",
        weight_decay=0.1,
    )
    assert settings(optimizer).keys() == {value for value in model.parameters() if value.requires_grad}
    assert {decay for _, decay in settings(optimizer).values()} == {0.1}
    steps(model, [optimizer])
    state = optimizer.state_dict()
    assert not {
        type(value).__module__.partition(".")[0] for own in state["state"].values() for value in own.values()
    } & {package}
    back = with_projectors(optimizer, copy.deepcopy(state))["state"][0]["projector"]
    live = optimizer.state[optimizer.param_groups[0]["params"][0]]["projector"]
    assert type(back) is type(live) and torch.equal(back.ortho_matrix, live.ortho_matrix)
    with pytest.raises(ConfigError, match=r"type trainer\.optim_target_modules=all-linear"):
        made(model, Finetuning(finetuning_type="lora"), optim=name, optim_target_modules="nothing")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.optim=adam_mini"], "pip install adam-mini, or trainer.optim=adamw_torch"),
        (["trainer.optim=apollo"], "apollo_torch is not installed; type pip install apollo-torch"),
        (["trainer.optim=galore"], "galore_torch is not installed; type pip install galore-torch"),
        (["trainer.optim=schedule_free"], "schedulefree is not installed; type pip install schedulefree"),
        (["trainer.optim=schedule_free"], "type trainer.lr_scheduler_type=constant"),
        (["trainer.optim=grokadamw"], "its state is not in checkpoints"),
        (["trainer.optim=galore_adamw_layerwise"], "type trainer.optim=galore_adamw"),
        (["trainer.optim=lomo"], "trainer.max_grad_norm=1 with trainer.optim=lomo, which has used a gradient"),
        (["trainer.optim=lomo", "trainer.layerwise_lr_decay=0.9"], "which has one learning rate"),
        (["trainer.optim=lomo", "parallel=ddp"], "type parallel=none"),
        (["trainer.optim=muon", "parallel=fsdp2"], "it needs whole weights"),
        (["trainer.optim=muon", "parallel=fsdp2"], "type parallel=ddp, or trainer.optim=adamw_torch"),
        (["trainer.optim=adafactor", "parallel=fsdp2"], "it needs whole weights"),
        (["trainer.optim=paged_adamw_8bit", "parallel=fsdp2"], "it needs whole weights"),
        (["trainer.optim=muon", "trainer.optim_args='adjust_lr_fn=x'"], "adjust_lr_fn is match_rms_adamw or original"),
        (["trainer.optim=muon", "trainer.optim_args='ns_step=3'"], "did you mean 'ns_steps'?"),
        (["trainer.optim=muonn"], "did you mean 'muon'?"),
        (["trainer.layerwise_lr_decay=1.5"], "trainer.layerwise_lr_decay=1.5: above 0 and at most 1"),
        (["finetuning.loraplus_lr_ratio=0.5"], "finetuning.loraplus_lr_ratio=0.5: 1 or more"),
        (["finetuning.loraplus_ratio=2"], "did you mean 'loraplus_lr_ratio'?"),
        (["finetuning=full", "finetuning.loraplus_lr_ratio=2"], "loraplus_lr_ratio"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_paragraph(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmtuner.config.optimizers.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, *words])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_without_an_effect_is_said() -> None:
    (sentence,) = unused_values(compose([*BASE, "finetuning.loraplus_lr_embedding=1e-5"]).run)
    assert sentence == "finetuning.loraplus_lr_embedding=1e-05 has no effect without finetuning.loraplus_lr_ratio"
