"""LLaMA-Adapter (arXiv:2303.16199) by PEFT, on the architectures that PEFT has code for: PEFT's logits, saved, loaded and resumed."""

import re
from pathlib import Path

import pytest
import torch
from adapter_bases import IDS, base
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.peft import Peft
from glmtuner.finetuning.start import TUNED, Checkpoint, build_trainable_model
from glmtuner.finetuning.trained import trained_parameters

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG = {"adapter_len": 5, "adapter_layers": 2}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)).eval()
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}[name]
    return cls(config(**SIZES, num_key_value_heads=2, initializer_range=0.2)).eval()


def method(**more: object) -> Peft:
    return Peft(finetuning_type="peft", peft_type="ADAPTION_PROMPT", config={**CONFIG, **more})


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_it_is_peft_s_own(tmp_path: Path, name: str) -> None:
    plain = model_of(name)
    family = family_from_structure(plain)
    expected = plain(input_ids=IDS).logits
    model = model_of(name)
    torch.manual_seed(3)
    ours = method().attach(model, family)
    theirs = model_of(name)
    torch.manual_seed(3)
    theirs = get_peft_model(theirs, AdaptionPromptConfig(**CONFIG, task_type="CAUSAL_LM"))
    assert torch.allclose(ours(input_ids=IDS).logits, expected, atol=1e-6)  # the gates are zero at first
    trained = trained_parameters(ours)
    assert {each.rpartition(".")[2] for each in trained} == {"adaption_prompt", "adaption_gate"} and len(trained) == 4
    for each in (ours, theirs):
        torch.manual_seed(4)
        with torch.no_grad():
            for value in (value for value in each.parameters() if value.requires_grad):
                value += 0.5 * torch.randn_like(value)
    wanted = theirs(input_ids=IDS).logits
    assert torch.equal(ours(input_ids=IDS).logits, wanted) and (wanted - expected).abs().max() > 1e-3
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        ours.generate(input_ids=IDS, **greedy), theirs.generate(input_ids=IDS, use_cache=False, **greedy)
    )

    method().save(ours, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(model_of(name), tmp_path)(input_ids=IDS).logits, wanted)
    checkpoint = [Checkpoint(TUNED, tmp_path)]
    again, finetuning = build_trainable_model(
        model_of(name), method(), family, checkpoint, resume_lora=True, trains=True, user_keys=set()
    )
    assert torch.equal(again(input_ids=IDS).logits, wanted) and finetuning.config["adapter_len"] == 5
    with pytest.raises(
        CheckpointError, match=r"cannot be merged into this model: .* use it unmerged, with finetuning=peft"
    ):
        build_trainable_model(
            model_of(name), NoTuning(finetuning_type="none"), family, checkpoint, resume_lora=True, trains=False, user_keys=set(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "told"),
    [
        ("qwen3", {}, "does not fit this model: Unsupported model type for adaption prompt: 'qwen3'"),
        ("llama", {"adapter_layers": 9}, "does not fit this model: "),
        ("llama", {"adapter_len": None}, "finetuning.config.adapter_len must be chosen"),
    ],
)
def test_what_it_does_not_fit_is_one_paragraph(model: str, config: dict, told: str) -> None:
    plain = base(model) if model == "qwen3" else model_of(model)
    with pytest.raises(ConfigError, match=re.escape(told)):
        method(**config).attach(plain, family_from_structure(plain))


def test_a_forward_that_is_replaced_later_is_called() -> None:
    """As by the loss in chunks, which takes more arguments."""
    model = model_of("llama")
    ours = method().attach(model, family_from_structure(model))
    model.forward = lambda *args, **options: sorted(options)
    assert "each" in ours(input_ids=IDS, each=True)
