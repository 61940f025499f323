"""Every method on two-layer models: what it trains, what it leaves alone, and that saving and going on lose nothing."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from glmtuner.config.groups import LayerPart, Model
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families import FAMILIES
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.freeze import Freeze, trainable_layer_ids
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.p_tuning import ADAPTER, RAW, PTuning, prefix_settings
from glmtuner.finetuning.start import (
    CHANGED,
    WEIGHTS,
    Checkpoint,
    base_folder,
    build_trainable_model,
    checkpoint_in,
    checkpoints_of,
    lora_settings,
)
from glmtuner.finetuning.trained import TRAINED, assign, load_tensors, trained_parameters

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
KINDS = {
    "glm": (GlmConfig, GlmForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
METHODS = {
    "lora": lambda **own: Lora(finetuning_type="lora", **{"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target": [], **own}),
    "freeze": lambda **own: Freeze(finetuning_type="freeze", **{"num_layer_trainable": 1, "name_module_trainable": LayerPart.mlp, **own}),
    "p_tuning": lambda **own: PTuning(finetuning_type="p_tuning", **{"pre_seq_len": 5, **own}),
    "full": lambda **own: Full(finetuning_type="full", **own),
}  # fmt: skip
VARIANTS = {
    "lora": {},
    "lora_all": {"lora_target": ["all"]},
    "freeze": {},
    "freeze_qkv": {"name_module_trainable": LayerPart.qkv, "num_layer_trainable": -1},
    "p_tuning": {},
    "p_tuning_projected": {"prefix_projection": True},
    "full": {},
}


def base(kind="glm", layers=2, **more):
    """A random model, the same each time, and its family."""
    config, cls = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config(num_hidden_layers=layers, **{**SIZES, **more})).eval()
    return model, FAMILIES.get(kind) or family_from_structure(model)


def method(variant="lora", **own):
    name = next(name for name in sorted(METHODS, key=len, reverse=True) if variant.startswith(name))
    return METHODS[name](**{**VARIANTS.get(variant, {}), **own})


def attached(variant="lora", kind="glm", layers=2, seed=1, **own):
    """A model with the method attached, and the method."""
    model, family = base(kind, layers)
    finetuning = method(variant, **own)
    finetuning = finetuning.resolved(family, layers)
    torch.manual_seed(seed)
    model = finetuning.attach(model, family).eval()
    if isinstance(finetuning, PTuning):
        model.prefix_encoder.dropout.p = 0.0
    return model, finetuning


def trained(variant="lora", kind="glm", seed=1, **own):
    """The same with other values in what is trained, as if it had been."""
    model, finetuning = attached(variant, kind, seed=seed, **own)
    return moved(model, seed), finetuning


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(rows=2, length=7, seed=3):
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids=None, **more):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **more).logits


def everything(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


LORA_DEFAULTS = {"llama": ("q_proj", "v_proj")}  # PEFT's; the families of GLM have their own


every_kind = pytest.mark.parametrize("kind", KINDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


# What is trained


@every_kind
@every_variant
def test_what_is_not_trained_gets_no_gradient_and_does_not_move(kind, variant):
    model, _ = attached(variant, kind)
    model.train()
    names, before = trained_parameters(model).keys(), everything(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's A gets its first gradient in the second step
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert names == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
    assert names == {name for name, value in everything(model).items() if not torch.equal(value, before[name])}
    assert names and all(parameter.dtype == torch.float32 for parameter in trained_parameters(model).values())


@every_variant
def test_trained_parameters_of_a_half_precision_base_are_float32(variant):
    model, family = base()
    finetuning = method(variant)
    finetuning = finetuning.resolved(family, 2)
    model = finetuning.attach(model.bfloat16(), family)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes.get(True) == torch.float32 and dtypes.get(False) in (torch.bfloat16, None)
    assert (False in dtypes) == (variant != "full")


def test_none_trains_nothing_and_changes_nothing():
    model, family = base()
    expected = logits_of(model)
    model = NoTuning(finetuning_type="none").attach(model, family)
    assert not trained_parameters(model) and torch.equal(logits_of(model), expected)


@every_kind
@pytest.mark.parametrize("target", [[], ["all"]])
def test_fresh_lora_changes_nothing(kind, target):
    model, _ = attached("lora", kind, lora_target=target)
    assert torch.equal(logits_of(model), logits_of(base(kind)[0]))
    assert not torch.equal(logits_of(moved(model)), logits_of(base(kind)[0]))


@every_kind
def test_lora_goes_into_the_family_s_layers(kind):
    family = base(kind)[1]
    for target, names in (
        ([], LORA_DEFAULTS.get(kind, family.attention)),
        (["all"], family.linears),
        (["o_proj", "q_proj"], ("o_proj", "q_proj")),
    ):
        model, _ = attached("lora", kind, lora_target=target)
        found = {re.search(r"layers\.(\d+)\..*?(\w+)\.lora_[AB]", name).groups() for name in trained_parameters(model)}
        assert found == {(str(layer), name) for layer in range(2) for name in names}
    assert all(".lora_" in name for name in trained_parameters(model))


def test_a_lora_target_that_matches_no_layer_is_answered_with_the_nearest():
    family = base("glm")[1]
    with pytest.raises(
        ConfigError,
        match=r"finetuning\.lora_target=\[q_prj\]: .*'q_prj'; did you mean 'q_proj'\?",
    ):
        method("lora", lora_target=["q_prj"]).resolved(family, 2)
    with pytest.raises(
        ConfigError, match=r"'query_key_value'.*this model's blocks have q_proj, k_proj, v_proj, o_proj"
    ):
        method("lora", lora_target=["query_key_value"]).resolved(family, 2)


def test_a_lora_rank_that_no_memory_holds_is_one_paragraph():
    with pytest.raises(ConfigError, match=r"finetuning\.lora_rank=1000000000000: not enough memory for the adapter"):
        attached("lora", "glm", lora_rank=10**12)


@every_kind
def test_merged_lora_keeps_outputs(kind):
    model, _ = trained("lora", kind, lora_target=["all"])
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert type(merged) is KINDS[kind][1]
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("part", LayerPart)
@pytest.mark.parametrize(
    ("count", "layers"), [(1, [11]), (3, [9, 10, 11]), (-1, [0]), (-2, [0, 1]), (2, [10, 11]), (12, range(12))]
)
def test_freeze_trains_exactly_the_named_layers(kind, part, count, layers):
    model, _ = attached("freeze", kind, layers=12, num_layer_trainable=count, name_module_trainable=part)
    found = {
        re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+)\.\w+", name).groups() for name in trained_parameters(model)
    }
    if part is LayerPart.mlp:
        assert {(int(layer), block) for layer, block, _ in found} == {(layer, "mlp") for layer in layers}
    else:
        expected = {(str(layer), "self_attn", name) for layer in layers for name in ("q_proj", "k_proj", "v_proj")}
        assert found == expected
    whole = {
        name for name, _ in model.named_parameters() if any(f".{layer}.{block}." in name for layer, block, _ in found)
    }
    if part is LayerPart.mlp:
        assert whole == trained_parameters(model).keys()


@pytest.mark.parametrize("count", [13, -13, 0, 100])
def test_freeze_refuses_layers_that_the_model_does_not_have(count):
    told = rf"finetuning\.num_layer_trainable={count} does not fit a model of 12 layers; type 1 to 12 .* -1 to -12"
    with pytest.raises(ConfigError, match=told):
        trainable_layer_ids(count, 12)
    if count:
        with pytest.raises(ConfigError, match=told):
            method("freeze", num_layer_trainable=count).resolved(base()[1], 12)


def test_full_trains_everything():
    model, _ = attached("full")
    assert trained_parameters(model).keys() == dict(model.named_parameters()).keys()


def test_the_structure_of_an_unknown_family_is_read_off_its_modules():
    family = base("llama")[1]
    assert (family.layers, family.attention_block, family.mlp) == ("model.layers", "self_attn", "mlp")
    assert family.attention == ("q_proj", "k_proj", "v_proj")
    assert {*family.other_linears} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


# Saving and going on


def digest_of(model):
    """A hash of the trained parameters' names and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(trained_parameters(model).items()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@every_kind
