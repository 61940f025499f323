"""Label smoothing of every model, with padding, without it and in packs, against the formula computed here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import built
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainingArguments

from glmtuner.config.method_hooks import MethodHooks
from glmtuner.config.schema import Tracker
from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.kernels.chunked_loss import enable_chunked_loss
from glmtuner.kernels.segment_attention import enable_segment_attention, position_function
from glmtuner.run_folder.folder import RunFolder
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.trainer import GlmTrainer

FACTOR, VOCABULARY = 0.2, 400
CONTEXT_END = [6, 4]  # [gMASK] <sop> of the small ChatGLM


class Renamed(GPT2LMHeadModel):
    """A model of a class that stands in no table of transformers, as of a plugin."""


def model_of(name: str) -> Any:
    if name != "Renamed":
        return built(name).float()
    torch.manual_seed(0)
    return Renamed(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, initializer_range=0.3)).eval()


def samples(*, everything: bool) -> list[dict[str, list[int]]]:
    """Samples of several lengths; `everything` labels every token, as documents do."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for asked, answered in ((5, 9), (1, 3), (12, 2), (4, 4)):
        ids = [*torch.randint(10, VOCABULARY, (asked,), generator=draw).tolist(), *CONTEXT_END]
        answer = torch.randint(10, VOCABULARY, (answered,), generator=draw).tolist()
        rows.append(
            {"input_ids": ids + answer, "labels": ids + answer if everything else [IGNORE_INDEX] * len(ids) + answer}
        )
    return rows


def by_hand(model: Any, rows: list[dict[str, list[int]]], factor: float = FACTOR) -> float:
    """(1 - e) of the cross-entropy and e of that with the uniform distribution, over the labelled tokens of samples one by one."""
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        for position in range(1, len(row["labels"])):
            if (label := row["labels"][position]) != IGNORE_INDEX:
                logprobs = logits[position - 1].log_softmax(-1)
                losses.append(-(1 - factor) * logprobs[label] - factor * logprobs.mean())
    return torch.stack(losses).mean().item()


def trainer_of(model: Any, tmp_path: Path, factor: float = FACTOR, **values: Any) -> GlmTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=factor, report_to="none", use_cpu=True, **values
    )
    method: Any = MethodHooks()
    return GlmTrainer(model, arguments, finetuning=method, tracker=Tracker(name="none"), folder=RunFolder(tmp_path))


def loss_of(trainer: GlmTrainer, batches: list[dict[str, Any]]) -> float:
    """The loss of the batches of one accumulated step, as the training loop sums it."""
    _, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in batches]
    return sum(loss.item() for loss in losses)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["ChatGLM", "ChatGLM2", "Glm", "GPT2", "Renamed"])
def test_padded_batches_and_their_accumulation(tmp_path: Path, name: str, everything: bool) -> None:
    model, rows, pad = model_of(name), samples(everything=everything), Collator(pad_id=3)
    wanted = by_hand(model, rows)
    trainer = trainer_of(model, tmp_path)
    assert loss_of(trainer, [pad(rows)]) == pytest.approx(wanted, rel=1e-5)
    assert loss_of(trainer, [pad(rows[:1]), pad(rows[1:])]) == pytest.approx(wanted, rel=1e-5)
    plain = trainer_of(model, tmp_path, factor=0.0)
    assert loss_of(plain, [pad(rows[:1]), pad(rows[1:])]) == pytest.approx(by_hand(model, rows, 0.0), rel=1e-5)


@pytest.mark.parametrize("name", ["ChatGLM", "ChatGLM2", "Glm"])
def test_batches_without_padding_packs_and_adapters(tmp_path: Path, name: str) -> None:
    model, rows = model_of(name), samples(everything=False)
    wanted = by_hand(model, rows)
    enable_segment_attention(model)
    enable_chunked_loss(model)
    flat = SegmentCollator(positions_of=position_function(model))
    head = model.get_output_embeddings()
    targets = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head]
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for trained, chunked in ((model, False), (model, True), (adapted, False), (adapted, True)):
        trainer = trainer_of(trained, tmp_path)
        trainer.chunks_loss = chunked
        assert loss_of(trainer, [flat(rows)]) == pytest.approx(wanted, rel=1e-5)
        assert loss_of(trainer, [flat([rows[:2], rows[2:]])]) == pytest.approx(wanted, rel=1e-5)
        assert loss_of(trainer, [flat(rows[:3]), flat(rows[3:])]) == pytest.approx(wanted, rel=1e-5)


def test_the_formula_is_torchs() -> None:
    from glmtuner.training.label_smoothing import SmoothedLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 9), torch.tensor([[1, 2, IGNORE_INDEX, 4, 5, 6], [IGNORE_INDEX, 7, 8, 0, 1, 2]])
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, label_smoothing=FACTOR
    )

    class Out:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    torch.testing.assert_close(SmoothedLoss(FACTOR)(Out(logits), labels), wanted)
    torch.testing.assert_close(SmoothedLoss(FACTOR)(Out(logits), labels, 3), wanted * 9 / 3)
    half = SmoothedLoss(FACTOR)(Out(logits.bfloat16()), labels)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(wanted.item(), rel=5e-3)
