"""NEFTune's noise of every sample, against the paper's formula and transformers' own noise of a batch of one sample."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import built
from transformers import LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from glmtuner.config.groups import PreferenceLoss
from glmtuner.config.method_hooks import MethodHooks
from glmtuner.config.schema import Tracker
from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.kernels.chunked_loss import enable_chunked_loss
from glmtuner.kernels.segment_attention import enable_segment_attention, position_function
from glmtuner.objectives.dpo import DpoObjective
from glmtuner.run_folder.folder import RunFolder
from glmtuner.stages.dpo import Dpo
from glmtuner.training.neftune import noisy_embeddings
from glmtuner.training.trainer import GlmTrainer

ALPHA = 5.0
CONTEXT_END = [6, 4]  # [gMASK] <sop> of the small ChatGLM


def sample(length: int, seed: int) -> dict[str, list[int]]:
    ids = torch.randint(10, 400, (length - 3,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [*ids, *CONTEXT_END, 9]
    return {"input_ids": ids, "labels": ids}


ROWS = [sample(length, length) for length in (7, 160, 24, 65)]


def embedded(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the first layer is given, [B, T, H]."""
    given = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, inputs, output: given.append(output.detach()))
    try:
        model(**batch)
    finally:
        handle.remove()
    return given[0]


def noise_of(model: Any, batch: dict[str, Any], alpha: float | None = ALPHA) -> torch.Tensor:
    clean = embedded(model, batch)
    with noisy_embeddings(model, alpha):
        return embedded(model, batch) - clean


def assert_noise(noise_LH: torch.Tensor) -> None:
    """Uniform in (-a, a) with a = alpha / sqrt(L d): its bound, its standard deviation and its mean."""
    bound = ALPHA / math.sqrt(noise_LH.numel())
    assert 0.97 * bound < noise_LH.abs().max() <= bound * 1.0001
    assert noise_LH.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)
    assert abs(noise_LH.mean().item()) < 0.15 * bound


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["ChatGLM", "ChatGLM2", "Glm"])
def test_every_sample_has_the_noise_of_its_own_length(name: str, adapted: bool) -> None:
    model = built(name).float()
    enable_segment_attention(model)
    enable_chunked_loss(model)
    flat, pad = SegmentCollator(positions_of=position_function(model)), Collator(pad_id=3)
    if adapted:
        head = model.get_output_embeddings()
        targets = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear and each is not head]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    torch.manual_seed(0)
    lengths = [len(row["input_ids"]) for row in ROWS]
    padded = noise_of(model, pad(ROWS))
    for noise, length in zip(padded, lengths, strict=True):
        assert_noise(noise[:length])
    for batch in (flat(ROWS), flat([ROWS[:1], ROWS[1:]])):
        for noise in noise_of(model, batch)[0].split(lengths):
            assert_noise(noise)
    assert not noise_of(model, flat(ROWS), None).any() and not noise_of(model, flat(ROWS), 0.0).any()
    assert not noise_of(model.eval(), flat(ROWS)).any()


@pytest.mark.parametrize("kind", ["padded", "without padding", "packs"])
def test_a_training_adds_the_noise_of_every_sample(tmp_path: Path, kind: str) -> None:
    model = built("Glm").float()
    enable_segment_attention(model)
    enable_chunked_loss(model)
    collate: Any = Collator(pad_id=3) if kind == "padded" else SegmentCollator(positions_of=position_function(model))
    rows: Any = [ROWS[:1], ROWS[1:]] if kind == "packs" else ROWS
    given = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].detach()))
    for alpha in (None, ALPHA):
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), neftune_noise_alpha=alpha, max_steps=1, learning_rate=1e-30, report_to="none", use_cpu=True,
            per_device_train_batch_size=len(rows), train_sampling_strategy="sequential", save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        method: Any = MethodHooks()
        GlmTrainer(
            model, arguments, finetuning=method, tracker=Tracker(name="none"), folder=RunFolder(tmp_path),
            train_dataset=rows, data_collator=collate,
        ).train()  # fmt: skip
    clean, noisy = given
    lengths = [len(row["input_ids"]) for row in ROWS]
    samples = noisy - clean if kind == "padded" else (noisy - clean)[0].split(lengths)
    for noise, length in zip(samples, lengths, strict=True):
        assert_noise(noise[:length])


def test_the_reference_of_dpo_has_no_noise_and_the_policy_has_it() -> None:
    model = built("Glm").float()
    settings = Dpo(name="dpo", beta=0.1, loss=PreferenceLoss.sigmoid)
    objective = DpoObjective(model, settings)
    batch = Collator(pad_id=3)(ROWS)
    given = []
    model.train()
    with noisy_embeddings(model, ALPHA):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: given.append(output.detach()))
        objective.loss(model, batch)
    reference, policy = given
    clean = model.get_input_embeddings().weight[batch["input_ids"]]
    assert torch.equal(reference, clean)
    for row, noise in zip(ROWS, policy - clean, strict=True):
        assert_noise(noise[: len(row["input_ids"])].detach())


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_one_length_have_transformers_noise_bit_for_bit(rows: int) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    model = LlamaForCausalLM(config).train()
    batch = Collator(pad_id=3)([sample(50, seed) for seed in range(rows)])
    torch.manual_seed(1)
    handle = activate_neftune(model, ALPHA)
    wanted = embedded(model, batch)
    deactivate_neftune(model, handle)
    torch.manual_seed(1)
    with noisy_embeddings(model, ALPHA):
        assert torch.equal(embedded(model, batch), wanted)
    assert not model.get_input_embeddings()._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks
