"""ChatGLM against reference values of its published code, and the checkpoints that exist of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    GlmForCausalLM,
)

import glmtuner.models  # noqa: F401, makes chatglm known
from glmtuner.config.groups import LayerPart
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families import family_named
from glmtuner.families.family import family_of
from glmtuner.finetuning.freeze import Freeze
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.p_tuning import PTuning
from glmtuner.models.configuration_chatglm import ChatGLM2Config, ChatGLMConfig
from glmtuner.models.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMRotaryEmbedding, positions
from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration, as_glm
from glmtuner.models.prefix import add_prefix
from glmtuner.models.prequantized import QUANTIZED, dequantized, unpacked

TOLERANCE = 1e-4  # absolute, on fp32 logits of magnitude 10; the smallest mistake tried gives 7.6e-4
FAMILY = {"chatglm_v1": "chatglm", "chatglm2": "chatglm2"}
both = pytest.mark.parametrize("name", FAMILY)


class Golden:
    """One folder of reference values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "golden.safetensors")
        self.about = json.loads((folder / "golden.json").read_text(encoding="utf-8"))

    def model(self, **options: Any) -> Any:
        options = {"dtype": torch.float32, **options}
        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        """input_ids, and the case's mask as [B, S] (the reference's has four dimensions, True = blocked)."""
        found = {"input_ids": self(f"{case}/input_ids")}
        mask = self.tensors.get(f"{case}/attention_mask")
        if mask is not None:
            mask = mask if mask.dim() == 2 else (~mask[:, 0, -1]).long()
            found["attention_mask"] = mask[:, -found["input_ids"].shape[1] :]
        return found


@pytest.fixture(scope="module")
def golden(golden_folder: Path):
    found = {name: Golden(golden_folder / name) for name in FAMILY}
    return found.__getitem__


def difference(found: torch.Tensor, wanted: torch.Tensor, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference on tokens; rows of padding are nobody's business."""
    off = (found.float() - wanted.float()).abs()
    return off[inputs["attention_mask"].bool()].max().item() if "attention_mask" in inputs else off.max().item()


# -- fp32 ------------------------------------------------------------------------------------------------------------

LOGITS = [
    *(("chatglm_v1", case) for case in ("single", "single_mask_token", "batch_left_padded_tokenizer",
                                        "batch_left_padded_no_mask", "sft", "pos1d_gmask", "pos1d_mask")),
    *(("chatglm2", case) for case in ("single", "batch_left_padded", "batch_left_padded_default_positions", "sft",
                                      "single_offset_positions")),
]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "case"), LOGITS)
def test_logits(golden, name, case, attention):
    values = golden(name)
    options = {"position_encoding_2d": False} if case.startswith("pos1d") else {}
    model = values.model(attn_implementation=attention, **options)
    inputs = values.inputs(case)
    given = {"position_ids": values(f"{case}/position_ids")} if case == "single_offset_positions" else {}
    with torch.no_grad():
        assert difference(model(**inputs, **given).logits, values(f"{case}/logits"), inputs) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["single", "single_mask_token", "batch_left_padded_no_mask", "pos1d_gmask", "pos1d_mask"]
)
def test_positions_are_the_reference_s(golden, case):
    values = golden("chatglm_v1")
    config = AutoConfig.from_pretrained(values.folder, position_encoding_2d=not case.startswith("pos1d"))
    assert torch.equal(positions(values(f"{case}/input_ids"), None, config), values(f"{case}/ref_position_ids"))


def test_positions_of_padded_rows(golden):
    values = golden("chatglm_v1")
    inputs = values.inputs("batch_left_padded_tokenizer")
    config = AutoConfig.from_pretrained(values.folder)
    found = positions(inputs["input_ids"], inputs["attention_mask"], config)
    assert torch.equal(found, values("batch_left_padded_tokenizer/position_ids"))


@both
def test_hidden_states(golden, name):
    values = golden(name)
    model, wanted = values.model(), values("single/hidden_states")
    with torch.no_grad():
        found = torch.stack(model(**values.inputs("single"), output_hidden_states=True).hidden_states)
        if name == "chatglm2":  # the published code gives the last one before the norm, transformers behind it
            wanted = torch.cat([wanted[:-1], model.transformer.encoder.final_layernorm(wanted[-1])[None]])
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < TOLERANCE


