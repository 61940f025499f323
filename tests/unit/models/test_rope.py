"""`model.rope_scaling`: what models compute with it, against plain transformers reading the same parameters from config.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

from glmtuner.config.compose import compose
from glmtuner.config.rope import FIELDS, TYPES
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.models.load import load_config, load_model
from glmtuner.models.save import save_model

register_presets()

LENGTH = 32  # of the pretrained positions
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GIVEN: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn with its own fields": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25,
        "rope_theta": 500.0,
    },
    "longrope": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip
# the length that the type scales to, which config.json has beside the parameters
EXTENDED = {"dynamic": LENGTH, "yarn with its own fields": 4 * 16} | dict.fromkeys(
    ("linear", "yarn", "longrope", "llama3"), 4 * LENGTH
)
IDS = torch.arange(3, 3 + 3 * LENGTH)[None] % 290 + 3


def base(name: str, folder: Path) -> Path:
    """A folder with a model of random weights, in transformers' own layout."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def parameters_of(name: str, kind: str) -> dict[str, Any]:
    """The parameters of GIVEN for a model: longrope has a factor for each pair of rotated dimensions, half as many in Glm4."""
    given = dict(GIVEN[kind])
    for own in ("short_factor", "long_factor"):
        if own in given:
            given[own] = [given[own][0] * (1 + number / 2) for number in range(2 if name == "Glm4" else 4)]
    return given


def plain(folder: Path, to: Path, given: dict[str, Any], length: int) -> torch.Tensor:
    """The logits of transformers alone, which reads the parameters from config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    kept = {key: value for key, value in config["rope_parameters"].items() if key != "rope_type"}
    config["rope_parameters"] = kept | given
    if given["rope_type"] in ("yarn", "longrope", "llama3"):
        config["rope_parameters"].setdefault("original_max_position_embeddings", LENGTH)
    config["max_position_embeddings"] = length
    (to / "config.json").write_text(json.dumps(config))
    return logits(AutoModelForCausalLM.from_pretrained(to))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def run_of(folder: Path, given: dict[str, Any] | None) -> Any:
    words = ["model=causal_lm", f"model.model_name_or_path={folder}"]
    return compose([*words, f"model.rope_scaling={typed(given)}"] if given else words).run


def typed(given: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"


def loaded(folder: Path, given: dict[str, Any] | None) -> Any:
    run = run_of(folder, given)
    return load_model(run.model, None, run.quant, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Glm4"])
def test_the_logits_are_those_of_transformers_with_the_same_parameters(tmp_path, capsys, name, kind):
    folder, given = base(name, tmp_path / "base"), parameters_of(name, kind)
    expected = plain(folder, tmp_path / "plain", given, EXTENDED[kind])
    model = loaded(folder, given)
    assert torch.equal(logits(model), expected)
    assert model.config.max_position_embeddings == EXTENDED[kind]
    line = capsys.readouterr().out
    assert f"rope_type': '{given['rope_type']}'" in line and f"max_position_embeddings={EXTENDED[kind]}" in line
    # other positions than the pretrained ones, or the comparison would say nothing
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-3

    # what is saved is such a model without glmtuner, and with it once more
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(loaded(tmp_path / "saved", given)), expected)
    assert again.config.max_position_embeddings == EXTENDED[kind]
    assert torch.equal(logits(loaded(tmp_path / "saved", None)), expected)


def test_linear_scaling_divides_positions(tmp_path):
    """Position p of the scaled model is position p / 2 of the pretrained one: only a rotary module is asked, by hand."""
    folder = base("Llama", tmp_path / "base")
    rotary = loaded(folder, {"rope_type": "linear", "factor": 2.0}).model.rotary_emb
    cos, _ = rotary(torch.zeros(1), torch.tensor([[6]]))
    by_hand = torch.cos(3 * 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(cos[0, 0], torch.cat([by_hand, by_hand]))


def test_without_it_nothing_is_changed(tmp_path):
    folder = base("Qwen3", tmp_path / "base")
    assert run_of(folder, None).model.rope_scaling is None
    config = load_config(run_of(folder, None).model, None)
    assert config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_chatglm2_and_3_compute_as_transformers_glm(tmp_path, capsys, family, kind):
    """ChatGLM2 is saved in its published layout and as transformers' Glm; the second is plain transformers."""
    from glmtuner.families.family import FAMILIES
    from glmtuner.models.configuration_chatglm import ChatGLM2Config
    from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration

    torch.manual_seed(0)
    config = ChatGLM2Config(
        padded_vocab_size=400, hidden_size=32, num_layers=2, num_attention_heads=4, kv_channels=8, ffn_hidden_size=64,
        multi_query_group_num=2, seq_length=LENGTH, rope_ratio=2.0 if family == "chatglm3" else 1.0,
    )  # fmt: skip
    model = ChatGLM2ForConditionalGeneration(config)
    save_model(model, tmp_path / "base", "published")
    save_model(model, tmp_path / "glm", "transformers")
    expected = plain(tmp_path / "glm", tmp_path / "plain", GIVEN[kind], EXTENDED[kind])

    run = compose(
        ["model=causal_lm", f"model.model_name_or_path={tmp_path / 'base'}", f"model.family={family}",
         f"model.rope_scaling={typed(GIVEN[kind])}"]
    ).run  # fmt: skip
    ours = load_model(run.model, FAMILIES[family], run.quant, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(logits(ours), expected)
    for layout in ("published", "transformers"):
        capsys.readouterr()
        save_model(ours, tmp_path / layout, layout)
        # ChatGLM2's rope_ratio can say linear
        is_told = layout == "published" and not (family == "chatglm2" and kind == "linear")
        assert ("unknown to ChatGLM's own code" in capsys.readouterr().out) == is_told
        again = AutoModelForCausalLM.from_pretrained(tmp_path / layout)
        torch.testing.assert_close(logits(again), expected)
        assert again.config.max_position_embeddings == EXTENDED[kind]


# -- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        ("yarn", r"model\.rope_scaling=yarn: expected a dictionary.*type 'model\.rope_scaling=\{rope_type: yarn, factor: 4\.0\}'"),
        ("{}", "expected a dictionary"),
        ("{factor: 2.0}", "rope_type is missing, one of linear, dynamic, yarn, longrope, llama3; type"),
        ("{rope_type: yran, factor: 2.0}", "no rope_type 'yran'; did you mean 'yarn'"),
        ("{rope_type: yarn, facter: 2.0}", "no field 'facter'; did you mean 'factor'"),
    ],
)  # fmt: skip
def test_names_are_checked_before_anything_is_loaded(value, facts):
    with pytest.raises(ConfigError, match=facts):
        compose(["model=tiny_glm", f"model.rope_scaling={value}"])


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"rope_type": "yarn"}, "Missing required keys.*'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor field must be a float or int >= 1, got 0.5"),
        ({"rope_type": "linear", "factor": "wide"}, "factor field must be a float or int >= 1, got wide"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "Unrecognized keys.*beta_fast"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "greater than low_freq"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}, "must have length 4, got 1"),
    ],
)  # fmt: skip
def test_values_are_judged_by_transformers(tmp_path, given, facts):
    folder = base("Llama", tmp_path / "base")
    with pytest.raises(ConfigError, match=facts) as raised:
        loaded(folder, given)
    assert "model.rope_scaling={rope_type: " in str(raised.value) and "\n" not in str(raised.value)


