"""What objectives read of a model without padding and in chunks, against padded rows and whole logits in plain torch."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.data.reference import digest, reference_of_rows, with_reference
from glmtuner.families.family import FAMILIES
from glmtuner.inference.sampling import Sampler
from glmtuner.kernels import chunked_logprobs as chunked
from glmtuner.kernels import common_beginnings
from glmtuner.kernels.chunked_loss import disable_chunked_loss, enable_chunked_loss
from glmtuner.kernels.common_beginnings import share_beginnings
from glmtuner.kernels.fused_lora import fuse_lora
from glmtuner.kernels.segment_attention import disable_segment_attention, enable_segment_attention
from glmtuner.launch.register import register_presets
from glmtuner.models.unwrap import unwrapped
from glmtuner.models.value_head import ValueHead, save_head
from glmtuner.objectives.cpo import CpoObjective
from glmtuner.objectives.dpo import DpoObjective
from glmtuner.objectives.kto import KtoObjective
from glmtuner.objectives.objective import Weights
from glmtuner.objectives.orpo import OrpoObjective
from glmtuner.objectives.ppo import PpoObjective, Rollout
from glmtuner.objectives.rm import RewardObjective
from glmtuner.objectives.rows import Rows
from glmtuner.objectives.simpo import SimpoObjective

register_presets()

# of different lengths, two to a prompt; 0 is padding
ROWS = [
    ([5, 6, 7, 8], [20, 21, 22]),
    ([9, 10, 11], [23, 24]),
    ([5, 6, 7, 8], [30]),
    ([9, 10, 11], [31, 32, 33, 34, 35]),
]


def batch_of(rows, **more) -> dict[str, torch.Tensor]:
    longest = max(len(prompt + answer) for prompt, answer in rows) + 1
    pads = [longest - len(prompt + answer) for prompt, answer in rows]
    both = list(zip(rows, pads, strict=True))
    return {
        "input_ids": torch.tensor([prompt + answer + [0] * pad for (prompt, answer), pad in both]),
        "attention_mask": torch.tensor([[1] * (longest - pad) + [0] * pad for pad in pads]),
        "labels": torch.tensor([[-100] * len(prompt) + answer + [-100] * pad for (prompt, answer), pad in both]),
    } | more


def shipped(method: str):
    """The shipped model with a method attached, moved away from its start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_glm", dtype=torch.float32)
    words = ["finetuning.lora_dropout=0"] if method == "lora" else []
    finetuning = compose(["model=tiny_glm", "tracker=none", f"finetuning={method}", *words]).run.finetuning
    return finetuning.resolved(FAMILIES["glm"], 4).attach(model, FAMILIES["glm"])


def move(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def hasten(model) -> None:
    enable_segment_attention(unwrapped(model))
    enable_chunked_loss(unwrapped(model))
    fuse_lora(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True), (False, True, False)])
def test_log_probabilities_in_chunks_take_any_gradient(monkeypatch, trained, temperature, dtype):
    monkeypatch.setattr(chunked, "CHUNK_BYTES_CPU", 1)  # 64 tokens a chunk
    torch.manual_seed(0)
    hidden, head = torch.randn(150, 16), nn.Linear(16, 50)
    targets, weights = torch.randint(50, (150,)), torch.randn(150)
    hidden, head = hidden.to(dtype), head.to(dtype)
    wanted_of = [hidden, head.weight, head.bias]
    for tensor, is_trained in zip(wanted_of, trained, strict=True):
        tensor.requires_grad_(is_trained)
    found, entropy = chunked.chunked_logprobs(hidden, head, targets, temperature=temperature, entropy=True)
    wide = [
        tensor.detach().double().requires_grad_(is_trained)
        for tensor, is_trained in zip(wanted_of, trained, strict=True)
    ]
    distribution = torch.distributions.Categorical(logits=(wide[0] @ wide[1].t() + wide[2]) / temperature)
    wanted = distribution.log_prob(targets)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(found, wanted.float(), **close)
    torch.testing.assert_close(entropy, distribution.entropy().detach().float(), **close)
    assert found.dtype == torch.float32 and not entropy.requires_grad
    learned = [[tensor for tensor, each in zip(of, trained, strict=True) if each] for of in (wanted_of, wide)]
    mine = torch.autograd.grad((found * weights).sum(), learned[0])
    theirs = torch.autograd.grad((wanted * weights).sum(), learned[1])
    for gradient, right in zip(mine, theirs, strict=True):
        assert gradient.dtype == dtype
        scale = right.abs().max().item()
        torch.testing.assert_close(gradient.float() / scale, right.float() / scale, **close)


def test_the_logits_of_a_batch_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES_CPU", 1)
    head = nn.Linear(8, 5000, bias=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(640, 8, requires_grad=True)
    with Watch():
        chunked.chunked_logprobs(hidden, head, torch.zeros(640, dtype=torch.long))[0].sum().backward()
    assert largest == 64 * 5000


def test_statistics_without_padding_are_those_of_the_rows():
    model = shipped("lora").eval()
    batch = batch_of(ROWS)
    rows = Rows.of(model, batch)
    plain = rows.statistics(batch["labels"], temperature=0.8, entropy=True, states=True)
    last = rows.last_states()
    hasten(model)
    rows = Rows.of(model, batch)
    fast = rows.statistics(batch["labels"], temperature=0.8, entropy=True, states=True)
    assert fast.states_BSH.shape[:2] == (1, batch["attention_mask"].sum())
    torch.testing.assert_close(fast.logprobs_RT, plain.logprobs_RT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.entropies_RT, plain.entropies_RT, atol=1e-5, rtol=1e-5)
    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(fast.states_BSH[0], plain.states_BSH[is_token], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows.last_states(), last, atol=1e-4, rtol=1e-4)
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 20, 21, 22]])).logits[0] / 0.8  # one row, as it is
    wanted = torch.log_softmax(logits, -1)[[3, 4, 5], [20, 21, 22]]
    torch.testing.assert_close(fast.logprobs_RT[0, 4:7], wanted, atol=1e-4, rtol=1e-4)
    assert not fast.logprobs_RT[batch["labels"] == -100].any()