@both
def test_cached_keys_and_values(golden, name):
    values = golden(name)
    model = values.model()
    cache = model(**values.inputs("single"), use_cache=True).past_key_values
    stored = [key for key in values.tensors if key.startswith(("single/k_layer", "single/v_layer"))]
    assert stored
    for key in stored:
        layer = cache.layers[int(key[-1])]
        found = layer.keys if key.startswith("single/k") else layer.values
        assert (found.permute(2, 0, 1, 3) - values(key)).abs().max() < TOLERANCE, key


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(golden, name, checkpointing):
    values = golden(name)
    model = values.model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(**values.inputs("sft"), labels=values("sft/labels"), use_cache=False).loss
    loss.backward()
    about = values.about["sft"]
    assert abs(loss.item() - about["loss"]["value"]) < TOLERANCE
    gradients = {parameter: value.grad for parameter, value in model.named_parameters()}
    assert gradients.keys() == about["grad_norms"].keys()
    for parameter, norm in about["grad_norms"].items():
        assert abs(gradients[parameter].norm().item() - norm) < TOLERANCE, parameter
    whole = [key.removeprefix("sft/grad.") for key in values.tensors if key.startswith("sft/grad.")]
    assert whole
    for parameter in whole:
        assert (gradients[parameter] - values(f"sft/grad.{parameter}")).abs().max() < TOLERANCE, parameter


def test_padding_on_the_right_gives_the_loss_of_padding_on_the_left(golden):
    for name in FAMILY:
        values = golden(name)
        model, inputs, labels = values.model(), values.inputs("sft"), values("sft/labels")
        rows = [row.bool() for row in inputs["attention_mask"]]
        right = {"input_ids": torch.full_like(labels, 3), "attention_mask": torch.zeros_like(labels),
                 "labels": torch.full_like(labels, -100)}  # fmt: skip
        for place, keep in enumerate(rows):
            count = int(keep.sum())
            right["input_ids"][place, :count] = inputs["input_ids"][place, keep]
            right["attention_mask"][place, :count] = 1
            right["labels"][place, :count] = labels[place, keep]
        with torch.no_grad():
            assert abs(model(**right).loss.item() - values.about["sft"]["loss"]["value"]) < TOLERANCE


@both
@pytest.mark.parametrize("case", ["generate_single", "generate_batch_left_padded", "generate_beam3_single"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation(golden, name, case, cache):
    values = golden(name)
    inputs, wanted = values.inputs(case), values(f"{case}/output_ids")
    found = values.model().generate(
        **inputs,
        max_new_tokens=wanted.shape[1] - inputs["input_ids"].shape[1],
        do_sample=False,
        num_beams=3 if "beam3" in case else 1,
        eos_token_id=None,
        pad_token_id=3,
        use_cache=cache is not None,
        cache_implementation=cache,
        disable_compile=True,
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("row", [[9, 9, 505], [9, 9, 508]], ids=["no <sop>", "no mask token"])
def test_a_row_without_an_end_of_its_context_is_refused(golden, row):
    with pytest.raises(ValueError, match=r"a row of input_ids has no"):
        golden("chatglm_v1").model()(torch.tensor([row]))


# -- P-tuning --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["ptuning_noproj", "ptuning_proj"])
def test_p_tuning(golden, name, kind):
    values = golden(name)
    model = values.model().requires_grad_(False)
    encoder = add_prefix(model, family_named(FAMILY[name]), tokens=8, projection=kind == "ptuning_proj", dropout=0.1)
    saved = load_file(values.folder / f"{kind}.safetensors")
    encoder.load_state_dict({key.removeprefix("transformer.prefix_encoder."): value for key, value in saved.items()})
    encoder.eval()

    def given(case: str) -> dict[str, torch.Tensor]:
        # a prefix stands at no position: tokens must be counted from the first that is no padding
        return {"position_ids": values(f"{case}/position_ids")} if name == "chatglm2" else {}

    for case, like in (("single", None), ("batch_left_padded", "batch_left_padded")):
        inputs = values.inputs(f"{kind}/{case}")
        with torch.no_grad():
            logits = model(**inputs, **(given(like) if like else {})).logits
        assert difference(logits, values(f"{kind}/{case}/logits"), inputs) < TOLERANCE
    inputs, wanted = values.inputs(f"{kind}/generate"), values(f"{kind}/generate/output_ids")
    new = wanted.shape[1] - inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=3)
    assert torch.equal(found, wanted)
    loss = model(**values.inputs("sft"), labels=values("sft/labels"), **given("sft")).loss
    loss.backward()
    about = values.about[f"{kind}/sft"]
    assert abs(loss.item() - about["loss"]["value"]) < TOLERANCE
    for parameter, value in encoder.named_parameters():
        norm = about["grad_norms"][f"transformer.prefix_encoder.{parameter}"]
        assert abs(value.grad.norm().item() - norm) < TOLERANCE, parameter


@both
def test_padded_rows_with_a_prefix_generate_what_they_generate_alone(golden, name):
    values = golden(name)
    model = values.model().requires_grad_(False)
    encoder = add_prefix(model, family_named(FAMILY[name]), tokens=8, projection=False, dropout=0.1)
    encoder.load_state_dict(
        {"embedding.weight": next(iter(load_file(values.folder / "ptuning_noproj.safetensors").values()))}
    )
    encoder.eval()
    inputs = values.inputs("generate_batch_left_padded")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(**inputs, **options)
    assert (inputs["attention_mask"] == 0).any()
    for row, keep in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row, keep][None], **options)
        assert torch.equal(together[row, -12:], alone[0, -12:])


