"""Objectives on the shipped model against the formulas written out, and what they take for policy, reference and reward."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.families.family import FAMILIES
from glmtuner.finetuning.trained import trained_parameters
from glmtuner.inference.sampling import Sampler
from glmtuner.launch.register import register_presets
from glmtuner.models.value_head import ValueHead, save_head
from glmtuner.objectives.cpo import CpoObjective
from glmtuner.objectives.dpo import DpoObjective
from glmtuner.objectives.kto import KtoObjective
from glmtuner.objectives.objective import ReferenceObjective, Weights
from glmtuner.objectives.orpo import OrpoObjective
from glmtuner.objectives.ppo import PpoObjective
from glmtuner.objectives.rm import RewardObjective
from glmtuner.objectives.simpo import SimpoObjective

register_presets()


def run_of(*words: str):
    return compose(["model=tiny_glm", "tracker=none", *words]).run


def adapted(method: str = "lora", seed: int = 0, moved: bool = True):
    """The shipped model with a method attached; `moved` as if it had been trained before."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_glm", dtype=torch.float32)
    dropout = ["finetuning.lora_dropout=0.3"] if method == "lora" else []
    finetuning = run_of(f"finetuning={method}", *dropout).finetuning
    finetuning = finetuning.resolved(FAMILIES["glm"], 4)
    model = finetuning.attach(model, FAMILIES["glm"])
    if moved:
        move(model, seed)
    return model, finetuning


def move(model, seed: int, size: float = 0.02) -> None:
    """What training does: every trained parameter gets other values."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def batch_of(rows: list[tuple[list[int], list[int]]], **more) -> dict[str, torch.Tensor]:
    """A padded batch of (prompt, answer) token lists."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    table = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        pad = longest - len(prompt) - len(answer)
        table["input_ids"].append([*prompt, *answer, *[0] * pad])
        table["attention_mask"].append([1] * (len(prompt) + len(answer)) + [0] * pad)
        table["labels"].append([-100] * len(prompt) + [*answer] + [-100] * pad)
    return {name: torch.tensor(values) for name, values in table.items()} | more


PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PAIRS = batch_of([(PROMPTS[0], [20, 21, 22]), (PROMPTS[1], [23, 24]), (PROMPTS[0], [30]), (PROMPTS[1], [31, 32, 33])])


@torch.no_grad()
def answer_logprobs(model, batch) -> list[list[float]]:
    """Every answer's token log-probabilities, one row and one token at a time, without padding."""
    model.eval()
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        found.append([logprobs[t - 1, label].item() for t, label in enumerate(labels.tolist()) if label >= 0])
    return found


def test_weights_in_place_of_others_and_back():
    model, _ = adapted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    kept = Weights.snapshot(model)
    move(model, 7)
    moved = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    for _ in range(2):
        with pytest.raises(KeyError), kept.applied_to(model):
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError  # an error inside puts them back all the same
        assert all(torch.equal(parameter, moved[name]) for name, parameter in model.named_parameters())
        assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_weights_read_from_a_run_leave_the_model_alone(tmp_path, method):
    other, finetuning = adapted(method, seed=3)
    finetuning.save(other, tmp_path)
    model, finetuning = adapted(method, seed=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = Weights.from_checkpoint(tmp_path, model, finetuning)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert found.values.keys() == trained_parameters(model).keys(), "nothing is held twice that is the same"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with found.applied_to(model):
        mine = model(input_ids=ids).logits
    torch.testing.assert_close(mine, other.eval()(input_ids=ids).logits.detach())


# -- reward models -------------------------------------------------------------------------------------------------------


def test_a_score_is_the_head_on_the_last_token_whatever_the_padding():
    model, _ = adapted()
    objective = RewardObjective(model, head=None)
    model.eval()
    scores = objective.scores(PAIRS)
    for place, (ids, mask) in enumerate(zip(PAIRS["input_ids"], PAIRS["attention_mask"], strict=True)):
        states = model(input_ids=ids[mask.bool()][None], output_hidden_states=True).hidden_states[-1]
        wanted = states[0, -1] @ model.value_head.weight[0] + model.value_head.bias[0]
        assert scores[place].item() == pytest.approx(wanted.item(), abs=1e-4)
    loss, measured = objective.loss(model, PAIRS)
    margins = (scores[:2] - scores[2:]).tolist()
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-margin)) for margin in margins], abs=1e-5)
    assert measured["margin"].tolist() == pytest.approx(margins, abs=1e-5)
    assert measured["accuracy"].tolist() == [float(margin > 0) for margin in margins]


