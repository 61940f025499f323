"""Liger's kernels in ChatGLM and GLM compute what the models' own code does, forward and backward, and in a whole run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmMLP, GlmRMSNorm
from transformers.models.glm4 import modeling_glm4

from glmtuner.config.compose import compose
from glmtuner.data.collate import Collator
from glmtuner.errors import ConfigError
from glmtuner.families import family_named
from glmtuner.finetuning.lora import Lora
from glmtuner.kernels.choose import apply_liger, choose_optimizations
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.kernels.liger import KNOWN, apply_liger_kernel_to_glm, enable_liger, kernels_for, restore_modules
from glmtuner.launch.checks import check_liger
from glmtuner.launch.register import register_presets
from glmtuner.models.configuration_chatglm import ChatGLM2Config, ChatGLMConfig
from glmtuner.models.modeling_chatglm import ChatGLMForConditionalGeneration
from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration, ChatGLM2MLP

register_presets()
V = 48
SMALL = {"hidden_size": 16, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def modules_as_they_were():
    yield
    restore_modules()


def chatglm() -> nn.Module:
    special = {"bos_token_id": 40, "eos_token_id": 41, "mask_token_id": 42, "gmask_token_id": 43, "pad_token_id": 3}
    return ChatGLMForConditionalGeneration(
        ChatGLMConfig(vocab_size=V, inner_hidden_size=24, num_layers=2, **SMALL, **special)
    )


def chatglm2() -> nn.Module:
    sizes = {"ffn_hidden_size": 24, "num_layers": 2, "kv_channels": 8, "multi_query_group_num": 1, "seq_length": 64}
    return ChatGLM2ForConditionalGeneration(ChatGLM2Config(padded_vocab_size=V, **SMALL, **sizes))


def glm(config: type = GlmConfig, model: type = GlmForCausalLM) -> nn.Module:
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}
    return model(config(vocab_size=V, pad_token_id=0, eos_token_id=1, **SMALL, **sizes))


MODELS = {"chatglm": chatglm, "chatglm2": chatglm2, "glm": glm, "glm4": lambda: glm(Glm4Config, Glm4ForCausalLM)}
KINDS = {"chatglm": {nn.LayerNorm: 5}, "chatglm2": {GlmRMSNorm: 5, ChatGLM2MLP: 2}, "glm": {GlmRMSNorm: 5, GlmMLP: 2}}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def rows() -> list[dict[str, list[int]]]:
    asked = [[5, 9, 7, 43, 40], [8, 43, 40], [4, 6, 11, 30, 21, 43, 40]]
    answers = [[12, 13, 41], [14, 15, 16, 17, 41], [18, 41]]
    return [
        {"input_ids": [*question, *answer], "labels": [-100] * len(question) + answer}
        for question, answer in zip(asked, answers, strict=True)
    ]


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def changed(model: nn.Module) -> dict[type, int]:
    kinds = [type(module) for module in model.modules() if "forward" in vars(module) and module is not model]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_the_plain_model(name):
    model = model_of(name)
    batch = Collator(pad_id=3)(rows())
    wanted_loss, wanted = gradients(model, batch)
    enable_liger(model, {})
    if name in KINDS:
        assert changed(model) == KINDS[name]
    loss, found = gradients(model, batch)
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["chatglm2", "glm"])
def test_half_precision_differs_by_its_rounding(name):
    """In fp16: numpy has no bf16, and the interpreter takes its bits for integers."""
    model = model_of(name).half()
    batch = Collator(pad_id=3)(rows())
    plain = model(**batch).logits
    enable_liger(model, {})
    assert model(**batch).logits.dtype == plain.dtype
    torch.testing.assert_close(model(**batch).logits, plain, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm"])
def test_kernels_under_lora_and_the_other_fast_paths(name):
    """LoRA in the MLP, segments, the loss in chunks and Liger at once: the gradients are those of none of them."""
    family = family_named(name)
    method = Lora(finetuning_type="lora", lora_rank=4, lora_alpha=8, lora_target=["all"], lora_dropout=0.0)
    model = model_of(name)
    method = method.resolved(family, 2)
    attached = method.attach(model, family)
    with torch.no_grad():
        for key, parameter in attached.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    batch, padded = rows(), Collator(pad_id=3)
    wanted_loss, wanted = gradients(attached, padded(batch))
    apply_liger(attached, {}, batch[:2], padded)
    taken = choose_optimizations(attached, batch[:2], padded)
    assert taken.collate is not padded and taken.chunks_loss and taken.fuses_lora
    loss, found = gradients(attached, taken.collate(batch))
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    assert found.keys() == wanted.keys() and all("lora" in key for key in found)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=2e-6)


def test_a_kind_of_kernels_can_be_left_out():
    model = model_of("chatglm2")
    apply_liger_kernel_to_glm(swiglu=False, model=model)
    assert changed(model) == {GlmRMSNorm: 5}


def test_liger_kernels_own_models_are_its_own():
    assert {"chatglm", "glm", "glm4", "llama"} <= KNOWN.keys()
    assert KNOWN["glm4"].__module__.startswith("liger_kernel")
    assert kernels_for("chatglm") == ["rms_norm", "swiglu", "layer_norm"] and "rope" in kernels_for("llama")


def test_its_loss_is_left_to_ours_unless_it_is_asked_for():
    model = model_of("glm4")
    apply_liger(model, {}, rows()[:2], Collator(pad_id=3))
    assert "forward" not in vars(model)
    asked = model_of("glm4")
    enable_liger(asked, {"fused_linear_cross_entropy": True})
    assert "forward" in vars(asked)
    excluded = {FastPath.chunked_loss: "Liger's"}
    assert not choose_optimizations(asked, rows()[:2], Collator(pad_id=3), excluded=excluded).chunks_loss
    assert "forward" in vars(asked)


def test_the_next_job_of_a_sweep_has_the_models_own_code():
    own, loss = modeling_glm4.Glm4RMSNorm, nn.functional.cross_entropy
    enable_liger(model_of("glm4"), {"cross_entropy": True})
    assert modeling_glm4.Glm4RMSNorm is not own and nn.functional.cross_entropy is not loss
    check_liger(compose(["model=tiny_glm"]).run, {"model_type": "glm4"})
    assert modeling_glm4.Glm4RMSNorm is own and nn.functional.cross_entropy is loss
    assert type(model_of("glm4").model.norm) is own


def test_kernels_that_compute_another_loss_are_refused(monkeypatch):
    monkeypatch.setattr("glmtuner.kernels.liger._rms_norm", lambda self, states: 2 * states)
    with pytest.raises(
        ConfigError, match=r"^trainer.use_liger_kernel=true: the loss of two samples would be .* leave it out$"
    ):
        apply_liger(model_of("glm"), {}, rows()[:2], Collator(pad_id=3))


def test_a_compilers_error_is_one_paragraph(monkeypatch):
    def fails(self: Any, states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no driver\n  was found")

    monkeypatch.setattr("glmtuner.kernels.liger._rms_norm", fails)
    with pytest.raises(
        ConfigError, match=r"^trainer.use_liger_kernel=true: RuntimeError: no driver was found; leave it out$"
    ):
        apply_liger(model_of("glm"), {}, rows()[:2], Collator(pad_id=3))


RUN = """\
model=tiny_glm tracker=none data.dataset=[alpaca_zh_sample] data.max_samples=6 data.max_source_length=24
data.max_target_length=12 finetuning.lora_dropout=0.0 finetuning.lora_target=[all] trainer.max_steps=2
trainer.logging_steps=1 trainer.per_device_train_batch_size=2
"""


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_of_the_command_line(glmtuner, tmp_path):
    for name, word in (("plain", "false"), ("liger", "true")):
        done = glmtuner(*RUN.split(), f"trainer.output_dir={name}", f"trainer.use_liger_kernel={word}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert len(losses(tmp_path / "liger")) == 2
    assert "use_liger_kernel: true" in (tmp_path / "liger/config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["rope: true", "swiglu: 3"])
def test_a_kernel_that_is_not_there(glmtuner, wrong):
    done = glmtuner(*RUN.split(), "trainer.use_liger_kernel=true", f"trainer.liger_kernel_config={{{wrong}}}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert " ".join(done.stderr.split()).endswith(
        f"trainer.liger_kernel_config={{{wrong}}}: the kernels for model_type=glm are rms_norm, swiglu, layer_norm, each true or "
        "false; type 'trainer.liger_kernel_config={rms_norm: true}'"
    )


def test_without_a_gpu(glmtuner, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = glmtuner(*RUN.split(), "trainer.use_liger_kernel=true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = " ".join(done.stderr.split())
    assert all(fact in message for fact in ("trainer.use_liger_kernel=true", "cpu", "leave it out"))
