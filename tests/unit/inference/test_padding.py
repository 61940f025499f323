"""Answers do not depend on the batch: cache-free greedy decoding by plain transformers, one prompt at a time, is the reference."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glmtuner.inference.decoding import Decoder, NoCacheError
from glmtuner.inference.generate import Decoding, answers, continuations, rows_that_fit
from glmtuner.models.mixing_layers import is_recurrent, masks_padding

VOCABULARY, STOP, NEW = 400, 1, 10
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": STOP, "eos_token_id": STOP, "max_position_embeddings": 128,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "d_model": 32,
}  # fmt: skip
STATES = {
    "state_size": 8,
    "n_groups": 1,
    "expand": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "time_step_rank": 4,
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "bloom": {},
    "mpt": {},
    "minimax": {**LINEAR, "block_size": 8, "num_local_experts": 4},
    "mamba": STATES,
    "jamba": STATES | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 6},
    "rwkv": {"attention_hidden_size": 32},
}  # fmt: skip
UNPADDED = ("recurrent_gemma", "rwkv")  # their states are told of no padding


def built(name: str) -> Any:
    default = AutoConfig.for_model(name)
    known = {*vars(default), *dir(type(default)), *getattr(default, "attribute_map", {})}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes | MODELS[name]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # so that answers differ
    return model.eval()


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    lengths = (5, 31, 12, 44, 1, 20, 12, 33, 5)
    return [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def greedy_of(model: Any, prompt: list[int], count: int = NEW) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == STOP:
                break
            ids.append(token)
    return ids[len(prompt) :]


def answered(model: Any, rows: int, beams: int = 1) -> list[list[int]]:
    decoding = Decoding(max_new_tokens=NEW, num_beams=beams, repetition_penalty=1.0, stop_ids=(STOP,), pad_id=0)
    found = dict(answers(model, prompts(), decoding, rows))
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("name", MODELS)
def test_answers_in_batches_are_those_of_each_prompt_alone(name, capsys):
    model = built(name)
    wanted = [greedy_of(model, prompt) for prompt in prompts()]
    assert len({tuple(each) for each in wanted}) > 6
    for rows in (1, 4, 9):
        assert answered(model, rows) == wanted, rows
    told = capsys.readouterr()
    said = [line for line in (told.out + told.err).splitlines() if "change" in line]
    together = {
        "minimax": "the same number of tokens",
        "recurrent_gemma": "the same number of tokens",
        "rwkv": "one by one",
    }
    assert all(together[name] in line for line in said) and bool(said) == (name in together)
    assert masks_padding(model) == (name not in UNPADDED)


@pytest.mark.parametrize("name", ["llama", "mamba", *UNPADDED])
def test_beams_do_not_depend_on_the_batch(name):
    model = built(name)
    if name == "recurrent_gemma":
        # its cached states are not those of the beams: plain transformers without a cache
        options = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False, "eos_token_id": STOP, "pad_token_id": 0}
        ids = torch.tensor([prompts()[0]])
        wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        assert answered(model, 1, beams=2)[0] == [token for token in wanted[0, 5:].tolist() if token > STOP]
    assert answered(model, 1, beams=2) == answered(model, 4, beams=2)


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_through_generate_does_not_depend_on_the_batch_either(name, monkeypatch):
    def no_cache(*_: Any) -> Any:
        raise NoCacheError(name)

    monkeypatch.setattr("glmtuner.inference.generate._continuously_batched", no_cache)
    model = built(name)
    wanted = [greedy_of(model, prompt) for prompt in prompts()]
    for rows in (1, 9):
        assert answered(model, rows) == wanted, rows


@pytest.mark.parametrize("name", ["mamba", "minimax", *UNPADDED])
def test_continuations_of_prompts_of_unlike_lengths_come_back_in_their_order(name):
    model = built(name)
    found = continuations(model, prompts(), max_new_tokens=4, stop_ids=[STOP], pad_id=0, do_sample=False)
    assert [[token for token in each if token != STOP] for each in found] == [
        greedy_of(model, prompt, 4) for prompt in prompts()
    ]


def test_a_difference_behind_the_prompt_s_end_is_seen():
    """A model may take padding well in the prompt, and not in the next step."""
    model = built("llama")
    decoder = Decoder(model, 0)
    short, long = prompts()[0], prompts()[1]
    assert decoder.padding_invariant(short, long)
    plain = model.forward

    def forgetful(**given: Any) -> Any:
        if given["input_ids"].shape[1] == 1:
            given["attention_mask"] = None
        return plain(**given)

    model.forward = forgetful
    assert not Decoder(model, 0).padding_invariant(short, long)


def test_rows_that_fit_a_model_without_heads():
    model = built("rwkv")
    assert is_recurrent(model) and rows_that_fit(model, 100, max_rows=7) == 7
