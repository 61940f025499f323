"""The fast paths compute what the plain ones do: no padding, no leakage, and a loss in chunks."""

import pickle
from typing import Any

import pytest
import torch
from segment_models import MODELS, V1, VOCABULARY, glm, model_of
from torch import nn
from transformers import GlmConfig, GlmForCausalLM, GPTJConfig, GPTJForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.families import family_named
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.p_tuning import PTuning
from glmtuner.kernels import chunked_logprobs as head
from glmtuner.kernels.choose import ANSWER_TOKENS, Optimizations, choose_optimizations, short_samples
from glmtuner.kernels.chunked_loss import chunked_loss_problem, cross_entropy, enable_chunked_loss
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.kernels.segment_attention import (
    disable_segment_attention,
    enable_segment_attention,
    position_function,
    segment_attention_problem,
)
from glmtuner.templates.base import IGNORE_INDEX

every_model = pytest.mark.parametrize("name", MODELS)


def samples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of several lengths; each reads context, [gMASK], <sop>, answer, so that every family takes it."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for asked, answered in ((5, 9), (1, 3), (12, 2), (4, 4)):
        question = torch.randint(4, 80, (asked,), generator=draw).tolist()
        answer = torch.randint(4, 80, (answered,), generator=draw).tolist()
        ids = [*question, V1["gmask_token_id"], V1["bos_token_id"], *answer, V1["eos_token_id"]]
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (asked + 2) + [*answer, V1["eos_token_id"]]})
    return rows


def learned(model: nn.Module, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and the gradients of all that is trained."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), found


def assert_same(found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=2e-5)
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=2e-5, rtol=1e-3, msg=lambda told, name=name: f"{name}: {told}"
        )


@every_model
def test_segments_give_the_loss_and_the_gradients_of_padded_rows(name):
    model = model_of(name)
    wanted = learned(model, Collator(pad_id=3)(samples()))
    assert segment_attention_problem(model) is None
    enable_segment_attention(model)
    flat = SegmentCollator(positions_of=position_function(model))
    assert_same(learned(model, flat(samples())), wanted)
    assert_same(learned(model, flat([samples()[:2], samples()[2:]])), wanted)  # as packs
    assert_same(learned(model, Collator(pad_id=3)(samples())), wanted)  # padded batches are what they were
    disable_segment_attention(model)
    assert_same(learned(model, Collator(pad_id=3)(samples())), wanted)


@every_model
def test_nothing_leaks_from_one_segment_into_another(name):
    model = model_of(name).eval()
    enable_segment_attention(model)
    flat = SegmentCollator(positions_of=position_function(model))
    first, others = samples()[0], samples(seed=1)[1:]
    with torch.no_grad():
        alone = model(**{k: v for k, v in flat([first]).items() if k != "labels"}).logits[0]
        together = model(**{k: v for k, v in flat([*others, first]).items() if k != "labels"}).logits[0]
    torch.testing.assert_close(together[-len(alone) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "p_tuning"])
@pytest.mark.parametrize("name", ["glm", "chatglm", "chatglm2"])
def test_with_a_method_attached(name, method, checkpointing):
    model = model_of(name)
    family = family_named(name)
    if method == "lora":
        tuning = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, lora_target=["all"])
        tuning = tuning.resolved(family, 2)
    else:
        tuning = PTuning(finetuning_type="p_tuning", pre_seq_len=3)
    attached = tuning.attach(model, family)
    for module in attached.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = learned(attached, Collator(pad_id=3)(samples()))
    taken = choose_optimizations(attached, samples()[:2], Collator(pad_id=3))
    assert isinstance(taken.collate, SegmentCollator) and taken.chunks_loss and taken.fuses_lora == (method == "lora")
    assert_same(learned(attached, taken.collate(samples())), wanted)


