"""The prefix of P-tuning on attention of every kind: against plain transformers with the keys and values put in by hand."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from zoo import built

from glmtuner.config.groups import Model
from glmtuner.errors import ConfigError
from glmtuner.families.family import Family
from glmtuner.finetuning.p_tuning import PTuning
from glmtuner.models.attention_calls import AttentionCall, attention_calls
from glmtuner.models.prefix import PrefixEncoder, add_prefix, check_calls

torch.set_num_threads(1)
TOKENS = 3
FAMILY = Family(
    name="auto", model_types=(), layers="", attention_block="", mlp="", attention=(), other_linears=(), template="plain"
)
# what each does differently: latent attention, sparse behind an indexer, multi-query, no keyword arguments passed on, soft-capped
# scores and sinks in eager attention, no flag of the class, two calls a layer, hybrids
LATENT = ("glm4_moe_lite", "deepseek_v2", "deepseek_v3", "glm_moe_dsa", "minicpm3")
OTHERS = ("llama", "glm4", "gpt_bigcode", "nemotron", "gpt2", "opt", "gpt_neox", "stablelm", "persimmon", "mixtral")
EAGER = ("gemma2", "gpt_oss")
HYBRID = ("jamba", "qwen3_next", "lfm2", "recurrent_gemma", "granitemoehybrid", "minimax")


def with_prefix(name: str) -> tuple[Any, PrefixEncoder]:
    model = built(name).eval().requires_grad_(False)
    encoder = add_prefix(model, FAMILY, tokens=TOKENS, projection=False, dropout=0.0)
    torch.manual_seed(1)
    torch.nn.init.normal_(encoder.embedding.weight, std=0.7)
    return model, encoder


def by_hand(name: str, encoder: PrefixEncoder) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """A plain model whose attention is written out, with the prefix's keys and values as leaves of their own."""
    model = built(name).eval().requires_grad_(False)
    pairs = [
        tuple(part.detach().clone().requires_grad_() for part in encoder(layer)) for layer in range(len(encoder.calls))
    ]
    given = {model.get_submodule(call.module): pair for call, pair in zip(encoder.calls, pairs, strict=True)}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any) -> Any:
        keys, values = (part.expand(len(query), -1, -1, -1) for part in given[module])
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        if more.get("softcap"):
            scores = torch.tanh(scores / more["softcap"]) * more["softcap"]
        scores = scores + F.pad(mask, (TOKENS, 0))
        if more.get("s_aux") is not None:  # a sink: a column that takes weight and has no value
            sink = more["s_aux"].view(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register(f"by hand {name}", attend)
    AttentionMaskInterface.register(f"by hand {name}", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation = f"by hand {name}"
    return model, [keys for keys, _ in pairs], [values for _, values in pairs]


def rows(length: int = 40) -> dict[str, torch.Tensor]:
    """Two rows, longer than the windows of the models, of which one is padded on the left."""
    ids = torch.randint(10, 2990, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", [*LATENT, *OTHERS, *EAGER, *HYBRID])
def test_a_prefix_is_that_of_attention_written_out(name):
    model, encoder = with_prefix(name)
    plain, keys, values = by_hand(name, encoder)
    inputs = rows()
    if name == "opt":  # counts its positions from the mask itself
        del inputs["position_ids"]
    shown = inputs["attention_mask"].bool()
    found, expected = (each(**inputs, use_cache=False).logits[shown] for each in (model, plain))
    assert (found - expected).abs().max() < 1e-4
    assert (
        found - built(name).eval()(**inputs, use_cache=False).logits[shown]
    ).abs().max() > 1e-3  # it is not without effect
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (found * weights).sum().backward()
    gradients = torch.autograd.grad((expected * weights).sum(), [*keys, *values])
    size = max(float(each.abs().max()) for each in gradients)
    assert encoder.embedding.weight.grad is not None
    for layer, by_layer in enumerate(zip(gradients[: len(keys)], gradients[len(keys) :], strict=True)):
        written = torch.cat([part.transpose(0, 1).flatten(1) for part in by_layer], 1)
        assert written.abs().max() > 0
        assert (encoder.embedding.weight.grad[:, encoder.rows[layer]] - written).abs().max() < 1e-4 * size


@pytest.mark.parametrize("name", ["gpt_bigcode", "llama", "nemotron"])
def test_a_prefix_is_that_of_a_cache_filled_before(name):
    """Plain transformers with the keys and values in its cache, and the tokens' positions counted from 0."""
    model, encoder = with_prefix(name)
    plain, inputs = built(name).eval(), rows()
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        for layer in range(len(encoder.calls)):
            cache.update(*(part.expand(2, -1, -1, -1).contiguous() for part in encoder(layer)), layer)
        mask = F.pad(inputs["attention_mask"], (TOKENS, 0), value=1)
        expected = plain(**{**inputs, "attention_mask": mask}, past_key_values=cache).logits
        found = model(**inputs, use_cache=False).logits
    shown = inputs["attention_mask"].bool()
    assert (found - expected)[shown].abs().max() < 1e-4


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite", "gpt_bigcode", "gemma2", "jamba"])
def test_answers_with_a_cache_are_those_without(name):
    """Also where the cache holds what latent attention makes keys and values of."""
    model, _ = with_prefix(name)
    inputs = {key: value for key, value in rows(9).items() if key != "position_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(model.generate(**inputs, **options, use_cache=cached) for cached in (True, False)))


def test_heads_and_widths_are_those_that_attention_is_given():
    def sizes(name: str) -> list[tuple[str, int, int, int]]:
        return [(call.module, call.heads, call.key_dim, call.value_dim) for call in attention_calls(built(name))]

    assert sizes("deepseek_v3") == [(f"model.layers.{layer}.self_attn", 4, 12, 8) for layer in (0, 1)]
    assert sizes("gpt_bigcode") == [(f"transformer.h.{layer}.attn", 1, 8, 8) for layer in (0, 1)]
    assert sizes("jamba") == [("model.layers.1.self_attn", 2, 8, 8)]  # the other block has a recurrent state
    assert sizes("jetmoe") == [
        (f"model.layers.{layer}.self_attention", 4, 8, 8) for layer in (0, 1)
    ]  # not traced: asked itself
    assert sizes("rwkv") == sizes("bloom") == sizes("mamba") == []


def test_layers_of_unlike_widths_have_slots_of_their_own():
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=3000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=16, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=3000, num_kv_shared_layers=0, pad_token_id=0,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config).eval().requires_grad_(False)
    encoder = add_prefix(model, FAMILY, tokens=TOKENS, projection=True, dropout=0.0)
    assert [call.key_dim for call in encoder.calls] == [8, 16]
    model(**rows(), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def test_reading_the_heads_leaves_the_model_as_it_was():
    for name in ("llama", "jetmoe"):
        model = built(name).train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        attention_calls(model)
        assert model.training and model.config._attn_implementation == "sdpa"
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert "recorded" not in AttentionInterface().valid_keys()


def method(**own: Any) -> PTuning:
    return PTuning(finetuning_type="p_tuning", **{"pre_seq_len": TOKENS, **own})


@pytest.mark.parametrize("name", ["rwkv", "bloom"])
def test_what_has_no_keys_and_values_is_refused_before_its_weights_are_loaded(name, tmp_path):
    built(name).config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^finetuning=p_tuning: no layer of .*; type finetuning=lora$"):
        method().check_model(Model(model_name_or_path=str(tmp_path), family="auto"), None)
    built("llama").config.save_pretrained(tmp_path)
    method().check_model(Model(model_name_or_path=str(tmp_path), family="auto"), None)


def test_slots_that_would_not_be_learned_are_refused():
    class Detached(type(built("llama"))):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, given, output: output.detach())

    config = built("llama").config
    calls = attention_calls(Detached(config))
    assert [call.learns for call in calls] == [False, True]
    with pytest.raises(
        ConfigError, match=r"no gradient .* attention in model\.layers\.0\.self_attn, so .*; type finetuning=lora"
    ):
        method().attach(Detached(config), FAMILY)
    idle = AttentionCall(module="a.1", heads=1, groups=1, key_dim=1, value_dim=1, learns=False)
    with pytest.raises(ConfigError, match=r"in a\.1 and 1 more"):
        check_calls("Any", [idle, idle])


@pytest.mark.parametrize("name", ["deepseek_v3", "jamba"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_saved_prefix_comes_back_and_peft_takes_none_that_it_would_compute_otherwise(name, projection, tmp_path):
    torch.manual_seed(2)
    model = method(prefix_projection=projection).attach(built(name), FAMILY).eval()
    method(prefix_projection=projection).save(model, tmp_path)
    again = method(prefix_projection=projection).attach(built(name), FAMILY).eval()
    method(prefix_projection=projection).restore(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**rows()).logits, model(**rows()).logits)
    with pytest.raises(Exception, match="size mismatch"):
        PeftModel.from_pretrained(built(name), str(tmp_path))


def test_projected_without_projection_is_the_same_prefix(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = method(prefix_projection=True).attach(built("deepseek_v3"), FAMILY).eval()
    method(prefix_projection=True).save(model, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "folded")
    (tmp_path / "folded/prefix_encoder.safetensors").unlink()
    again = method().attach(built("deepseek_v3"), FAMILY).eval()
    method().restore(again, tmp_path / "folded")
    with torch.no_grad():
        assert (again(**rows()).logits - model(**rows()).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_eager_attention_with_a_prefix_is_sdpa_with_it(name):
    model, encoder = with_prefix(name)
    eager = AutoModelForCausalLM.from_config(
        model.config.__class__(**model.config.to_dict()), attn_implementation="eager"
    )
    eager.load_state_dict(built(name).state_dict())
    other = add_prefix(eager.eval(), FAMILY, tokens=TOKENS, projection=False, dropout=0.0)
    other.load_state_dict(encoder.state_dict())
    shown = rows()["attention_mask"].bool()
    with torch.no_grad():
        assert (eager(**rows()).logits - model(**rows()).logits)[shown].abs().max() < 1e-4