# -- half precision ---------------------------------------------------------------------------------------------------

HALF = {
    torch.float16: (0.1, 1.0),
    torch.bfloat16: (0.7, 0.9),
}  # largest difference of a logit, share of equal top tokens


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("cast", ["loaded", "converted"])
def test_half_precision(golden, name, attention, dtype, cast):
    values = golden(name)
    model = values.model(attn_implementation=attention, dtype=dtype if cast == "loaded" else torch.float32).to(dtype)
    with torch.no_grad():
        logits = model(**values.inputs("single")).logits
    tolerance, share = HALF[dtype]
    wanted = values("single/logits")
    assert difference(logits, wanted, {}) < tolerance
    assert (logits.argmax(-1) == wanted.argmax(-1)).float().mean() >= share


def test_fp16_as_shipped(golden):
    values = golden("chatglm_v1")
    with torch.no_grad():
        logits = values.model(dtype=torch.float16)(**values.inputs("single_fp16")).logits
    assert difference(logits, values("single_fp16/logits"), {}) < 0.05  # its angles are in fp16, ours in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_angles_are_never_in_half_precision(golden, dtype):
    values = golden("chatglm_v1")
    rows = torch.tensor(values.about["rope_6b_fp32"]["rows"])
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig()).to(dtype)
    cos, sin = rotary(torch.stack([rows, torch.zeros_like(rows)])[None])
    assert cos.dtype == torch.float32
    assert (cos[0, 0, :, :64] - values("rope_6b_fp32/cos")).abs().max() < 1e-6
    assert (sin[0, 0, :, :64] - values("rope_6b_fp32/sin")).abs().max() < 1e-6
    assert torch.all(cos[0, 0, :, 64:] == 1)


# -- configs and the places a model can be put -------------------------------------------------------------------------


def test_one_model_type_and_two_configs():
    assert isinstance(ChatGLMConfig.from_dict({"position_encoding_2d": True, "vocab_size": 512}), ChatGLMConfig)
    assert isinstance(ChatGLMConfig.from_dict({"multi_query_attention": True}), ChatGLM2Config)
    with pytest.raises(CheckpointError, match="before April 2023"):
        ChatGLMConfig.from_dict({"vocab_size": 150528})
    with pytest.raises(CheckpointError, match="rmsnorm=False"):
        ChatGLMConfig.from_dict({"multi_query_attention": True, "rmsnorm": False})


@pytest.mark.parametrize(
    ("config", "declared", "family"),
    [
        ({"vocab_size": 130528, "position_encoding_2d": True}, "auto", "chatglm"),
        ({"vocab_size": 130528}, "chatglm2", "chatglm"),
        ({"padded_vocab_size": 65024}, "chatglm", "chatglm2"),
        ({"padded_vocab_size": 65024}, "chatglm3", "chatglm3"),
        ({"padded_vocab_size": 65024, "rope_ratio": 50}, "chatglm3", "chatglm3"),
        ({"padded_vocab_size": 65024, "rope_ratio": 50, "rope_interpolation": False}, "auto", "chatglm2"),
        ({"padded_vocab_size": 151552, "rope_ratio": 500}, "auto", "glm4_original"),
        ({"padded_vocab_size": 151552}, "chatglm3", "glm4_original"),
    ],
)
def test_the_family_is_told_by_the_keys_of_config_json(config, declared, family):
    assert family_of({"model_type": "chatglm", **config}, declared).name == family


def test_a_long_context_that_two_families_read_differently_must_be_declared():
    with pytest.raises(ConfigError, match=r"rope_ratio=50.*type model.family=chatglm2 or chatglm3"):
        family_of({"model_type": "chatglm", "padded_vocab_size": 65024, "rope_ratio": 50}, "auto")


