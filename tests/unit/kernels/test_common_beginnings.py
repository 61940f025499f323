"""Prompts that rows have in common, computed once: states, losses and gradients are those of whole rows in plain torch."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from segment_models import MODELS, V1, model_of
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from glmtuner.data.collate import Collator
from glmtuner.families import family_named
from glmtuner.finetuning.p_tuning import PTuning
from glmtuner.kernels import common_beginnings
from glmtuner.kernels.choose import choose_optimizations
from glmtuner.kernels.chunked_loss import enable_chunked_loss
from glmtuner.kernels.common_beginnings import SharedRows, has_dropout, share_beginnings, shares_beginnings
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.kernels.segment_attention import enable_segment_attention
from glmtuner.models.unwrap import unwrapped
from glmtuner.objectives.objective import disable_dropout
from glmtuner.objectives.rows import Rows

PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22]]
# prompt and answer; the second begins as the first and goes on, the third is the first, the last has a prompt of its own
ANSWERS = [
    (0, [30, 31, 32]), (1, [33, 34]), (0, [30, 31, 32, 35, 36]), (0, [30, 31, 32]), (0, [37]), (1, [33, 38, 39, 40]), (None, [41, 42]),
]  # fmt: skip


def batch_of(name: str, answers=ANSWERS) -> dict[str, torch.Tensor]:
    begin = [V1["gmask_token_id"], V1["bos_token_id"]] if name.startswith("chatglm") and name != "chatglm2" else []
    rows = [((PROMPTS[prompt] if prompt is not None else [50, 51]) + begin, answer) for prompt, answer in answers]
    longest = max(len(prompt + answer) for prompt, answer in rows)
    pads = [longest - len(prompt + answer) for prompt, answer in rows]
    both = list(zip(rows, pads, strict=True))
    return {
        "input_ids": torch.tensor([prompt + answer + [3] * pad for (prompt, answer), pad in both]),
        "attention_mask": torch.tensor([[1] * (longest - pad) + [0] * pad for pad in pads]),
        "labels": torch.tensor([[-100] * len(prompt) + answer + [-100] * pad for (prompt, answer), pad in both]),
    }


def learned(model, batch, weights_RT):
    """What objectives read of rows, and the gradients of sums of it."""
    found = Rows.of(model, batch).statistics(batch["labels"], temperature=0.8, entropy=True, states=True)
    rows = Rows.of(model, batch)
    last_RH = rows.last_states()
    scores_RT = rows.unpacked(found.states_BSH.sum(-1)) * batch["attention_mask"]
    total = (found.logprobs_RT * weights_RT).sum() + (scores_RT * weights_RT).sum() + last_RH.square().sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    return [found.logprobs_RT, found.entropies_RT, scores_RT, last_RH], gradients


def compare(model, batch):
    weights_RT = torch.randn(batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    wanted, wanted_gradients = learned(model, batch, weights_RT)
    enable_segment_attention(unwrapped(model))
    enable_chunked_loss(unwrapped(model))
    share_beginnings(unwrapped(model))
    rows = Rows.of(model, batch)
    assert rows.inputs["input_ids"].shape[1] < batch["attention_mask"].sum()
    found, gradients = learned(model, batch, weights_RT)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=3e-5, rtol=3e-5)
    for mine, right in zip(gradients, wanted_gradients, strict=True):
        assert (mine is None) == (right is None)
        if right is not None:
            assert (mine - right).norm() <= 2e-5 * max(right.norm().item(), 1.0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(common_beginnings, "SHORTEST", 2)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "sdpa") for name in MODELS] + [(name, "eager") for name in MODELS if not name.startswith("chatglm")],
)
def test_states_losses_and_gradients_are_those_of_whole_rows(name, attention):
    model = model_of(name)
    model.config._attn_implementation = attention
    compare(model, batch_of(name))


@pytest.mark.parametrize("name", ["glm", "chatglm", "chatglm2"])
@pytest.mark.parametrize("method", ["lora", "p_tuning"])
def test_with_methods(name, method):
    model = model_of(name)
    family = family_named({"glm": "glm", "chatglm": "chatglm", "chatglm2": "chatglm2"}[name])
    if method == "lora":
        layers = ["qkv_proj", "q_proj", "v_proj", "query_key_value", "down_proj"]
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[each for each in layers if each in names]))
    else:
        model = PTuning(pre_seq_len=3, prefix_projection=False, finetuning_type="p_tuning").attach(model, family)
        disable_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    compare(model, batch_of(name))


def test_random_batches():
    draw = random.Random(0)
    for _ in range(12):
        answers = [
            (draw.choice([0, 0, 1, None]), [draw.choice([30, 31]) for _ in range(draw.randint(1, 6))])
            for _ in range(draw.randint(3, 9))
        ]
        answers += [answers[0]]
        compare(model_of("glm"), batch_of("glm", answers))


def test_what_is_shared():
    rows = [torch.tensor(row) for row in ([1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8, 9], [1, 2, 3, 9, 4], [7, 8, 1])]
    shared = SharedRows.of(rows, shortest=2)
    assert shared.starts == (
        0,
        2,
        0,
        2,
        0,
    )  # the fourth's longest common beginning is with the second, which has none of its own
    assert shared.owners == (
        0,
        0,
        2,
        0,
        4,
    )  # of the third and the fifth, the one common token that may be shared is too short
    assert shared.own(rows).tolist() == [1, 2, 3, 4, 5, 3, 9, 7, 8, 9, 3, 9, 4, 7, 8, 1]
    assert shared.segments.lengths == (5, 2, 3, 3, 3) and shared.segments.reaches == (5, 4, 3, 5, 3)
    assert shared.places(5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 0], [7, 8, 9, 0, 0], [0, 1, 10, 11, 12], [13, 14, 15, 0, 0]]  # fmt: skip
    predicted = shared.places(5, predicted=True)  # the last common tokens are predicted where the common ones are
    assert predicted.tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 6, 0],
        [7, 8, 9, 0, 0],
        [0, 1, 2, 11, 12],
        [13, 14, 15, 0, 0],
    ]
    assert SharedRows.of(rows, shortest=3).starts == (0, 0, 0, 3, 0)


def test_rows_of_their_own_draws_are_computed_whole():
    model = model_of("glm")
    share_beginnings(model)
    assert shares_beginnings(model)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=96))  # with dropout of 0.1
    share_beginnings(model)
    assert has_dropout(model) and not shares_beginnings(model.train()) and shares_beginnings(model.eval())
    disable_dropout(model)
    assert shares_beginnings(model.train())
    attention = model_of("mistral").train()
    attention.model.layers[0].self_attn.attention_dropout = 0.1  # no module, the attention function draws it
    assert has_dropout(attention)
    disable_dropout(attention)
    assert not has_dropout(attention)


def test_it_is_tried_before_it_is_used(monkeypatch):
    samples = [
        {"input_ids": [10, 11, 12, 30, 31, 32], "labels": [-100, -100, -100, 30, 31, 32]},
        {"input_ids": [20, 21, 33], "labels": [-100, -100, 33]},
    ]
    model = model_of("glm")
    chosen = choose_optimizations(model, samples, Collator(pad_id=3), by_token=True)
    assert FastPath.common_beginnings in chosen.enabled and shares_beginnings(model)
    model = model_of("glm")
    chosen = choose_optimizations(model, samples, Collator(pad_id=3))  # sft: one row to a prompt
    assert chosen.left_out[FastPath.common_beginnings] == "" and not shares_beginnings(model)
    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4))
    chosen = choose_optimizations(model, samples, Collator(pad_id=3), by_token=True)
    assert "recurrent" in chosen.left_out[FastPath.common_beginnings]
    model = model_of("glm")  # a fault in it changes the loss, and it is left out
    right = SharedRows.segments.func
    wrong = property(lambda self: type(right(self))(right(self).lengths, self.contexts, (), ()))
    monkeypatch.setattr(common_beginnings.SharedRows, "segments", wrong)
    chosen = choose_optimizations(model, samples, Collator(pad_id=3), by_token=True)
    assert "the loss of two samples would be" in chosen.left_out[FastPath.common_beginnings]
    assert FastPath.without_padding in chosen.enabled and not shares_beginnings(model)
