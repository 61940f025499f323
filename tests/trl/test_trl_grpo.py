"""The losses and advantages of stage=grpo are those of TRL's own trainers, on the same answers, rewards and weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.inference.sampling import Sampler
from glmtuner.kernels.chunked_loss import disable_chunked_loss, enable_chunked_loss
from glmtuner.kernels.segment_attention import disable_segment_attention, enable_segment_attention
from glmtuner.launch.register import register_presets
from glmtuner.objectives.grpo import Group, GrpoObjective
from glmtuner.templates.base import IGNORE_INDEX

register_presets()
TINY = ASSETS / "tiny_glm"
RECORDS = Dataset.from_list([{"prompt": "Hi"}] * 4)  # which no loss is asked of
OTHER = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "num_generations": 4,
}
PROMPTS, ANSWERS, LONGEST = (5, 5, 3, 3), (6, 2, 4, 1), 6
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -1.5])


def moved(model: Any, seed: int, size: float = 0.01) -> Any:
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def rows() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same prompts and answers as ours have them, padded on the right, and as TRL does, prompts on the left."""
    generator = torch.Generator().manual_seed(0)
    ours = {"input_ids": torch.zeros(4, 11, dtype=torch.long), "attention_mask": torch.zeros(4, 11, dtype=torch.long)}
    ours["labels"] = torch.full((4, 11), IGNORE_INDEX)
    theirs = {
        f"{part}_{kind}": torch.zeros(4, width, dtype=torch.long)
        for part, width in (("prompt", 5), ("completion", LONGEST))
        for kind in ("ids", "mask")
    }
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.randint(10, 2000, (prompt + answer,), generator=generator)
        ours["input_ids"][row, : prompt + answer] = ids
        ours["attention_mask"][row, : prompt + answer] = 1
        ours["labels"][row, prompt : prompt + answer] = ids[prompt:]
        theirs["prompt_ids"][row, 5 - prompt :], theirs["prompt_mask"][row, 5 - prompt :] = ids[:prompt], 1
        theirs["completion_ids"][row, :answer], theirs["completion_mask"][row, :answer] = ids[prompt:], 1
    return ours, theirs


def objective_of(model: Any, *words: str) -> GrpoObjective:
    run = compose(["model=tiny_glm", "tracker=none", "stage=grpo", "reward=number", "finetuning=full", *words]).run
    sampler = Sampler(model, max_new_tokens=LONGEST, stop_ids=(), pad_id=0, temperature=run.stage.temperature)  # type: ignore[attr-defined]
    return GrpoObjective(
        model,
        run.stage,
        rewards=run.reward,
        sampler=sampler,
        tokenizer=AutoTokenizer.from_pretrained(TINY),  # type: ignore[arg-type]
    )


def at_answers(values_RT: torch.Tensor) -> torch.Tensor:
    """Values of the answers' tokens, [4, 10], as TRL has them, [4, 6]."""
    out = torch.zeros(4, LONGEST)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        out[row, :answer] = values_RT[row, prompt - 1 : prompt - 1 + answer]
    return out


def check(
    words: list[str], trainer_class: Any, config: Any, settings: dict[str, Any], folder: Path, fast: bool = False
) -> None:
    """The same loss within 1e-5 and, of every weight, the same gradient; policy, old policy and reference are three models."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    old, policy, reference = moved(base, 1, 0.02), moved(base, 2), moved(base, 3)
    ours, theirs = rows()
    objective = objective_of(policy, *words)
    tables = [ours[name] for name in ("input_ids", "attention_mask", "labels")]
    with torch.no_grad():
        old_RT, reference_RT = (objective_of(model, *words)._logprobs(*tables) for model in (old, reference))
    beta = objective.settings.beta
    group = Group(
        input_ids_RT=tables[0], attention_mask_RT=tables[1], labels_RT=tables[2], is_counted_RT=tables[2][:, 1:] != IGNORE_INDEX,
        advantages_R=ADVANTAGES, is_real_R=torch.ones(4, dtype=torch.bool), old_logprobs_RT=old_RT, reference_RT=reference_RT if beta else None,
    )  # fmt: skip
    trainer = trainer_class(
        copy.deepcopy(policy), lambda **_: [0.0], config(str(folder), max_completion_length=LONGEST, beta=beta, **OTHER, **settings),
        train_dataset=RECORDS, processing_class=AutoTokenizer.from_pretrained(TINY),
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    asked = {
        **theirs, "advantages": ADVANTAGES, "old_per_token_logps": at_answers(old_RT), "old_logps": old_RT.sum(1),
        "ref_per_token_logps": at_answers(reference_RT), "num_items_in_batch": theirs["completion_mask"].sum(),
    }  # fmt: skip
    wanted = trainer._compute_loss(trainer.model, asked)
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    if fast:
        enable_segment_attention(policy)
        enable_chunked_loss(policy)
    try:
        weights_RT = objective.weights(group)
        total = 0.0
        for part in (slice(0, 3), slice(3, 4)):  # in microbatches
            loss = objective.part_loss(group.rows(part), weights_RT[part])[0]
            loss.backward()
            total += loss.item()
    finally:
        if fast:
            disable_chunked_loss(policy)
            disable_segment_attention(policy)
    assert total == pytest.approx(wanted.item(), abs=1e-5, rel=1e-5) and abs(total) > 1e-3
    size = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert size > 0
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5 * size, rtol=1e-3)


TOKEN, SEQUENCE = {"importance_sampling_level": "token"}, {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["stage.loss=grpo"], {"loss_type": "grpo", "epsilon": 0.2, **TOKEN}),
        (["stage.loss=grpo", "stage.temperature=0.7"], {"loss_type": "grpo", "temperature": 0.7, **TOKEN}),
        (["stage.loss=dr_grpo", "stage.epsilon=0.05"], {"loss_type": "dr_grpo", "epsilon": 0.05, **TOKEN}),
        (["stage.loss=dapo"], {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, **TOKEN}),
        (["stage.loss=gspo"], {"loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4, **SEQUENCE}),
        (["stage.loss=gspo", "stage.epsilon=0.5"], {"loss_type": "grpo", "epsilon": 0.5, **SEQUENCE}),
    ],
)  # fmt: skip
def test_grpo(tmp_path: Path, words: list[str], settings: dict[str, Any], beta: float) -> None:
    """TRL's default multiplies the KL divergence by the ratio, the paper of GRPO does not."""
    for corrected in (False, True) if beta else (False,):
        more = [f"stage.beta={beta}", f"stage.use_bias_correction_kl={corrected}"]
        check([*words, *more], GRPOTrainer, GRPOConfig, {**settings, "use_bias_correction_kl": corrected}, tmp_path)


def test_grpo_on_the_fast_paths(tmp_path: Path) -> None:
    """The rows without padding, and their log-probabilities in chunks."""
    check(
        ["stage.loss=grpo"],
        GRPOTrainer,
        GRPOConfig,
        {"loss_type": "grpo", "use_bias_correction_kl": False, **TOKEN},
        tmp_path,
        fast=True,
    )


@pytest.mark.parametrize("epsilon", [0.2, 0.9])
def test_rloo(tmp_path: Path, epsilon: float) -> None:
    """The KL divergence is in the reward, of which the loss knows nothing."""
    check(["stage.loss=rloo", f"stage.epsilon={epsilon}"], RLOOTrainer, RLOOConfig, {"epsilon": epsilon}, tmp_path)
