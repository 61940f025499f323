"""A LoRA layer in one operation gives what PEFT's layer gives."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from glmtuner.kernels.fused_lora import fuse_lora, unfuse_lora


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20, bias=bias), nn.Linear(20, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def adapted(*, bias: bool = True, **values: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "last"], "lora_dropout": 0.0, **values}
    model = get_peft_model(Net(bias), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.train()


def learned(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of the dropout
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(x)
    out.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_outputs_and_gradients(bias, dropout, dtype):
    model, x = adapted(bias=bias, lora_dropout=dropout), torch.randn(2, 5, 12)
    wanted = learned(model, x, dtype)
    assert fuse_lora(model) == 2
    found = learned(model, x, dtype)
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype is None else {"atol": 0.5, "rtol": 0.1}  # of bfloat16's 8 bits
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)
    unfuse_lora(model)
    assert "forward" not in model.base_model.model.first.__dict__


def test_inputs_without_a_gradient_get_none():
    model = adapted()
    fuse_lora(model)
    model(torch.randn(3, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_disabled_merged_and_several_adapters_are_left_to_peft():
    model, x = adapted(), torch.randn(4, 12)
    base = model.base_model.model
    wanted = model(x)
    with model.disable_adapter():
        bare = model(x)
    fuse_lora(model)
    torch.testing.assert_close(model(x), wanted)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), bare)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert base.first.weight.requires_grad is False


@pytest.mark.parametrize("values", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_not_touched(values):
    assert fuse_lora(adapted(**values)) == 0


def test_float32_adapters_on_a_half_base_compute_as_peft_does():
    model = adapted()
    for layer in (model.base_model.model.first, model.base_model.model.last):
        layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    wanted = model(x)
    fuse_lora(model)
    assert torch.equal(model(x), wanted)