@every_variant
@pytest.mark.parametrize("how", ["save", "save_trained"])
def test_what_is_saved_comes_back_bit_by_bit(kind, variant, how, tmp_path):
    model, finetuning = trained(variant, kind)
    getattr(finetuning, how)(model, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    again, other = attached(variant, kind, seed=9)
    assert digest_of(again) != digest_of(model)
    other.restore(again, tmp_path)
    assert digest_of(again) == digest_of(model)
    assert torch.equal(logits_of(again), logits_of(model))
    found = everything(again)
    assert all(torch.equal(value, found[name]) for name, value in everything(model).items())


@pytest.mark.parametrize("variant", ["full", "freeze"])
def test_tied_embeddings_come_back_too(variant, tmp_path):
    def tied(seed):
        model, family = base("glm", tie_word_embeddings=True)
        finetuning = method(variant)
        return moved(finetuning.attach(model, family), seed), finetuning

    model, finetuning = tied(1)
    for how in ("save", "save_trained"):
        getattr(finetuning, how)(model, tmp_path / how)
        again, other = tied(2)
        other.restore(again, tmp_path / how)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(logits_of(again), logits_of(model))


@every_variant
def test_a_checkpoint_of_another_shape_is_refused(variant, tmp_path):
    model, finetuning = trained(variant)
    finetuning.save_trained(model, tmp_path)
    others = {"lora": {"lora_rank": 2}, "lora_all": {"lora_target": []}, "p_tuning": {"pre_seq_len": 4}}
    others |= {"freeze": {"num_layer_trainable": 2}, "freeze_qkv": {"num_layer_trainable": 2}}
    others |= {"p_tuning_projected": {"pre_seq_len": 4}}
    if variant == "full":
        torch.manual_seed(0)
        smaller = GlmForCausalLM(GlmConfig(num_hidden_layers=2, **{**SIZES, "vocab_size": 40}))
        again, other = finetuning.attach(smaller, FAMILIES["glm"]), finetuning
    else:
        again, other = attached(variant, **others[variant])
    with pytest.raises(CheckpointError, match=r"does not fit this model: of its parameters \d+"):
        other.restore(again, tmp_path)


@every_variant
def test_a_truncated_checkpoint_is_an_error_of_ours(variant, tmp_path):
    model, finetuning = trained(variant)
    finetuning.save_trained(model, tmp_path)
    path = next(tmp_path / name for name in (TRAINED, RAW, ADAPTER) if (tmp_path / name).is_file())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .*; use another checkpoint"):
        finetuning.restore(model, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no \w+\.safetensors in|holds a prefix without its projection"):
        finetuning.restore(model, tmp_path)


def test_assign_names_what_differs():
    values = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 are missing \(such as b\), 1 belong to another model \(such as c\)"):
        assign(values, {"a": torch.ones(2), "c": torch.ones(2)}, "folder")
    with pytest.raises(CheckpointError, match=r"1 have another shape \(such as b\)"):
        assign(values, {"a": torch.ones(2), "b": torch.ones(3)}, "folder")
    assert not values["a"].any()


# P-Tuning: the prefix


@every_kind
@pytest.mark.parametrize("variant", ["p_tuning", "p_tuning_projected"])
def test_a_prefix_shifts_no_position(kind, variant):
    """The same prefix in a cache of the bare model, tokens counted from 0."""
    model, _ = trained(variant, kind)
    bare, _ = base(kind)
    cache = DynamicCache(config=bare.config)
    with torch.no_grad():
        for layer in range(2):
            keys, values = (part.expand(2, -1, -1, -1) for part in model.prefix_encoder(layer))
            cache.update(keys, values, layer)
    ids = tokens()
    expected = logits_of(
        bare,
        ids,
        past_key_values=cache,
        position_ids=torch.arange(ids.shape[1]).expand(ids.shape),
        attention_mask=torch.ones(2, 5 + ids.shape[1], dtype=torch.long),
    )
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert (logits_of(model, ids) - logits_of(bare, ids)).abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("variant", ["p_tuning", "p_tuning_projected"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(kind, variant, use_reentrant):
    def step(checkpointing):
        model, _ = trained(variant, kind)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:  # which needs an input with a gradient
                model.enable_input_require_grads()
        out = model(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        return out.logits.detach(), {name: value.grad for name, value in trained_parameters(model).items()}

    (plain, plain_grads), (saved, saved_grads) = step(False), step(True)
    assert torch.equal(plain, saved) and plain_grads.keys() == saved_grads.keys()
    for name, grad in plain_grads.items():
        torch.testing.assert_close(saved_grads[name], grad)
        assert grad.abs().max() > 0


def padded_left(rows):
    """Rows of different length as one left-padded batch: ids, mask and positions."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@every_kind
@pytest.mark.parametrize("variant", ["lora", "p_tuning"])
def test_a_left_padded_batch_is_its_rows_one_by_one(kind, variant):
    model, _ = trained(variant, kind)
    rows = [tokens(1, length, seed=length)[0] for length in (7, 3, 5)]
    ids, mask, positions = padded_left(rows)
    together = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found[-len(row) :], logits_of(model, row[None])[0], atol=1e-5, rtol=1e-4)
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    together = logits_of(model, right, attention_mask=(right > 0).long())
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found[: len(row)], logits_of(model, row[None])[0], atol=1e-5, rtol=1e-4)


@every_kind
def test_generation_is_the_same_with_any_cache_and_in_any_batch(kind):
    model, _ = trained("p_tuning", kind)
    rows = [tokens(1, length, seed=length)[0] for length in (7, 3)]
    ids, mask, _ = padded_left(rows)

    def generate(ids, mask, **more):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **more,
        )  # fmt: skip
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)

    expected, scores = generate(ids, mask, use_cache=False)
    for more in ({"use_cache": True}, {"cache_implementation": "static"}):
        found, other = generate(ids, mask, **more)
        assert torch.equal(found, expected)
        torch.testing.assert_close(other, scores, atol=1e-4, rtol=1e-4)
    for place, row in enumerate(rows):
        found, other = generate(row[None], torch.ones_like(row[None]))
        assert torch.equal(found[0], expected[place])
        torch.testing.assert_close(other[0], scores[place], atol=1e-4, rtol=1e-4)
    whole = torch.cat([ids[:1], expected[:1]], 1)  # and as one forward pass
    torch.testing.assert_close(logits_of(model, whole)[:, 6:-1], scores[:1], atol=1e-4, rtol=1e-4)


def test_beams_see_the_prefix_too():
    model, _ = trained("p_tuning")
    ids, mask, _ = padded_left([tokens(1, 6)[0], tokens(1, 4)[0]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached, plain)


@every_kind
@pytest.mark.parametrize("variant", ["p_tuning", "p_tuning_projected"])
def test_peft_loads_the_saved_prefix(kind, variant, tmp_path):
    model, finetuning = trained(variant, kind)
    finetuning.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(base(kind)[0], str(tmp_path)).eval()
    prompt = theirs.get_prompt(batch_size=3)
    layers = getattr(prompt, "layers", None) or prompt.self_attention_cache.layers
    assert len(layers) == 2
    for layer, cached in enumerate(layers):
        keys, values = model.prefix_encoder(layer)
        for row in range(3):
            torch.testing.assert_close(cached.keys[row], keys)
            torch.testing.assert_close(cached.values[row], values)


@every_kind
def test_a_folded_projection_is_the_raw_one(kind, tmp_path):
    model, finetuning = trained("p_tuning_projected", kind)
    finetuning.save(model, tmp_path)
    assert prefix_settings(tmp_path) == {"pre_seq_len": 5, "prefix_projection": True}
    folded = tmp_path / "folded"  # what another tool has: PEFT's own two files
    folded.mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copy(tmp_path / name, folded)
    assert prefix_settings(folded) == {"pre_seq_len": 5, "prefix_projection": False}
    again, other = attached("p_tuning", kind, seed=9)
    other.restore(again, folded)
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match=r"without its projection.*type finetuning\.prefix_projection=false"):
        finetuning.restore(model, folded)


def test_a_prefix_is_not_added_to_a_model_with_its_own_attention():
    config = BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match=r"finetuning=p_tuning: .*BloomForCausalLM.*finetuning=lora"):
        method("p_tuning").attach(BloomForCausalLM(config), FAMILIES["glm"])


def test_dropout_of_the_prefix_is_for_training_only():
    model, family = base()
    model = method("p_tuning").attach(model, family)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits_of(model), logits_of(model))
    model.eval()
    assert torch.equal(logits_of(model), logits_of(model))


# Chains of checkpoints


def saved(folder, variant="lora", on=None, seed=1, **own):
    """An adapter trained on `on` (a bare model): its folder and the model with it merged, or attached."""
    model, family = base() if on is None else (on, FAMILIES["glm"])
    finetuning = method(variant, **own)
    finetuning = finetuning.resolved(family, 2)
    model = moved(finetuning.attach(model, family), seed).eval()
    finetuning.save(model, folder)
    return folder, model


def start_from(paths, finetuning, resume_lora=True, trains=True, user_keys=()):
    """The model on these checkpoints, and the method with the settings in use."""
    model, family = base()
    finetuning = finetuning.resolved(family, 2)
    checkpoints = [checkpoint_in(str(path)) for path in paths]
    model, finetuning = build_trainable_model(
        model, finetuning, family, checkpoints, resume_lora=resume_lora, trains=trains, user_keys={*user_keys}
    )
    return model.eval(), finetuning


@pytest.fixture
def two(tmp_path):
    """A LoRA, a second one trained on top of it, and the outputs of both together."""
    first, model = saved(tmp_path / "first", lora_rank=2)
    second, model = saved(tmp_path / "second", on=model.merge_and_unload(), seed=5, lora_rank=3, lora_target=["all"])
    return first, second, logits_of(model)


def test_adapters_are_merged_in_order_and_a_new_one_is_started(two):
    *folders, expected = two
    finetuning = method("lora")
    model, finetuning = start_from(folders, finetuning, resume_lora=False)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert finetuning.lora_rank == 4 and finetuning.lora_target == ["q_proj", "k_proj", "v_proj"]
    assert all(not value.any() for name, value in trained_parameters(model).items() if "lora_B" in name)


def test_the_last_adapter_goes_on_as_it_was_saved(two):
    *folders, expected = two
    finetuning = method("lora")
    model, finetuning = start_from(folders, finetuning, resume_lora=True)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert finetuning.lora_rank == 3 and len(finetuning.lora_target) == 6
    kept = load_tensors(folders[-1] / "adapter_model.safetensors")
    found = {name.replace(".default.", "."): value for name, value in trained_parameters(model).items()}
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)


def test_one_adapter_alone(two):
    first, _, both = two
    for resume in (True, False):
        alone = logits_of(start_from([first], method("lora"), resume_lora=resume)[0])
        assert (alone - both).abs().max() > 1e-3
        assert (alone - logits_of(base()[0])).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["freeze", "full", "none"])
def test_other_methods_start_from_merged_adapters(two, variant):
    *folders, expected = two
    finetuning = NoTuning(finetuning_type="none") if variant == "none" else method(variant)
    model, finetuning = start_from(folders, finetuning, trains=variant != "none")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_run_that_does_not_train_never_starts_a_new_adapter(two):
    *folders, expected = two
    finetuning = method("lora")
    model, finetuning = start_from(folders, finetuning, resume_lora=False, trains=False)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert finetuning.lora_rank == 3 and any(
        value.any() for name, value in trained_parameters(model).items() if "lora_B" in name
    )


def test_typed_settings_that_do_not_fit_the_adapter_are_refused(two):
    first, second, _ = two
    with pytest.raises(
        ConfigError, match=r"finetuning\.lora_rank=4 does not fit .*second, which has 3; .*resume_lora_training=false"
    ):
        start_from([first, second], method("lora"), user_keys=["finetuning.lora_rank"])
    start_from([first, second], method("lora", lora_rank=3), user_keys=["finetuning.lora_rank"])


def test_a_prefix_goes_on_upon_a_merged_adapter(tmp_path):
    lora, model = saved(tmp_path / "lora")
    prefix, model = saved(tmp_path / "prefix", "p_tuning_projected", on=model.merge_and_unload(), seed=5, pre_seq_len=3)
    finetuning = method("p_tuning")
    again, finetuning = start_from([lora, prefix], finetuning)
    assert (finetuning.pre_seq_len, finetuning.prefix_projection) == (3, True)
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("paths", "variant"), [(["prefix"], "lora"), (["prefix"], "full"), (["prefix", "lora"], "p_tuning")]
)
def test_nothing_but_p_tuning_builds_on_a_prefix(tmp_path, paths, variant):
    saved(tmp_path / "lora"), saved(tmp_path / "prefix", "p_tuning")
    with pytest.raises(CheckpointError, match=r"prefix in .*; type finetuning=p_tuning"):
        start_from([tmp_path / path for path in paths], method(variant))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    other = GlmForCausalLM(GlmConfig(num_hidden_layers=2, **{**SIZES, "hidden_size": 24}))
    saved(tmp_path, on=other)
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="does not fit this model"):
            start_from([tmp_path], method("lora"), resume_lora=resume)


def test_changed_parameters_are_put_into_the_base(tmp_path):
    model, finetuning = trained("freeze")
    finetuning.save_trained(model, tmp_path)
    assert checkpoint_in(str(tmp_path)) == Checkpoint(CHANGED, tmp_path)
    again, finetuning = start_from([tmp_path], method("lora"))
    assert torch.equal(logits_of(again), logits_of(model))


def test_what_replaces_weights_comes_after_what_was_added_to_them(tmp_path):
    lora, model = saved(tmp_path / "lora")
    finetuning = method("freeze_qkv")
    model = moved(finetuning.attach(model.merge_and_unload(), FAMILIES["glm"]), seed=5).eval()
    finetuning.save_trained(model, tmp_path / "frozen")
    again, finetuning = start_from([lora, tmp_path / "frozen"], method("lora"))
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=1e-4)
    other, _ = start_from([tmp_path / "frozen", lora], method("lora"))
    assert (logits_of(other) - logits_of(model)).abs().max() > 1e-3


def run_folder(folder, variant="lora", checkpoint_dir=(), resume=True, **own):
    """A finished run's folder, as far as its lineage goes."""
    folder.mkdir()
    model, finetuning = trained(variant, **own)
    finetuning.save(model, folder / finetuning.saved_as)
    paths = json.dumps([str(path) for path in checkpoint_dir])
    (folder / "config.yaml").write_text(
        f"model: {{checkpoint_dir: {paths}, resume_lora_training: {json.dumps(resume)}}}\n", encoding="utf-8"
    )
    (folder / "provenance.json").write_text("{}", encoding="utf-8")
    return folder


def lineage_of(*paths):
    found = checkpoints_of(Model(model_name_or_path="x", family="glm", checkpoint_dir=[str(path) for path in paths]))
    return [(checkpoint.kind.name, checkpoint.folder.parent.name) for checkpoint in found]


def test_a_run_brings_what_it_was_trained_on(tmp_path):
    first = run_folder(tmp_path / "first")
    merged = run_folder(tmp_path / "merged", checkpoint_dir=[first], resume=False)
    went_on = run_folder(tmp_path / "went_on", checkpoint_dir=[first], resume=True)
    prefix = run_folder(tmp_path / "prefix", "p_tuning", checkpoint_dir=[merged])
    longer = run_folder(tmp_path / "longer", "p_tuning", checkpoint_dir=[prefix])
    frozen = run_folder(tmp_path / "frozen", "freeze", checkpoint_dir=[went_on])
    after = run_folder(tmp_path / "after", checkpoint_dir=[frozen])
    assert lineage_of(first) == [("lora", "first")]
    assert lineage_of(merged) == [("lora", "first"), ("lora", "merged")]
    assert lineage_of(went_on) == [("lora", "went_on")]
    assert lineage_of(prefix) == [("lora", "first"), ("lora", "merged"), ("prefix", "prefix")]
    assert lineage_of(longer) == [("lora", "first"), ("lora", "merged"), ("prefix", "longer")]
    assert lineage_of(frozen) == [("weights", "frozen")]
    assert lineage_of(after) == [("weights", "frozen"), ("lora", "after")]
    assert lineage_of(first, after) == [("weights", "frozen"), ("lora", "after")]


def test_a_whole_model_is_what_the_base_is_loaded_from(tmp_path):
    frozen = run_folder(tmp_path / "frozen", "freeze")
    found = [checkpoint_in(str(frozen))]
    assert found == [Checkpoint(WEIGHTS, frozen / "model")]
    assert base_folder(found) == frozen / "model" and base_folder([]) is None
    adapter = checkpoint_in(str(run_folder(tmp_path / "lora")))
    assert base_folder([adapter]) is None and adapter.folder.name == "adapter"
    assert checkpoint_in(str(adapter.folder)) == adapter


def test_folders_without_trained_weights_say_what_to_name(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"model\.checkpoint_dir=.* holds no trained weights: .*; name a finished run"
    ):
        checkpoint_in(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "XLORA"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.checkpoint_dir=.* XLORA adapter, .*: it mixes several trained"):
        checkpoint_in(str(tmp_path))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ".*proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert lora_settings(tmp_path)["lora_target"] == [".*proj"]


def test_a_checkpoint_listed_twice_is_applied_once(tmp_path):
    a = run_folder(tmp_path / "a")
    b = run_folder(tmp_path / "b", checkpoint_dir=[a], resume=False)
    assert lineage_of(a, b) == [("lora", "a"), ("lora", "b")]