def test_a_reward_learns_through_head_and_adapter_and_not_through_the_words():
    model, _ = adapted("full", moved=False)
    objective = RewardObjective(model, head=None)
    objective.loss(model, PAIRS)[0].mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    assert model.value_head.weight.grad.any()


def test_a_head_of_chatglm_efficient_tuning_is_read(tmp_path):
    torch.save(
        {"v_head.summary.weight": torch.full((1, 192), 0.5), "v_head.summary.bias": torch.tensor([2.0])},
        tmp_path / "value_head.bin",
    )
    model, _ = adapted()
    RewardObjective(model, head=tmp_path / "value_head.bin")
    assert model.value_head(torch.ones(3, 192)).tolist() == [98.0] * 3


# -- dpo and kto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        ([], lambda c, r, nc, nr: math.log(1 + math.exp(-0.1 * (c - r)))),
        (["stage.label_smoothing=0.2"], lambda c, r, nc, nr: 0.8 * math.log(1 + math.exp(-0.1 * (c - r))) + 0.2 * math.log(1 + math.exp(0.1 * (c - r)))),
        (["stage.loss=ipo"], lambda c, r, nc, nr: (c / nc - r / nr - 5) ** 2),
        (["stage.loss=hinge"], lambda c, r, nc, nr: max(0.0, 1 - 0.1 * (c - r))),
        (["stage.loss=sigmoid_norm", "stage.beta=2"], lambda c, r, nc, nr: math.log(1 + math.exp(-2 * (c / nc - r / nr)))),
        (["stage.loss=sppo_hard"], lambda c, r, nc, nr: (c - 5) ** 2 + (r + 5) ** 2),
        (["stage.loss=apo_zero"], lambda c, r, nc, nr: 1 - 1 / (1 + math.exp(-0.1 * c)) + 1 / (1 + math.exp(-0.1 * r))),
        (["stage.loss=apo_down"], lambda c, r, nc, nr: 1 / (1 + math.exp(-0.1 * c)) + 1 - 1 / (1 + math.exp(-0.1 * (c - r)))),
    ],
    ids=["sigmoid", "smoothed", "ipo", "hinge", "sigmoid_norm", "sppo_hard", "apo_zero", "apo_down"],
)  # fmt: skip
def test_dpo_is_the_formula_on_the_ratio_to_the_model_at_the_start(words, formula):
    model, _ = adapted()
    reference = [sum(row) for row in answer_logprobs(model, PAIRS)]
    objective = DpoObjective(model, run_of("stage=dpo", *words).stage)
    move(model, 5, size=0.05)
    policy = [sum(row) for row in answer_logprobs(model, PAIRS)]
    model.train()
    loss, measured = objective.loss(model, PAIRS)
    ratios, tokens = [p - r for p, r in zip(policy, reference, strict=True)], [3, 2, 1, 3]
    wanted = [formula(ratios[i], ratios[i + 2], tokens[i], tokens[i + 2]) for i in (0, 1)]
    assert loss.tolist() == pytest.approx(wanted, abs=2e-4)
    assert abs(wanted[0] - formula(0, 0, 1, 1)) > 1e-3, "the policy has moved"
    if not words:
        assert measured["reward_chosen"].tolist() == pytest.approx([0.1 * ratio for ratio in ratios[:2]], abs=1e-4)
        assert measured["margin"].tolist() == pytest.approx(
            [0.1 * (ratios[i] - ratios[i + 2]) for i in (0, 1)], abs=1e-4
        )


def test_the_sft_term_is_the_better_answers_loss_per_token():
    model, _ = adapted()
    plain = DpoObjective(model, run_of("stage=dpo").stage).loss(model, PAIRS)[0]
    added = DpoObjective(model, run_of("stage=dpo", "stage.sft_weight=2").stage).loss(model, PAIRS)[0]
    rows = answer_logprobs(model, PAIRS)[:2]
    assert (added - plain).tolist() == pytest.approx([-2 * sum(row) / len(row) for row in rows], abs=1e-4)


