"""GrpoObjective on the shipped model: a rollout, its rewards, and what batches of which size make of it."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.config.rewards import Reward, Sampled
from glmtuner.distributed import ranks
from glmtuner.errors import TrainingError
from glmtuner.families.family import FAMILIES
from glmtuner.finetuning.trained import trained_parameters
from glmtuner.inference.sampling import Sampler
from glmtuner.launch.register import register_presets
from glmtuner.models.value_head import ValueHead, save_head
from glmtuner.objectives.grpo import GrpoObjective
from glmtuner.objectives.objective import Weights
from glmtuner.objectives.rollouts import RewardModelScores, random_states, shuffled

register_presets()
PROMPTS = [[5, 6, 7], [8, 9]]
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "prompt": ["one", "two"], "answer": ["1", "2"],
}  # fmt: skip


def run_of(*words: str):
    return compose(["model=tiny_glm", "tracker=none", *words]).run


def adapted(seed: int):
    """The shipped model with an adapter, as if it had been trained before."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_glm", dtype=torch.float32)
    finetuning = run_of("finetuning=lora").finetuning.resolved(FAMILIES["glm"], 4)
    model = finetuning.attach(model, FAMILIES["glm"])
    move(model, seed)
    return model, finetuning


def move(model, seed: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def answer_logprobs(model, batch) -> list[list[float]]:
    """Every answer's token log-probabilities, one row and one token at a time, without padding."""
    model.eval()
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        found.append([logprobs[t - 1, label].item() for t, label in enumerate(labels.tolist()) if label >= 0])
    return found


class Steps(Reward):
    """Rewards that are given in advance, over and over."""

    def __init__(self, *values: float, weight: float = 1.0) -> None:
        self.name, self.weight, self.values, self.seen = "steps", weight, values, []

    def scores(self, sampled: list[Sampled]) -> list[float]:
        self.seen = sampled
        return [self.values[row % len(self.values)] for row in range(len(sampled))]


def objective_of(*words: str, rewards: dict | None = None, model=None, **more) -> GrpoObjective:
    torch.manual_seed(0)
    settings = run_of("stage=grpo", "reward=number", "stage.num_generations=4", *words).stage
    model = adapted(seed=9)[0] if model is None else model
    sampler = Sampler(model, max_new_tokens=6, stop_ids=(2998,), pad_id=0, temperature=settings.temperature)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    return GrpoObjective(
        model,
        settings,
        rewards=rewards or {"steps": Steps(1.0, 0.0, 0.5, 0.0)},
        sampler=sampler,
        tokenizer=tokenizer,
        **more,
    )


def test_a_rollout_is_what_policy_reference_and_rewards_say():
    rewards = {"steps": Steps(1.0, 0.0, 0.5, 0.0, 2.0, 2.0, 2.0, 2.0, weight=2.0), "half": Steps(0.5)}
    objective = objective_of("stage.num_iterations=2", "stage.microbatch_size=3", rewards=rewards)
    move(objective.model, 11, size=0.05)  # the policy has left its reference
    rollout, measured, shown = objective.rollout(BATCH)
    ids, mask, labels = rollout.input_ids_RT, rollout.attention_mask_RT, rollout.labels_RT
    for row in range(8):
        prompt = PROMPTS[row // 4]
        assert ids[row, : len(prompt)].tolist() == prompt and (labels[row, : len(prompt)] == -100).all()
        assert rewards["steps"].seen[row].prompt == BATCH["prompt"][row // 4]
        assert rewards["steps"].seen[row].label == BATCH["answer"][row // 4]
        assert rewards["steps"].seen[row].tokens == int((labels[row] != -100).sum()) == measured["response_length"][row]
    assert len({tuple(row) for row in labels.tolist()}) > 4, "the answers are drawn"
    assert measured["reward"].tolist() == [2.5, 0.5, 1.5, 0.5, 4.5, 4.5, 4.5, 4.5]
    assert measured["reward_steps"].tolist() == [1, 0, 0.5, 0, 2, 2, 2, 2] and measured["no_signal"].tolist() == [0, 1]
    deviation = math.sqrt((1.25**2 + 2 * 0.75**2 + 0.25**2) / 3)
    wanted = [each / (deviation + 1e-4) for each in (1.25, -0.75, 0.25, -0.75)]
    assert rollout.advantages_R.tolist() == pytest.approx([*wanted, 0, 0, 0, 0], abs=1e-6)
    assert [line["reward"] for line in shown] == [2.5, 0.5, 1.5, 0.5]
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for found, logprobs in ((rollout.old_logprobs_RT, None), (rollout.reference_RT, objective.reference)):
        if logprobs is None:
            wanted = answer_logprobs(objective.model, rows)
        else:
            with logprobs.applied_to(objective.model):
                wanted = answer_logprobs(objective.model, rows)
        for row, values in enumerate(wanted):
            start = len(PROMPTS[row // 4]) - 1
            assert found[row, start : start + len(values)].tolist() == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_microbatches_change_nothing(loss):
    """The gradient of a minibatch is the sum of its parts', whatever the losses divide by."""
    objective = objective_of(f"stage.loss={loss}", "stage.num_iterations=2", "stage.mask_truncated_completions=true")
    rollout, _, _ = objective.rollout(BATCH)
    rollout.is_counted_RT[:5] = rollout.labels_RT[:5, 1:] != -100  # few answers of this model stop
    move(objective.model, 12, size=0.01)
    weights = objective.weights(rollout)
    gradients = []
    for size in (8, 3):
        objective.model.zero_grad()
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            objective.part_loss(rollout.rows(rows), weights[rows])[0].backward()
        gradients.append([p.grad.clone() for p in objective.model.parameters() if p.requires_grad])
    assert max(float(each.abs().max()) for each in gradients[0]) > 0
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_the_divergence_is_part_of_rloos_reward():
    objective = objective_of("stage.loss=rloo", "stage.beta=0.5")
    move(objective.model, 11, size=0.05)
    rollout, measured, _ = objective.rollout(BATCH)
    kl_R = ((rollout.old_logprobs_RT - rollout.reference_RT) * rollout.is_counted_RT).sum(1)
    learned = [reward - 0.5 * kl for reward, kl in zip(measured["reward"].tolist(), kl_R.tolist(), strict=True)]
    wanted = [each - (sum(learned[row // 4 * 4 :][:4]) - each) / 3 for row, each in enumerate(learned)]
    assert rollout.advantages_R.tolist() == pytest.approx(wanted, abs=1e-4)


def test_no_reference_is_held_without_a_divergence():
    objective = objective_of("stage.beta=0")
    rollout, _, _ = objective.rollout(BATCH)
    assert objective.reference is None and rollout.reference_RT is None and rollout.old_logprobs_RT is None
    assert "kl" not in objective.part_loss(rollout, objective.weights(rollout))[1]


def test_nothing_is_learned_from_answers_that_were_cut():
    objective = objective_of("stage.mask_truncated_completions=true")
    rollout, measured, _ = objective.rollout(BATCH)
    assert (rollout.is_counted_RT.any(1).float() == measured["response_stopped"]).all()


def test_a_reward_model_scores_prompt_and_answer(tmp_path):
    rewarded, finetuning = adapted(seed=8)
    finetuning.save(rewarded, tmp_path)
    head = ValueHead(192)
    with torch.no_grad():
        head.weight += 0.05 * torch.randn(1, 192)
    save_head(head, tmp_path)
    model, finetuning = adapted(seed=9)
    scorer = RewardModelScores(
        model, Weights.from_checkpoint(tmp_path, model, finetuning), tmp_path / "value_head.safetensors"
    )
    rewards = run_of("stage=grpo", "reward=model", "model.reward_model=x", "reward.model.weight=2").reward
    objective = objective_of("stage.microbatch_size=3", model=model, rewards=rewards, reward_model=scorer)
    rollout, measured, _ = objective.rollout(BATCH)
    for row in range(8):
        ids = rollout.input_ids_RT[row][rollout.attention_mask_RT[row].bool()]
        with torch.no_grad():
            states = rewarded.eval()(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
        assert measured["reward"][row].item() == pytest.approx(2 * head(states)[-1].item(), abs=1e-4)
    assert measured["reward"].std() > 1e-3


def test_a_reward_that_gives_too_few_scores_is_named():
    class Few(Steps):
        def scores(self, sampled):
            return [1.0]

    with pytest.raises(TrainingError, match='reward=few gave 1 scores for the 8 answers to "one"'):
        objective_of(rewards={"few": Few()}).rollout(BATCH)


def test_a_thought_that_the_prompt_begins_is_the_answers():
    objective = objective_of()
    ids = objective.tokenizer("Hi <think>\n", add_special_tokens=False)["input_ids"]
    assert objective._text(ids, [5]).startswith("<think>\n")
    assert not objective._text([5, 6], [5]).startswith("<think>")


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([math.nan] * 8, "gave nan for the 8 answers"),
        ([1.0, -math.inf, *[0.0] * 6], "gave -inf for the 8 answers"),
        (["0.5"] * 8, "gave '0.5' for the 8 answers"),
        ([None] * 8, "gave None for the 8 answers"),
        ([[1.0, 2.0]] * 8, "gave [1.0, 2.0] for the 8 answers"),
        ([10**400] * 8, "gave 1000"),
        ([], "gave 0 scores for the 8 answers"),
        (iter([1.0] * 9), "gave 9 scores for the 8 answers"),
        (None, "failed on the answers to"),
    ],
)
def test_what_is_no_score_is_named(scores, said):
    class Given(Steps):
        def scores(self, sampled):
            return scores

    with pytest.raises(TrainingError) as error:
        objective_of(rewards={"given": Given()}).rollout(BATCH)
    assert f"reward=given {said}" in str(error.value) and str(error.value).endswith("fix it, or leave it out")


def test_numbers_of_other_libraries_are_scores():
    class Given(Steps):
        def scores(self, sampled):
            return torch.tensor([1.0, 0.0, 0.5, 0.0] * 2)

    _, measured, _ = objective_of(rewards={"given": Given()}).rollout(BATCH)
    assert measured["reward"].tolist() == [1, 0, 0.5, 0] * 2


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_answers_that_were_all_cut_teach_nothing(loss, scale):
    """Nor do they give anything that is not finite."""
    if loss == "rloo" and scale == "group":
        pytest.skip("is refused")
    words = (f"stage.loss={loss}", f"stage.scale_rewards={scale}", "stage.beta=0", "stage.num_iterations=2")
    equal = objective_of(*words, rewards={"steps": Steps(3.0)})
    cut = objective_of(*words, "stage.mask_truncated_completions=true")
    cut.sampler.stop_ids = ()
    for objective in (equal, cut):
        rollout, measured, _ = objective.rollout(BATCH)
        loss_, found = objective.part_loss(rollout, objective.weights(rollout))
        loss_.backward()
        assert loss_.item() == 0
        assert all(not p.grad.any() for p in objective.model.parameters() if p.requires_grad)
        assert rollout.advantages_R.isfinite().all() and found["entropy"].isfinite().all()
    assert measured["response_stopped"].tolist() == [0] * 8 and not rollout.is_counted_RT.any()


@pytest.mark.parametrize("loss", ["grpo", "rloo"])
def test_a_steps_standard_deviation_is_that_of_all_ranks(loss, monkeypatch):
    objective = objective_of(f"stage.loss={loss}", "stage.scale_rewards=batch")
    mine, theirs = [1.0, 0.0, 0.5, 0.0, 2.0, 2.0, 2.0, 1.0], [9.0, 5.0, 1.0, 5.0, 0.0, 0.0, 4.0, 0.0]
    real = torch.ones(16, dtype=torch.bool)
    whole = objective._advantages(torch.tensor([*theirs, *mine]), real)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "all_gather", lambda value: [theirs, value])
    assert objective._advantages(torch.tensor(mine), real[:8]).tolist() == pytest.approx(whole[8:].tolist(), abs=1e-6)
    # a prompt that fills up the batch changes nothing
    filled = objective._advantages(torch.tensor([*mine, 90.0, 80.0, 7.0, 6.0]), torch.tensor([True] * 8 + [False] * 4))
    assert filled.tolist() == pytest.approx([*whole[8:].tolist(), 0, 0, 0, 0], abs=1e-6)
    if loss == "grpo":
        every = torch.tensor([*theirs, *mine])
        assert whole[8].item() == pytest.approx((1 - 0.375) / (every.std().item() + 1e-4), abs=1e-5)


def test_rows_that_fill_up_a_batch_come_last_and_are_left_out_where_no_rank_has_others(monkeypatch):
    real = torch.tensor([True, False, True, False, True, False, False, False])
    for seed in range(5):
        torch.manual_seed(seed)
        (whole,) = shuffled(real, None)
        assert {*whole.tolist()} == {*range(8)} and real[whole].tolist() == [True] * 3 + [False] * 5
        parts = shuffled(real, 2)
        assert [len(part) for part in parts] == [2, 2] and sorted(torch.cat(parts)[:3].tolist()) == [0, 2, 4]
    monkeypatch.setattr(ranks, "all_gather", lambda value: [value, 3])  # another rank has five rows
    assert len(shuffled(real, 2)) == 3
    assert len({tuple(shuffled(torch.ones(4, dtype=torch.bool), None)[0].tolist()) for _ in range(20)}) > 5


def test_what_is_drawn_depends_on_seed_step_and_place_among_all_ranks(monkeypatch):
    one = [state.random() for state in random_states(seed=1, step=2, answers=6)]
    assert len({*one}) == 6
    assert one == [state.random() for state in random_states(1, 2, 6)]
    assert not {*one} & {state.random() for other in ((2, 2), (1, 3)) for state in random_states(*other, 6)}
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert [state.random() for state in random_states(1, 2, 3)] == one[3:]