@pytest.mark.parametrize("interpolation", [False, True])
def test_long_context_rules(golden, interpolation):
    """ChatGLM3-6B-32k and GLM-4 multiply the rotary base by rope_ratio; ChatGLM2-6B-32k divides positions by it."""
    values = golden("chatglm2")
    config = AutoConfig.from_pretrained(values.folder, rope_ratio=50)
    config.rope_interpolation = interpolation
    config.set_rope()
    model = values.model(config=config)
    rotary_dim = config.kv_channels // 2
    exponents = torch.arange(0, rotary_dim, 2).float() / rotary_dim
    theta = 1 / 10000**exponents / 50 if interpolation else 1 / (10000.0 * 50) ** exponents
    cos, _ = model.transformer.rotary_pos_emb(torch.zeros(1), torch.tensor([[0, 7, 1000]]))
    wanted = (torch.tensor([0.0, 7.0, 1000.0])[:, None] * theta).cos()
    assert (cos[0, :, : rotary_dim // 2] - wanted).abs().max() < 1e-4
    assert ChatGLMConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


@both
def test_heads_for_scores(golden, name):
    values = golden(name)
    padded = values.inputs("batch_left_padded_tokenizer" if name == "chatglm_v1" else "batch_left_padded")
    score = AutoModelForSequenceClassification.from_pretrained(values.folder, num_labels=1, dtype=torch.float32).eval()
    assert score(**padded).logits.shape == (3, 1)
    value = AutoModelForTokenClassification.from_pretrained(values.folder, num_labels=1, dtype=torch.float32).eval()
    assert value(**padded).logits.shape == (*padded["input_ids"].shape, 1)
    hidden = AutoModel.from_pretrained(values.folder, dtype=torch.float32).eval()(**values.inputs("single"))
    whole = values.model()(**values.inputs("single"), output_hidden_states=True)
    assert torch.equal(hidden.last_hidden_state, whole.hidden_states[-1])


@both
def test_bitsandbytes_leaves_head_and_embeddings(golden, name):
    values = golden(name)
    model = values.model(quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"})
    kinds = {module_name.rpartition(".")[2]: type(module).__name__ for module_name, module in model.named_modules()}
    assert {kinds[linear] for linear in QUANTIZED[:4]} == {"Linear4bit"}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model(**values.inputs("single")).logits.isfinite().all()


@both
def test_a_device_map_may_split_between_blocks_only(golden, name, tmp_path):
    values = golden(name)
    names = {"chatglm_v1": ["transformer.word_embeddings", "transformer.rotary_emb", "transformer.layers.0",
                            "transformer.layers.1", "transformer.final_layernorm", "lm_head"],
             "chatglm2": ["transformer.embedding", "transformer.rotary_pos_emb", "transformer.encoder.layers.0",
                          "transformer.encoder.layers.1", "transformer.encoder.final_layernorm",
                          "transformer.output_layer"]}[name]  # fmt: skip
    layers = names[2].removesuffix("0")
    places = dict.fromkeys(names, "cpu") | {f"{layers}2": "disk", f"{layers}3": "disk"}
    model = values.model(device_map=places, offload_folder=str(tmp_path))
    with torch.no_grad():
        inputs = values.inputs("single")
        assert difference(model(**inputs).logits, values("single/logits"), inputs) < TOLERANCE


# -- the published sizes, without their weights ---


METHODS = {"lora": Lora, "p_tuning": PTuning, "freeze": Freeze}


def share_of_trained(finetuning: str, **values: Any) -> float:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ChatGLMConfig())
    family = family_named("chatglm")
    method = METHODS[finetuning](finetuning_type=finetuning, **values)
    method = method.resolved(family, 28)
    model = method.attach(model, family)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 100 * trained / sum(parameter.numel() for parameter in model.parameters())


# -- checkpoints --------------------------------------------------------------------------------------------------------


def write_quantized(values: Golden, folder: Path, bits: int, unsafe: bool = False) -> dict[str, torch.Tensor]:
    """A pre-quantized checkpoint of the golden's weights; returns what its matrices mean, in fp32."""
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for key, weight in load_file(values.folder / "model.safetensors").items():
        stored[key] = weight.half()
        meant[key] = weight.half().float()
        if key.endswith(".weight") and key.split(".")[-2] in QUANTIZED[:4]:
            scale = (weight.float().abs().amax(1) / (2 ** (bits - 1) - 1)).half()
            integers = (weight.float() / scale.float()[:, None]).round().to(torch.int8)
            meant[key] = integers.float() * scale.float()[:, None]
            if bits == 4:
                integers = torch.bitwise_left_shift(integers[:, ::2], 4) | (integers[:, 1::2] & 15)
            stored |= {key: integers, f"{key}_scale": scale}
    config = json.loads((values.folder / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    config |= {"quantization_bit": bits, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if unsafe:
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def test_packing_is_the_published_one(golden_folder):
    values = load_file(golden_folder / "quant/quant_golden.safetensors")
    assert torch.equal(unpacked(values["int4_packed"], 4), values["int4_unpacked"])
    assert torch.equal(dequantized(values["int4_packed"], values["int4_scale"], 4), values["int4_dequant"])
    assert torch.equal(dequantized(values["int8_unpacked"], values["int8_scale"], 8), values["int8_dequant"])


@both
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pre_quantized_checkpoints_are_dequantized_as_they_load(golden, tmp_path, name, bits, dtype):
    meant = write_quantized(golden(name), tmp_path, bits, unsafe=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    state = model.state_dict()
    # the published kernels multiply in fp16
    exact = {key: value if dtype == torch.float32 else value.half() for key, value in meant.items()}
    assert all(torch.equal(state[key], exact[key].to(dtype)) for key in state)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    assert again.config.quantization_bit is None
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_quantized_checkpoints_can_be_quantized_again(golden, tmp_path, name, dtype):
    write_quantized(golden(name), tmp_path, 4)
    inputs = golden(name).inputs("single")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(**inputs).logits
        eight = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, quantization_config=eight, device_map={"": "cpu"}
        ).eval()
        found = model(**inputs).logits.float()
    assert "Linear8bitLt" in {type(module).__name__ for module in model.modules()}
    assert {value.dtype for value in model.parameters() if value.is_floating_point()} == {dtype}
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.1


@both
@pytest.mark.parametrize("layout", ["shards", "bin", "bin shards"])
def test_checkpoints_in_shards_and_bin_files(golden, tmp_path, name, layout):
    values = golden(name)
    weights = load_file(values.folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((values.folder / "config.json").read_bytes())
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    if layout == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        stem, end = ("model", "safetensors") if layout == "shards" else ("pytorch_model", "bin")
        index = {}
        for place, part in enumerate(halves):
            file = f"{stem}-{place + 1:05}-of-00002.{end}"
            index |= dict.fromkeys(part, file)
            if end == "bin":
                torch.save(part, tmp_path / file)
            else:
                save_file(part, tmp_path / file, metadata={"format": "pt"})
        (tmp_path / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = values.inputs("single")
    with torch.no_grad():
        assert difference(model(**inputs).logits, values("single/logits"), inputs) < TOLERANCE


@both
def test_both_layouts_load_again_to_the_same_logits(golden, tmp_path, name):
    from glmtuner.models.save import save_model

    values = golden(name)
    model, inputs = values.model(), values.inputs("single")
    wanted = model(**inputs).logits
    for layout in ("published", "transformers"):
        save_model(model, tmp_path / layout, layout)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype=torch.float32).eval()
        assert torch.equal(again(**inputs).logits, wanted), layout
    published = load_file(tmp_path / "published/model.safetensors")
    known = values.about["_state_dict"]
    assert published.keys() <= known.keys()
    missing = {key for key in known if key not in published and "inv_freq" not in key}
    assert missing <= {"lm_head.weight"}  # tied: the published config ties it as well
    assert json.loads((tmp_path / "published/config.json").read_text())["architectures"] == ["ChatGLMModel"]
    if name == "chatglm2":
        assert type(again) is GlmForCausalLM
    assert type(model) in (ChatGLMForConditionalGeneration, ChatGLM2ForConditionalGeneration)


def test_as_glm_generates_the_same(golden):
    values = golden("chatglm2")
    model = as_glm(values.model())
    case = "generate_batch_left_padded"
    inputs, wanted = values.inputs(case), values(f"{case}/output_ids")
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("finetuning", "values", "percent"),
    [
        ("lora", {"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1, "lora_target": []}, 0.06),
        ("p_tuning", {"pre_seq_len": 16}, 0.06),
        ("freeze", {"num_layer_trainable": 2, "name_module_trainable": LayerPart.mlp}, 4.35),
    ],
)
def test_shares_of_trained_parameters_are_those_of_the_published_table(finetuning, values, percent):
    assert round(share_of_trained(finetuning, **values), 2) == percent