CASES = [
    (DpoObjective, ["stage=dpo", "stage.sft_weight=0.5"]),
    (KtoObjective, ["stage=kto"]),
    (OrpoObjective, ["stage=orpo"]),
    (SimpoObjective, ["stage=simpo"]),
    (CpoObjective, ["stage=cpo"]),
    (RewardObjective, ["stage=rm"]),
]


@pytest.mark.parametrize("once", [False, True], ids=["", "prompts once"])
@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
@pytest.mark.parametrize(("kind", "words"), CASES, ids=[words[0] for _, words in CASES])
def test_losses_and_gradients_are_those_of_padded_rows(kind, words, method, once, monkeypatch):
    monkeypatch.setattr(common_beginnings, "SHORTEST", 2)
    model = shipped(method)
    settings = compose(["model=tiny_glm", "tracker=none", *words]).run.stage
    torch.manual_seed(3)
    objective = kind(model, None if kind is RewardObjective else settings)
    move(model)  # the policy has left its reference
    batch = batch_of(ROWS, **({"is_desirable": torch.tensor([True, False])} if kind is KtoObjective else {}))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def learned():
        loss, measured = objective.loss(model.train(), batch)
        gradients = torch.autograd.grad((loss * torch.tensor([0.3, 0.7])).sum(), trained.values(), allow_unused=True)
        return loss.detach(), gradients, measured

    wanted, wanted_gradients, wanted_measured = learned()
    hasten(model)
    if once:
        share_beginnings(unwrapped(model))
        assert Rows.of(model, batch).inputs["input_ids"].shape[1] == batch["attention_mask"].sum() - 3 - 2
    found, gradients, measured = learned()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for name, value in wanted_measured.items():
        torch.testing.assert_close(measured[name], value, atol=1e-4, rtol=1e-4, equal_nan=True)
    for name, mine, right in zip(trained, gradients, wanted_gradients, strict=True):
        assert (mine is None) == (right is None), name
        if right is not None:
            assert (mine - right).norm() <= 1e-5 * max(right.norm().item(), 1.0), name
    disable_chunked_loss(unwrapped(model))
    disable_segment_attention(unwrapped(model))


@pytest.mark.parametrize("once", [False, True], ids=["", "prompts once"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ppo_without_padding_is_that_of_padded_rows(tmp_path, method, once, monkeypatch):
    monkeypatch.setattr(common_beginnings, "SHORTEST", 2)
    model = shipped(method)
    settings = compose(
        ["model=tiny_glm", "tracker=none", "stage=ppo", "model.reward_model=x", "stage.temperature=0.9"]
    ).run.stage
    head = ValueHead(192)
    with torch.no_grad():
        head.weight += 0.05 * torch.randn(1, 192, generator=torch.Generator().manual_seed(0))
    save_head(head, tmp_path)
    objective = PpoObjective(
        model, settings, reward=Weights.snapshot(model), reward_head=tmp_path / "value_head.safetensors",
        sampler=Sampler(model, max_new_tokens=6, stop_ids=(2998,), pad_id=0, temperature=0.9),
    )  # fmt: skip
    with torch.no_grad():
        objective.value_head.weight += 0.05
    move(model)
    batch = batch_of(ROWS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def learned():
        scores = objective.scores(batch["input_ids"], batch["attention_mask"])
        with torch.no_grad():
            found = objective._answer_statistics(batch["input_ids"], batch["attention_mask"], batch["labels"])
        rollout = Rollout(
            input_ids_RT=batch["input_ids"], attention_mask_RT=batch["attention_mask"], labels_RT=batch["labels"],
            is_real_R=torch.ones(4, dtype=torch.bool), old_logprobs_RT=found[0] + 0.1, old_values_RT=found[1] - 0.1, advantages_RT=torch.cos(torch.arange(9.0)).expand(4, 9)[:, : found[0].shape[1]],
            returns_RT=torch.sin(found[1]),
        )  # fmt: skip
        loss, _ = objective.update_loss(rollout)
        return [scores, *found, loss.detach()], torch.autograd.grad(loss, trained, allow_unused=True)

    wanted, wanted_gradients = learned()
    hasten(model)
    if once:
        share_beginnings(unwrapped(model))
    found, gradients = learned()
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-5)
    for mine, right in zip(gradients, wanted_gradients, strict=True):
        assert (mine is None) == (right is None)
        if right is not None:
            assert (mine - right).norm() <= 2e-5 * max(right.norm().item(), 1.0)


def test_the_references_log_probabilities_are_a_column_of_the_rows():
    rows = Dataset.from_list([{"input_ids": [1, 2], "rejected_ids": [3]}, {"input_ids": [4], "rejected_ids": [5, 6]}])
    with_column = with_reference(rows, torch.tensor([[-1.5, -2.25], [-3.0, -4.0]]))
    both = [with_column[index] for index in (0, 1)]
    assert reference_of_rows(both)["reference"].tolist() == [-1.5, -3.0, -2.25, -4.0]  # the chosen, then the rejected
    assert reference_of_rows([rows[0]]) == {}
    assert digest(rows) == digest(with_column) != digest(rows.select([1, 0]))
    moved = Dataset.from_list([{"input_ids": [1], "rejected_ids": [2, 3]}, {"input_ids": [4], "rejected_ids": [5, 6]}])
    assert digest(moved) != digest(rows)
