"""Dynamic fine-tuning's loss of every model, in chunks and not, against the formula computed here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import built
from transformers import Seq2SeqTrainingArguments

from glmtuner.config.compose import compose
from glmtuner.config.method_hooks import MethodHooks
from glmtuner.config.schema import Tracker
from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.errors import ConfigError
from glmtuner.kernels.chunked_loss import enable_chunked_loss
from glmtuner.kernels.segment_attention import enable_segment_attention, position_function
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.folder import RunFolder
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.trainer import GlmTrainer

register_presets()
CONTEXT_END = [6, 4]  # [gMASK] <sop> of the small ChatGLM


def samples() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(3)
    rows = []
    for asked, answered in ((5, 9), (1, 3), (12, 2), (4, 4)):
        ids = [*torch.randint(10, 400, (asked,), generator=draw).tolist(), *CONTEXT_END]
        answer = torch.randint(10, 400, (answered,), generator=draw).tolist()
        rows.append({"input_ids": ids + answer, "labels": [IGNORE_INDEX] * len(ids) + answer})
    return rows


def by_hand(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, torch.Tensor]:
    """The mean of -p log p with p a constant, of samples one by one; and the gradient of the output layer."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        for position in range(1, len(labels)):
            if labels[position] != IGNORE_INDEX:
                logprob = logprobs[position - 1, labels[position]]
                losses.append(-logprob.exp().item() * logprob)
    loss = torch.stack(losses).mean()
    return loss.item(), torch.autograd.grad(loss, model.get_output_embeddings().weight)[0]


def learned(model: Any, tmp_path: Path, batches: list[dict[str, Any]], **how: Any) -> tuple[float, torch.Tensor]:
    """The loss of one accumulated step, as the training loop sums it, and the gradient of the output layer."""
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    method: Any = MethodHooks()
    trainer = GlmTrainer(
        model,
        arguments,
        finetuning=method,
        tracker=Tracker(name="none"),
        folder=RunFolder(tmp_path),
        by_probability=True,
        **how,
    )
    _, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    model.zero_grad()
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in batches]
    sum(losses).backward()
    return sum(loss.item() for loss in losses), model.get_output_embeddings().weight.grad


@pytest.mark.parametrize("name", ["ChatGLM", "ChatGLM2", "Glm"])
def test_each_token_counts_as_much_as_it_is_probable(tmp_path: Path, name: str) -> None:
    model, rows, pad = built(name).float(), samples(), Collator(pad_id=3)
    wanted, gradient = by_hand(model, rows)
    for batches in ([pad(rows)], [pad(rows[:1]), pad(rows[1:])]):
        loss, found = learned(model, tmp_path, batches)
        assert loss == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
    enable_segment_attention(model)
    enable_chunked_loss(model)
    flat = SegmentCollator(positions_of=position_function(model))
    for batches in ([flat(rows)], [flat(rows[:1]), flat(rows[1:])], [flat([rows[:2], rows[2:]])]):
        loss, found = learned(model, tmp_path, batches, chunks_loss=True)
        assert loss == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


def test_it_is_refused_with_smoothed_labels() -> None:
    words = ["model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "stage.loss=dft"]
    assert compose(words).run.stage.by_probability
    with pytest.raises(
        ConfigError, match=r"label_smoothing_factor=0\.1 with stage\.loss=dft.*type trainer\.label_smoothing_factor=0"
    ):
        compose([*words, "trainer.label_smoothing_factor=0.1"])
