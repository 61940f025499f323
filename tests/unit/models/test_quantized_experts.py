"""Experts in 4 and 8 bits: computed, adapted and merged as plain transformers and PEFT do with the dequantized values."""

import gc

import pytest
import torch
import zoo
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from glmtuner.families.experts import expert_parameters
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.merge import merged_adapter
from glmtuner.models.load import quantizing
from glmtuner.models.quantized_experts import described, read_as_matrices, stored_in
from glmtuner.quant.int4 import Int4
from glmtuner.quant.int8 import Int8

KINDS = [
    "mixtral",
    "gpt_oss",
    "jetmoe",
    "glm4_moe",
    "granitemoe",
]  # experts as output x input, transposed, without a decorator
QUANTS = {4: Int4, 8: Int8}
IDS = torch.randint(3000, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {name: zoo.write_checkpoint(name, root / name) for name in KINDS}


def quantized(folder, bits):
    quant = QUANTS[bits](quantization_bit=bits)
    with quantizing(quant):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **quant.loading(torch.device("cpu"), torch.float32)
        )
    quant.prepare(model)
    return model


def dequantized(folder, model):
    """The plain model with the dequantized value of each weight that is quantized in `model`."""
    plain, modules = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict(model.named_modules())
    experts = expert_parameters(plain)
    with torch.no_grad():
        for path, value in plain.named_parameters():
            module = modules[path.rpartition(".")[0]]
            if (isinstance(module, Linear4bit) and path.endswith(".weight")) or (
                path in experts and bits_of(model) == 4
            ):
                value.copy_(
                    bnb.dequantize_4bit(
                        *bnb.quantize_4bit(value.contiguous(), compress_statistics=True, quant_type="nf4")
                    )
                )
            elif path in experts:
                rows = value.reshape(-1, value.shape[-1])
                integers, scales, _ = bnb.int8_vectorwise_quant(rows.to(torch.float16))
                value.copy_(bnb.int8_vectorwise_dequant(integers, scales).view(value.shape))
    return plain


def bits_of(model):
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 8


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.mark.parametrize("kind", KINDS)
def test_int4_computes_with_the_dequantized_values(folders, kind):
    model = quantized(folders[kind], 4)
    assert all(value.dtype == torch.uint8 for value in expert_parameters(model).values())
    torch.testing.assert_close(loss_of(model), loss_of(dequantized(folders[kind], model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_stores_the_experts_and_computes_with_their_values(folders, kind):
    """Inputs of int8 linear layers are quantized, too, and those of experts are not: the values of experts are compared."""
    model = quantized(folders[kind], 8)
    plain, modules = dequantized(folders[kind], model), dict(model.named_modules())
    for path, value in expert_parameters(plain).items():
        owner, _, name = path.rpartition(".")
        assert stored_in(modules[owner], name).bits == 8
        torch.testing.assert_close(getattr(modules[owner], name), value, rtol=0, atol=0)


def adapted(folder, bits, names=("experts",)):
    model = quantized(folder, bits)
    family = family_from_structure(model)
    method = Lora(finetuning_type="lora", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lora_target=[*names])
    peft = method.attach(model, family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in peft.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return peft, method


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# transformers has no checkpointing of JetMoE's activations
@pytest.mark.parametrize(
    ("kind", "checkpointing"), [(kind, on) for kind in KINDS for on in (False, True) if not on or kind != "jetmoe"]
)
def test_gradients_are_those_of_plain_peft(folders, kind, checkpointing, tmp_path):
    """Of an adapter that PEFT loads by itself, on plain transformers with the dequantized values."""
    model, method = adapted(folders[kind], 4)
    method.save(model, tmp_path)
    plain = PeftModel.from_pretrained(dequantized(folders[kind], model.get_base_model()), tmp_path, is_trainable=True)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for _ in range(2):  # nothing is left of the first pass
        found, expected = gradients(model), gradients(plain)
        assert found.keys() == expected.keys() and found
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert not parametrize._cache and not parametrize._cache_enabled


def test_the_backward_pass_keeps_integers_and_not_values(folders):
    """No tensor of the size of an expert's parameter is held between the passes."""
    model, _ = adapted(folders["mixtral"], 4)

    def large() -> set[int]:
        sizes = {96 * 32 * 4, 48 * 32 * 4}
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.ndim == 3]
        return {id(each) for each in tensors if each.dtype == torch.float32 and each.numel() in sizes}

    gc.collect()
    before = large()  # of other tests
    loss = loss_of(model)
    gc.collect()
    assert not large() - before
    loss.backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_is_merged_into_quantized_experts(folders, bits, tmp_path):
    """The sum is quantized again: the merged values are those of value + update, quantized and dequantized by bitsandbytes."""
    model, method = adapted(folders["mixtral"], bits, ["experts"])
    method.save(model, tmp_path)
    base = quantized(folders["mixtral"], bits)
    plain = PeftModel.from_pretrained(dequantized(folders["mixtral"], base), tmp_path).merge_and_unload()
    merged = merged_adapter(base, family_from_structure(base), tmp_path)
    modules = dict(merged.named_modules())
    for path, value in expert_parameters(plain).items():
        owner, _, name = path.rpartition(".")
        if bits == 4:
            again = bnb.dequantize_4bit(
                *bnb.quantize_4bit(value.contiguous(), compress_statistics=True, quant_type="nf4")
            )
        else:
            integers, scales, _ = bnb.int8_vectorwise_quant(value.reshape(-1, value.shape[-1]).to(torch.float16))
            again = bnb.int8_vectorwise_dequant(integers, scales).view(value.shape)
        torch.testing.assert_close(getattr(modules[owner], name), again, rtol=0, atol=2e-2 * float(value.abs().max()))
        assert not torch.equal(
            getattr(modules[owner], name), expert_parameters(dequantized(folders["mixtral"], base))[path]
        )


def test_what_is_not_quantized_is_said_with_its_share(folders):
    model = quantized(folders["mixtral"], 4)
    plain = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    total = sum(value.numel() for value in plain.parameters())
    head = plain.lm_head.weight.numel() / total
    told = described(model)
    assert f" of {total:,} parameters are quantized; not " in told
    assert f"lm_head {head:.2%}" in told and "gate" in told


@pytest.mark.parametrize(
    "kind, expected", [("mamba", {"dt_proj"}), ("jamba", set()), ("bloom", set()), ("llama", set())]
)
def test_a_layer_whose_weight_the_code_around_it_multiplies_is_not_quantized(kind, expected):
    """Unless that code asks whether it is quantized, as Jamba's does."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(zoo.config_of(kind))
    assert {path.rpartition(".")[2] for path in read_as_matrices(model)} == expected
