"""The losses of stage=dpo, orpo, simpo and cpo are those of TRL's own trainers, on the same batch and weights.

TRL is no dependency; `make test-trl` installs it beside the environment. Its trainers are built as their users build them, and
asked for the loss of a batch; nothing of TRL's is replaced.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.kernels.chunked_loss import disable_chunked_loss, enable_chunked_loss
from glmtuner.kernels.segment_attention import disable_segment_attention, enable_segment_attention
from glmtuner.launch.register import register_presets
from glmtuner.objectives.cpo import CpoObjective
from glmtuner.objectives.dpo import DpoObjective
from glmtuner.objectives.orpo import OrpoObjective
from glmtuner.objectives.simpo import SimpoObjective
from glmtuner.templates.base import IGNORE_INDEX

register_presets()
TINY = ASSETS / "tiny_glm"
RECORDS = Dataset.from_list([{"prompt": "Hi", "chosen": " there", "rejected": " no"}] * 2)  # which no loss is asked of
OTHER = {"report_to": "none", "use_cpu": True, "bf16": False, "remove_unused_columns": False}


def rows(pairs: list[tuple[int, int, int]], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Chosen and rejected answers to the same prompts, as (prompt, answer) token lists of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> list[int]:
        return torch.randint(10, 2000, (length,), generator=generator).tolist()

    prompts = [drawn(prompt) for prompt, _, _ in pairs]
    chosen = [(prompt, drawn(length)) for prompt, (_, length, _) in zip(prompts, pairs, strict=True)]
    return chosen, [(prompt, drawn(length)) for prompt, (_, _, length) in zip(prompts, pairs, strict=True)]


def padded(answers: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) + len(answer) for prompt, answer in answers)
    table: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in answers:
        pad = longest - len(prompt) - len(answer)
        table["input_ids"].append([*prompt, *answer, *[0] * pad])
        table["attention_mask"].append([1] * (len(prompt) + len(answer)) + [0] * pad)
        table["labels"].append([IGNORE_INDEX] * len(prompt) + [*answer] + [IGNORE_INDEX] * pad)
    return {name: torch.tensor(values) for name, values in table.items()}


def model_of_ours() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def move(model: Any) -> None:
    """What training does: every parameter gets other values."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def stage_of(*words: str) -> Any:
    return compose(["model=tiny_glm", "tracker=none", *words]).run.stage


def check(ours: torch.Tensor, theirs: torch.Tensor, mine: Any, other: Any) -> None:
    """The same loss within 1e-5 and, of every weight, the same gradient."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    ours.backward()
    theirs.backward()
    wanted = dict(other.named_parameters())
    size = max(float(parameter.grad.abs().max()) for parameter in wanted.values())
    assert size > 0
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5 * size, rtol=1e-3)
    mine.zero_grad()
    other.zero_grad()


# -- dpo -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """TRL's trainer with a reference and a policy, and a model and an objective of ours with the same two."""
    folder, tokenizer = tmp_path_factory.mktemp("dpo"), AutoTokenizer.from_pretrained(TINY)
    ours, theirs, reference = model_of_ours(), model_of_ours(), model_of_ours()
    objective = DpoObjective(ours, stage_of("stage=dpo", "finetuning=full"))
    move(ours)
    theirs.load_state_dict(ours.state_dict())
    trainer = DPOTrainer(
        theirs, reference, DPOConfig(str(folder), **OTHER), train_dataset=RECORDS, processing_class=tokenizer
    )
    return ours, objective, trainer


LOSSES = [
    (loss, 0.0) for loss in ("sigmoid", "ipo", "hinge", "sigmoid_norm", "robust", "sppo_hard", "apo_zero", "apo_down")
]


@pytest.mark.parametrize(("loss", "smoothing"), [*LOSSES, ("robust", 0.1), ("exo_pair", 0.1), ("exo_pair", 0.001)])
def test_dpo(dpo: tuple[Any, Any, Any], loss: str, smoothing: float) -> None:
    ours, objective, trainer = dpo
    objective.settings = stage_of(
        "stage=dpo", f"stage.loss={loss}", f"stage.label_smoothing={smoothing}", "stage.beta=0.3"
    )
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = [loss], [1.0], 0.3, smoothing
    chosen, rejected = rows([(5, 6, 3), (4, 2, 7), (8, 1, 5)])
    batch = padded([*chosen, *rejected])
    inputs = {
        **{name: batch[name] for name in ("input_ids", "attention_mask")},
        "completion_mask": (batch["labels"] != IGNORE_INDEX).long(),
    }
    theirs = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    check(objective.loss(ours, batch)[0].mean(), theirs, ours, trainer.model)


def test_dpo_on_the_fast_paths(dpo: tuple[Any, Any, Any]) -> None:
    """The rows without padding, and their log-probabilities in chunks."""
    ours = dpo[0]
    enable_segment_attention(ours)
    enable_chunked_loss(ours)
    try:
        test_dpo(dpo, "sigmoid", 0.0)
    finally:
        disable_chunked_loss(ours)
        disable_segment_attention(ours)


