"""The head whose new rows alone are trained: losses in chunks against PEFT's own layer and whole logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import GlmConfig, GlmForCausalLM

from glmtuner.kernels import chunked_logprobs as chunked
from glmtuner.kernels.chunked_loss import chunked_loss_problem, cross_entropy, disable_chunked_loss, enable_chunked_loss
from glmtuner.kernels.output_head import OutputHead
from glmtuner.models.unwrap import unwrapped

IDS = [37, 38, 39]


def adapted(tied: bool, dtype: torch.dtype = torch.float32):
    """A LoRA by PEFT alone that trains three rows, moved away from their start."""
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = GlmForCausalLM(config).to(dtype)
    rows = {"embed_tokens": IDS} if tied else {"embed_tokens": IDS, "lm_head": IDS}
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, init_lora_weights=False)
    model = get_peft_model(model, lora)
    for name, value in model.named_parameters():
        if "trainable_tokens_delta" in name:
            value.data = value.data.float() + 0.1 * torch.randn_like(value, dtype=torch.float32)
    return model.eval()


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(1, 40, (3, 50))
    ids[:, ::4] = torch.tensor(IDS)[:, None]
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and any("trainable_tokens" in name for name in wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name] / scale, value / scale, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"smoothing": 0.1}, {"by_probability": True}], ids=["plain", "smoothed", "dft"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(monkeypatch, tied: bool, options: dict) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES_CPU", 1)  # 64 tokens a chunk
    model, batch = adapted(tied), batch_of()
    base, targets = unwrapped(model), batch["labels"][:, 1:].flatten()
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=options.get("smoothing", 0.0))
    if options.get("by_probability"):
        each = each * torch.exp(-each.detach())
    wanted = gradients(model, each.sum())
    assert chunked_loss_problem(base) is None
    hidden = base.base_model(input_ids=batch["input_ids"]).last_hidden_state
    total, losses = cross_entropy(hidden, base.get_output_embeddings(), batch["labels"], **options)
    torch.testing.assert_close(total, each.sum(), atol=0, rtol=1e-5)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses[:, 1:].flatten(), plain.detach(), atol=1e-5, rtol=1e-5)
    same(gradients(model, total), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_log_probabilities_take_any_gradient(monkeypatch, tied: bool, temperature: float) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES_CPU", 1)
    model, batch = adapted(tied), batch_of()
    weights = torch.randn(batch["labels"].shape)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1] / temperature
    targets = batch["labels"][:, 1:]
    each = torch.log_softmax(logits, -1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    wanted = gradients(model, (each * weights[:, 1:]).sum())
    enable_chunked_loss(unwrapped(model))
    found = model(**batch, logprobs=True, temperature=temperature).logprobs
    torch.testing.assert_close(found[:, 1:], each.detach(), atol=1e-5, rtol=1e-5)
    same(gradients(model, (found * weights).sum()), wanted)
    disable_chunked_loss(unwrapped(model))


def test_on_a_half_precision_base_the_rows_round_as_peft_rounds_them() -> None:
    model, batch = adapted(False, torch.bfloat16), batch_of()
    wanted = gradients(model, model(**batch).loss)
    enable_chunked_loss(unwrapped(model))
    same(gradients(model, model(**batch).loss), wanted, tolerance=0.03)
    disable_chunked_loss(unwrapped(model))


def test_no_gradient_of_the_whole_head_is_made(monkeypatch) -> None:
    """Of a vocabulary of 40 no tensor besides the head's own weight and the logits of a chunk has 40 rows or columns."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES_CPU", 1)
    head, seen = unwrapped(adapted(False)).get_output_embeddings(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(tuple(out.shape))
            return out

    hidden = torch.randn(128, 16, requires_grad=True)
    with Watch():
        chunked.chunked_logprobs(hidden, head, torch.randint(40, (128,)))[0].sum().backward()
    assert (40, 16) not in seen and (64, 40) in seen and (128, 40) not in seen


def test_what_trains_more_of_the_head_than_rows_is_no_such_head() -> None:
    model = GlmForCausalLM(GlmConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=1, head_dim=8, pad_token_id=0, tie_word_embeddings=False))  # fmt: skip
    whole = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert OutputHead.of(unwrapped(whole).get_output_embeddings()) is None
    assert chunked_loss_problem(unwrapped(whole)) is not None
    rows = adapted(True)
    with rows.disable_adapter():
        assert OutputHead.of(unwrapped(rows).get_output_embeddings()).rows_KH is None