@every_model
@pytest.mark.parametrize("chunk", [64 * 4 * VOCABULARY, 2**23])
def test_the_loss_in_chunks_is_the_plain_one(name, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES_CPU", chunk)
    model = model_of(name)
    rows = samples() * 4  # more learned tokens than a chunk holds
    batch = Collator(pad_id=3)(rows)
    wanted = learned(model, batch)
    assert chunked_loss_problem(model) is None
    enable_chunked_loss(model)
    assert_same(learned(model, batch), wanted)
    count = torch.tensor(7)
    assert model(**batch, num_items_in_batch=count).loss.item() == pytest.approx(
        wanted[0] * batch["labels"][:, 1:].ne(IGNORE_INDEX).sum().item() / 7, abs=1e-4
    )
    each = model(**batch, each=True).loss
    assert each.shape == batch["labels"].shape and not each[batch["labels"] == IGNORE_INDEX].any()
    assert each.sum().item() / each.ne(0).sum().item() == pytest.approx(wanted[0], abs=2e-5)
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).logits.shape[-1] == VOCABULARY


def test_a_batch_that_teaches_nothing_has_a_loss_of_0_and_a_graph():
    model = model_of("glm")
    enable_chunked_loss(model)
    batch = Collator(pad_id=3)([{"input_ids": [5, 6], "labels": [IGNORE_INDEX] * 2}])
    loss = model(**batch, num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_half_precision_weights_have_float32_losses():
    hidden = torch.randn(1, 6, 16, dtype=torch.bfloat16, requires_grad=True)
    linear = nn.Linear(16, 50, dtype=torch.bfloat16)
    labels = torch.tensor([[IGNORE_INDEX, 3, 4, IGNORE_INDEX, 7, 9]])
    total, each = cross_entropy(hidden, linear, labels)
    (found,) = torch.autograd.grad(total, hidden)
    wanted = nn.functional.cross_entropy(
        linear(hidden)[0, :-1].float(), labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(total, wanted)
    assert total.dtype == each.dtype == torch.float32
    torch.testing.assert_close(found, torch.autograd.grad(wanted, hidden)[0], atol=2e-2, rtol=2e-2)


class Scaled(GlmForCausalLM):
    """A model whose logits are not its head's alone."""

    def forward(self, *args: Any, labels: Any = None, **options: Any) -> Any:
        out = super().forward(*args, **{k: v for k, v in options.items() if k != "num_items_in_batch"})
        out.logits = out.logits * 0.5
        out.loss = self.loss_function(out.logits, labels, VOCABULARY) if labels is not None else None
        return out


def test_a_model_with_a_loss_of_its_own_keeps_it():
    model = Scaled(glm().config)
    wanted = learned(model, Collator(pad_id=3)(samples()))
    taken = choose_optimizations(model, samples()[:2], Collator(pad_id=3))
    assert isinstance(taken.collate, SegmentCollator) and not taken.chunks_loss
    assert_same(learned(model, taken.collate(samples())), wanted)


def test_a_model_whose_attention_cannot_be_told_of_segments_gets_padded_rows():
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    )
    plain = Collator(pad_id=3)
    assert choose_optimizations(model, samples()[:2], plain).collate is plain
    assert model.config._attn_implementation == "eager"


def test_excluded_paths_are_not_tried():
    plain, reasons = Collator(pad_id=3), dict.fromkeys(FastPath, "the configuration says so")
    assert choose_optimizations(glm(), samples()[:2], plain, excluded=reasons) == Optimizations(plain, left_out=reasons)
    one = choose_optimizations(glm(), samples()[:2], plain, excluded={FastPath.chunked_loss: "no"})
    assert one.enabled == {FastPath.without_padding} and one.left_out[FastPath.chunked_loss] == "no"
    assert not one.chunks_loss and "no plain LoRA" in one.left_out[FastPath.fused_lora]


class Projected(GlmForCausalLM):
    """A model that makes its hidden states wider before the head."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__(config)
        self.wider = nn.Linear(config.hidden_size, 80)
        self.lm_head = nn.Linear(80, config.vocab_size)

    def forward(self, input_ids: Any, labels: Any = None, **options: Any) -> Any:
        options.pop("num_items_in_batch", None)
        logits = self.lm_head(self.wider(self.model(input_ids=input_ids, **options).last_hidden_state))
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, VOCABULARY), logits=logits)


class Strict(GlmForCausalLM):
    """A model that takes no other arguments than its own."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_what_a_model_s_code_has_no_place_for_is_left_out_with_the_reason():
    chosen = choose_optimizations(Projected(glm().config), samples()[:2], Collator(pad_id=3))
    assert chosen.enabled == {FastPath.without_padding}
    assert "not applied to the last hidden states" in chosen.left_out[FastPath.chunked_loss]
    chosen = choose_optimizations(Strict(glm().config), samples()[:2], Collator(pad_id=3))
    assert "unexpected keyword argument" in chosen.left_out[FastPath.without_padding]


class Allocates(GlmForCausalLM):
    """A model that fails on batches of segments with the error that it is given."""

    error: Exception

    def forward(self, *args: Any, segments: Any = None, **options: Any) -> Any:
        if segments is not None:
            raise self.error
        return super().forward(*args, **options)


def out_of_memory() -> Exception:
    """What the CPU's allocator raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


def failing(error: Exception) -> Allocates:
    model = Allocates(glm().config)
    model.error = error
    return model


def test_what_does_not_fit_into_memory_is_left_out():
    for error in (
        out_of_memory(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ):
        model = failing(error)
        chosen = choose_optimizations(model, samples()[:2], Collator(pad_id=3))
        assert "not enough memory for it" in chosen.left_out[FastPath.without_padding]
        assert not isinstance(chosen.collate, SegmentCollator) and chosen.chunks_loss
        assert "segments" not in (model.config._attn_implementation or "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"), IndexError("index 9 is out of range"), ValueError("shapes"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"), AttributeError("no such thing"), KeyError("a"),
    ],
)  # fmt: skip
def test_any_other_error_is_raised(error):
    with pytest.raises(type(error)) as raised:
        choose_optimizations(failing(error), samples()[:2], Collator(pad_id=3))
    assert raised.value is error and "batches without padding" in " ".join(error.__notes__)


@every_model
def test_a_worker_that_loads_batches_does_not_get_the_model(name):
    model = model_of(name)
    flat = choose_optimizations(model, samples()[:2], Collator(pad_id=3)).collate
    packed = pickle.dumps(flat)
    assert isinstance(flat, SegmentCollator) and len(packed) < 10_000
    assert torch.equal(pickle.loads(packed)(samples())["position_ids"], flat(samples())["position_ids"])


@pytest.mark.parametrize("name", ["glm", "chatglm"])
def test_compiled_blocks_compute_the_same_with_and_without_segments(name):
    torch.compiler.reset()
    model = model_of(name)
    batch = Collator(pad_id=3)(samples())
    wanted = learned(model, batch)
    enable_segment_attention(model)
    for block in family_named(name).blocks(model):
        block.compile(dynamic=True, backend="eager")  # what is traced and what is not; building kernels takes minutes
    flat = SegmentCollator(positions_of=position_function(model))
    assert_same(learned(model, flat(samples())), wanted)
    assert_same(learned(model, flat([*samples()[2:], *samples()[:2]])), wanted)
    assert_same(learned(model, batch), wanted)


def test_samples_are_cut_behind_the_beginning_of_an_answer():
    """The plain way makes logits of all their tokens: of whole rows it might not fit where the run does."""
    long, none, short = [7] * 4000, [IGNORE_INDEX] * 900, [IGNORE_INDEX] * 30
    rows = [
        {"input_ids": [5] * 4900, "labels": none + long, "prompt": "p"},
        {"input_ids": [5] * 900, "labels": none, "prompt": "nothing is learned"},
        {"input_ids": [5] * 4030, "labels": short + long, "prompt": "q"},
        {"input_ids": [5] * 20, "labels": short[:15] + [7] * 5, "prompt": "r"},
    ]
    first, second = short_samples(rows)
    assert first == {"input_ids": [5] * 20, "labels": rows[3]["labels"]}
    assert second == {"input_ids": [5] * (30 + ANSWER_TOKENS // 2), "labels": [*short, *[7] * (ANSWER_TOKENS // 2)]}
    assert short_samples([rows[1]]) == []
    everything = [{"input_ids": long, "labels": long}] * 3
    assert [len(sample["labels"]) for sample in short_samples(everything)] == [ANSWER_TOKENS, ANSWER_TOKENS // 2]