def test_the_reference_of_a_new_adapter_is_the_model_with_the_adapter_off():
    model, _ = adapted(moved=False)
    objective = DpoObjective(model, run_of("stage=dpo").stage)
    move(model, 5)
    with objective.reference.applied_to(model):
        found = objective.answer_logprobs(model, PAIRS)
    with torch.no_grad(), model.disable_adapter():
        wanted = objective.answer_logprobs(model, PAIRS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_policy_at_its_reference_loses_log_two_with_dropout_configured():
    model, _ = adapted()
    objective = DpoObjective(model, run_of("stage=dpo").stage)
    model.train()
    loss, measured = objective.loss(model, PAIRS)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert measured["margin"].tolist() == pytest.approx([0, 0], abs=1e-5)


def test_kto_is_the_formula_with_the_kl_of_crossed_answers():
    model, _ = adapted()
    batch = PAIRS | {"is_desirable": torch.tensor([True, False])}
    reference = [sum(row) for row in answer_logprobs(model, PAIRS)]
    objective = KtoObjective(model, run_of("stage=kto", "stage.undesirable_weight=1.5").stage)
    move(model, 6, size=0.05)
    policy = [sum(row) for row in answer_logprobs(model, PAIRS)]
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    kl = max(0.0, (ratios[2] + ratios[3]) / 2)
    model.train()
    loss, measured = objective.loss(model, batch)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    wanted = [1 - sigmoid(0.1 * (ratios[0] - kl)), 1.5 * (1 - sigmoid(0.1 * (kl - ratios[1])))]
    assert loss.tolist() == pytest.approx(wanted, abs=1e-4)
    assert measured["kl"].tolist() == pytest.approx([kl] * 2, abs=1e-3)
    assert measured["reward_desirable"].isnan().tolist() == [False, True]
    assert measured["reward_undesirable"][1].item() == pytest.approx(0.1 * ratios[1], abs=1e-4)


# -- pairs without a reference -------------------------------------------------------------------------------------------


def odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def sigmoid_loss(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


# of the sums of the two answers' log-probabilities c and r, and their means mc and mr
FORMULAS = [
    (OrpoObjective, ["stage=orpo"], lambda c, r, mc, mr: -mc + 0.1 * sigmoid_loss(odds(mc) - odds(mr))),
    (SimpoObjective, ["stage=simpo"], lambda c, r, mc, mr: sigmoid_loss(2 * mc - 2 * mr - 1)),
    (SimpoObjective, ["stage=simpo", "stage.gamma=0.4", "stage.sft_weight=0.3"], lambda c, r, mc, mr: sigmoid_loss(2 * mc - 2 * mr - 0.4) - 0.3 * mc),
    (CpoObjective, ["stage=cpo"], lambda c, r, mc, mr: sigmoid_loss(0.1 * (c - r)) - mc),
    (CpoObjective, ["stage=cpo", "stage.loss=hinge", "stage.sft_weight=0"], lambda c, r, mc, mr: max(0.0, 1 - 0.1 * (c - r))),
    (CpoObjective, ["stage=cpo", "stage.loss=ipo", "stage.sft_weight=0.5"], lambda c, r, mc, mr: (mc - mr - 5) ** 2 - 0.5 * mc),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "formula"), FORMULAS)
def test_a_loss_without_a_reference_is_the_formula(kind, words, formula):
    model, _ = adapted()
    objective = kind(model, run_of(*words).stage)
    found, measured = objective.loss(model.eval(), PAIRS)
    tokens = answer_logprobs(model, PAIRS)
    sums, means = [sum(each) for each in tokens], [sum(each) / len(each) for each in tokens]
    wanted = [formula(sums[i], sums[i + 2], means[i], means[i + 2]) for i in (0, 1)]
    assert found.tolist() == pytest.approx(wanted, abs=2e-4, rel=1e-4)
    assert measured["nll_chosen"].tolist() == pytest.approx([-mean for mean in means[:2]], abs=1e-4)
    assert measured["accuracy"].tolist() == [float(m > 0) for m in measured["margin"].tolist()]


@pytest.mark.parametrize("kind", [OrpoObjective, SimpoObjective, CpoObjective])
def test_nothing_is_held_besides_the_model(kind):
    """No copy of weights stands for a reference, and dropout stays as it is configured."""
    model, _ = adapted()
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    objective = kind(model, run_of(f"stage={kind.__name__.removesuffix('Objective').lower()}").stage)
    assert not isinstance(objective, ReferenceObjective)
    assert not [value for value in vars(objective).values() if isinstance(value, torch.Tensor | dict)]
    assert vars(objective).keys() == {"model", "settings"}
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == rates and 0.3 in rates


# -- ppo -----------------------------------------------------------------------------------------------------------------


def ppo(tmp_path, *words: str, weight: float = 0.05):
    """A policy, and a reward model with another adapter and a head of its own."""
    torch.manual_seed(0)
    rewarded, finetuning = adapted(seed=8)
    finetuning.save(rewarded, tmp_path)
    head = ValueHead(192)
    with torch.no_grad():
        head.weight += weight * torch.randn(1, 192)
    save_head(head, tmp_path)
    model, finetuning = adapted(seed=9)
    settings = run_of("stage=ppo", "model.reward_model=x", "trainer.per_device_train_batch_size=4", *words).stage
    objective = PpoObjective(
        model, settings, reward=Weights.from_checkpoint(tmp_path, model, finetuning), reward_head=tmp_path / "value_head.safetensors",
        sampler=Sampler(model, max_new_tokens=6, stop_ids=(2998,), pad_id=0, temperature=settings.temperature),
    )  # fmt: skip
    return objective, rewarded, head


FOUR = [*PROMPTS, [12, 13, 14], [15]]


def test_a_rollout_is_what_policy_reference_and_reward_model_say(tmp_path):
    objective, rewarded, head = ppo(tmp_path, "stage.whiten_advantages=false", "stage.minibatch_size=3")
    move(objective.model, 11, size=0.05)  # the policy has left its reference
    with torch.no_grad():
        objective.model.value_head.weight += 0.05 * torch.randn(1, 192)
    rollout, measured, kl = objective.rollout(FOUR)
    batch = {
        "input_ids": rollout.input_ids_RT,
        "attention_mask": rollout.attention_mask_RT,
        "labels": rollout.labels_RT,
    }
    policy = answer_logprobs(objective.model, batch)
    with objective.reference.applied_to(objective.model):
        reference = answer_logprobs(objective.model, batch)
    kls = [[p - r for p, r in zip(*rows, strict=True)] for rows in zip(policy, reference, strict=True)]
    assert kl == pytest.approx(sum(map(sum, kls)) / 4, abs=1e-3) and abs(kl) > 1e-3
    for place in range(4):
        ids = rollout.input_ids_RT[place][rollout.attention_mask_RT[place].bool()]
        assert ids[: len(FOUR[place])].tolist() == FOUR[place]
        with torch.no_grad():
            theirs = rewarded.eval()(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
            mine = objective.model.eval()(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
            score, values = head(theirs)[-1].item(), objective.model.value_head(mine).tolist()
        assert measured["reward"][place].item() == pytest.approx(score, abs=1e-4)
        start, length = len(FOUR[place]), len(policy[place])
        assert measured["response_length"][place] == length == len(ids) - start
        values = values[start - 1 : start - 1 + length]  # a token's value is read where it is predicted
        rewards = [-0.1 * k for k in kls[place]]
        rewards[-1] += score
        advantage, wanted = 0.0, []
        for t in reversed(range(length)):
            following = values[t + 1] if t + 1 < length else 0.0
            advantage = rewards[t] + following - values[t] + 0.95 * advantage
            wanted.insert(0, advantage)
        found = rollout.advantages_RT[place, start - 1 : start - 1 + length].tolist()
        assert found == pytest.approx(wanted, abs=1e-3)


def test_the_first_update_starts_where_the_answers_were_given(tmp_path):
    """The ratio is 1: nothing is clipped, and the loss is the mean of whitened advantages, 0."""
    objective, _, _ = ppo(tmp_path, "stage.value_coefficient=0")
    rollout, _measured, kl = objective.rollout(FOUR)
    assert kl == pytest.approx(0, abs=1e-5), "a policy at its reference"
    objective.model.train()
    loss, found = objective.update_loss(rollout)
    assert found["clip_fraction"].item() == 0
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert any(parameter.grad.abs().max() > 1e-6 for parameter in trained_parameters(objective.model).values())


def test_updates_raise_the_probability_of_better_answers(tmp_path):
    objective, _, _ = ppo(tmp_path, "stage.kl_coefficient=0", weight=0.5)
    rollout, _measured, _ = objective.rollout(FOUR)
    optimizer = torch.optim.SGD(trained_parameters(objective.model).values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        objective.update_loss(rollout)[0].backward()
        optimizer.step()
    with torch.no_grad():
        logprobs, _, _ = objective._answer_statistics(
            rollout.input_ids_RT, rollout.attention_mask_RT, rollout.labels_RT
        )
    gained = ((logprobs - rollout.old_logprobs_RT) * rollout.advantages_RT).sum()
    assert gained > 0


def test_scores_are_clipped_and_temperature_is_in_the_probabilities(tmp_path):
    objective, _, _ = ppo(tmp_path, "stage.score_clip=0.01", "stage.temperature=2")
    rollout, measured, _ = objective.rollout(FOUR)
    assert measured["reward"].abs().max() <= 0.01
    ids = rollout.input_ids_RT[3][rollout.attention_mask_RT[3].bool()]
    with torch.no_grad():
        logprobs = torch.log_softmax(objective.model.eval()(input_ids=ids[None]).logits[0] / 2, -1)
    wanted = [logprobs[t - 1, ids[t]].item() for t in range(1, len(ids))]
    assert rollout.old_logprobs_RT[3, : len(wanted)].tolist() == pytest.approx(wanted, abs=1e-4)


def test_rewards_can_be_whitened(tmp_path):
    """Their variance is 1 before advantages are worked out of them: with a value of 0 and no discount, a return is their sum."""
    objective, _, _ = ppo(tmp_path, "stage.whiten_rewards=true", "stage.gae_lambda=1", weight=3.0)
    rollout, measured, _ = objective.rollout(FOUR)
    returns_RT, is_response_RT = rollout.returns_RT, rollout.is_response_RT
    following_RT = torch.nn.functional.pad(returns_RT, (0, 1))[:, 1:]
    rewards = (returns_RT - following_RT)[is_response_RT]
    assert measured["reward"].abs().max() > 3
    assert rewards.std().item() == pytest.approx(1, abs=1e-3)


def test_minibatches_hold_every_row_once_in_every_pass(tmp_path):
    objective, _, _ = ppo(tmp_path, "stage.minibatch_size=3", "stage.ppo_epochs=2")
    rollout, _, _ = objective.rollout(FOUR)
    sizes = [len(part.labels_RT) for part in objective.minibatches(rollout)]
    assert sizes == [3, 1, 3, 1]
    sums = [part.returns_RT.sum().item() for part in objective.minibatches(rollout)]
    assert (
        sums[0] + sums[1]
        == pytest.approx(rollout.returns_RT.sum().item(), abs=1e-4)
        == pytest.approx(sums[2] + sums[3])
    )


def test_what_ppo_carries_from_step_to_step_is_saved(tmp_path):
    objective, _, _ = ppo(tmp_path / "a")
    objective.kl_coefficient = 0.123456789
    with torch.no_grad():
        objective.model.value_head.weight += 1
    (tmp_path / "state").mkdir()
    objective.save(tmp_path / "state")
    again, _, _ = ppo(tmp_path / "b")
    again.restore(tmp_path / "state")
    assert again.kl_coefficient == 0.123456789
    assert torch.equal(again.model.value_head.weight, objective.model.value_head.weight)


def test_the_kl_coefficient_follows_its_target(tmp_path):
    objective, _, _ = ppo(tmp_path, "stage.kl_target=1", "stage.kl_horizon=40", "stage.ppo_epochs=1")
    move(objective.model, 12, size=0.08)
    optimizer = torch.optim.SGD(objective.model.value_head.parameters(), lr=0.0)
    seen = {}
    trainer = SimpleNamespace(
        measured=SimpleNamespace(add=lambda found: seen.update(found)), tokens=torch.tensor(0), optimizer=optimizer,
        args=SimpleNamespace(max_grad_norm=1.0, seed=0), state=SimpleNamespace(global_step=0), compute_loss_context_manager=torch.enable_grad,
        accelerator=SimpleNamespace(backward=lambda loss: loss.backward()),
    )  # fmt: skip
    batch = batch_of([(prompt, []) for prompt in FOUR])
    objective.update(trainer, objective.model, batch)
    error = min(max(seen["kl"].mean().item() - 1, -0.2), 0.2)
    assert objective.kl_coefficient == pytest.approx(0.1 * (1 + error * 4 / 40))
    assert {"reward", "kl", "entropy", "clip_fraction", "value_loss", "response_length"} <= seen.keys()
