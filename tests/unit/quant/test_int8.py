"""bitsandbytes' 8-bit product without its memory of inputs: the same numbers, forward and backward, and nothing kept."""

from typing import Any

import torch

from glmtuner.quant.int8 import drop_saved_inputs


def product() -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Output, the input's gradient, and what the product has kept; one column of the input is an outlier."""
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
    from bitsandbytes.functional import int8_vectorwise_quant

    draw = torch.Generator().manual_seed(0)
    weight, scale, _ = int8_vectorwise_quant(torch.randn(48, 32, generator=draw).half())
    state = MatmulLtState()
    state.CB, state.SCB, state.threshold, state.is_training, state.has_fp16_weights = weight, scale, 6.0, True, False
    x = torch.randn(2, 5, 32, generator=draw).half()
    x[0, 0, 3] = 9.0
    out = MatMul8bitLt.apply(x.requires_grad_(), weight, None, torch.randn(48, generator=draw).half(), state)
    node = out.grad_fn
    while not hasattr(node, "tensors"):
        node = node.next_functions[0][0]
    kept = node.tensors
    out.float().square().sum().backward()
    return out.detach(), x.grad, kept


def test_the_numbers_stay_and_nothing_is_kept() -> None:
    from bitsandbytes.autograd._functions import MatMul8bitLt

    plain = MatMul8bitLt.forward
    MatMul8bitLt.forward = getattr(plain, "__wrapped__", plain)  # another test may have changed it
    wanted = product()
    assert any(tensor is not None and tensor.shape == (10, 32) for tensor in wanted[2])
    for _ in range(2):  # once in a process, however many models are loaded
        drop_saved_inputs(MatMul8bitLt)
        found = product()
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert found[2] == (None, None, None)
    assert not hasattr(MatMul8bitLt.forward.__wrapped__, "__wrapped__")