def test_models_without_such_positions_are_refused(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="model_type=gpt2 has no rotary positions that transformers scales"):
        loaded(tmp_path / "gpt2", GIVEN["yarn"])
    chatglm = {"model_type": "chatglm", "vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    (tmp_path / "chatglm").mkdir()
    (tmp_path / "chatglm" / "config.json").write_text(json.dumps(chatglm))
    run = run_of(tmp_path / "chatglm", GIVEN["linear"])
    with pytest.raises(ConfigError, match="model_type=chatglm has no rotary positions that transformers scales"):
        load_config(run.model, None)


def test_layers_with_positions_of_their_own_are_named(tmp_path):
    config = transformers.Gemma3TextConfig(
        **SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=8, query_pre_attn_scalar=8
    )
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"positions of its own for each of .*full_attention.*type 'model\.rope_scaling="
    ):
        loaded(tmp_path / "base", GIVEN["yarn"])
    with pytest.raises(ConfigError, match="no type of layer 'full_atention'; did you mean 'full_attention'"):
        loaded(tmp_path / "base", {"full_atention": typed(GIVEN["yarn"])})

    scaled = loaded(tmp_path / "base", {"full_attention": typed(GIVEN["linear"])})
    shutil.copytree(tmp_path / "base", tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    written = json.loads(path.read_text())
    written["rope_parameters"]["full_attention"] |= GIVEN["linear"]
    path.write_text(json.dumps(written))
    assert torch.equal(logits(scaled), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")))


def test_types_and_fields_are_those_of_transformers():
    annotated = transformers.modeling_rope_utils.RopeParameters.__annotations__
    assert set(FIELDS) == annotated.keys() - {"mrope_section"}  # a model's own, which is kept
    assert all(hasattr(RotaryEmbeddingConfigMixin, f"_validate_{kind}_rope_parameters") for kind in TYPES)
    assert {*TYPES} <= transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.keys()
    assert issubclass(PreTrainedConfig, RotaryEmbeddingConfigMixin)