# -- without a reference -------------------------------------------------------------------------------------------------


def with_prefix(batch: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}_{name}": values for name, values in batch.items()}


def both(pairs: list[tuple[int, int, int]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same pairs as a batch of ours, and as one of TRL's."""
    chosen, rejected = rows(pairs)
    theirs = {**with_prefix(padded(chosen), "chosen"), **with_prefix(padded(rejected), "rejected")}
    return padded([*chosen, *rejected]), theirs


def trainer_of(kind: type, config: type, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """TRL's trainer, and a model of ours with the weights of its model."""
    ours = model_of_ours()
    move(ours)
    theirs = copy.deepcopy(ours)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    arguments = config(str(folder), **OTHER, **settings)
    trainer = kind(theirs, arguments, train_dataset=RECORDS, processing_class=tokenizer)
    return ours, trainer


# TRL takes the better answers' loss as a mean over the tokens of a batch, and here every pair counts alike: they are the same
# where the better answers of the batch have the same number of tokens.
EQUAL, MIXED = [(5, 4, 3), (4, 4, 7), (8, 4, 5)], [(5, 6, 3), (4, 2, 7), (8, 1, 5)]


@pytest.mark.parametrize(
    ("words", "settings", "pairs"),
    [
        ([], {}, EQUAL),
        (["stage.sft_weight=0"], {"cpo_alpha": 0.0}, MIXED),
        (["stage.sft_weight=0", "stage.label_smoothing=0.2"], {"cpo_alpha": 0.0, "label_smoothing": 0.2}, MIXED),
        (["stage.loss=hinge", "stage.sft_weight=0.5"], {"loss_type": "hinge", "cpo_alpha": 0.5}, EQUAL),
        (["stage.loss=ipo", "stage.sft_weight=0"], {"loss_type": "ipo", "cpo_alpha": 0.0}, MIXED),
    ],
)
def test_cpo(tmp_path: Path, words: list[str], settings: dict[str, Any], pairs: list[Any]) -> None:
    ours, trainer = trainer_of(CPOTrainer, CPOConfig, tmp_path, **settings)
    batch, theirs = both(pairs)
    objective = CpoObjective(ours, stage_of("stage=cpo", "finetuning=full", *words))
    loss = trainer.get_batch_loss_metrics(trainer.model, theirs)[0]
    check(objective.loss(ours, batch)[0].mean(), loss, ours, trainer.model)


@pytest.mark.parametrize(("smoothing", "weight", "pairs"), [(0.0, 0.0, MIXED), (0.1, 0.7, EQUAL)])
def test_simpo(tmp_path: Path, smoothing: float, weight: float, pairs: list[Any]) -> None:
    ours, trainer = trainer_of(
        CPOTrainer, CPOConfig, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=weight, label_smoothing=smoothing
    )  # fmt: skip
    batch, theirs = both(pairs)
    words = [f"stage.label_smoothing={smoothing}", f"stage.sft_weight={weight}"]
    objective = SimpoObjective(ours, stage_of("stage=simpo", "finetuning=full", *words))
    loss = trainer.get_batch_loss_metrics(trainer.model, theirs)[0]
    check(objective.loss(ours, batch)[0].mean(), loss, ours, trainer.model)


def test_orpo(tmp_path: Path) -> None:
    """TRL learns the prompts of the better answers, too; a prompt of one token is not learned by any language model."""
    ours, trainer = trainer_of(ORPOTrainer, ORPOConfig, tmp_path)
    objective = OrpoObjective(ours, stage_of("stage=orpo", "finetuning=full"))
    batch, theirs = both([(1, 4, 3), (1, 4, 7)])
    loss = trainer.get_batch_loss_metrics(trainer.model, theirs)[0]
    check(objective.loss(ours, batch)[0].mean(), loss, ours, trainer.model)


def test_orpos_odds_ratio(tmp_path: Path) -> None:
    """With prompts, and answers of any length: the loss less that of the better answer."""
    ours, trainer = trainer_of(ORPOTrainer, ORPOConfig, tmp_path, beta=0.4)
    objective = OrpoObjective(ours, stage_of("stage=orpo", "finetuning=full", "stage.beta=0.4"))
    batch, theirs = both(MIXED)
    chosen, rejected, _, _, _ = trainer.concatenated_forward(trainer.model, theirs)
    odds, _, _, _, log_odds = trainer.odds_ratio_loss(chosen, rejected)
    loss, measured = objective.loss(ours, batch)
    assert measured["log_odds"].mean().item() == pytest.approx(log_odds.item(), abs=1e-5)
    check((loss + chosen_mean(objective, ours, batch)).mean(), -odds.mean(), ours, trainer.model)


def chosen_mean(objective: OrpoObjective, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (objective.answer_logprobs(model, batch) / objective.answer_tokens(batch)).chunk(2)[0]
