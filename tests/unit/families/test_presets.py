"""Every model preset names a family, a template and targets that its model has, as transformers and ../shared have them."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from family_models import CONFIGS, built
from official_templates import official
from torch import nn

from glmtuner.config.compose import compose
from glmtuner.config.paths import conf_dir
from glmtuner.errors import ConfigError
from glmtuner.families import FAMILIES
from glmtuner.families.experts import expert_names
from glmtuner.families.family import Family, families_that_fit, family_of
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.lora import Lora
from glmtuner.launch.libraries import quieten_libraries
from glmtuner.launch.register import register_presets
from glmtuner.templates.base import OWN, TEMPLATES
from glmtuner.templates.named import template_named  # noqa: F401  (fills TEMPLATES)

register_presets()

ROOT = Path(__file__).parents[3]
PRESETS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((conf_dir() / "model").glob("*.yaml"))
    if path.stem != "causal_lm"
}
# The hub ids as the makers' pages and two other tools have them, and the model_type of each one's config.json.
HUB = {
    "chatglm_6b": ("THUDM/chatglm-6b", "chatglm"),
    "chatglm2_6b": ("zai-org/chatglm2-6b", "chatglm"),
    "chatglm2_6b_32k": ("zai-org/chatglm2-6b-32k", "chatglm"),
    "chatglm3_6b": ("zai-org/chatglm3-6b", "chatglm"),
    "chatglm3_6b_base": ("zai-org/chatglm3-6b-base", "chatglm"),
    "chatglm3_6b_32k": ("zai-org/chatglm3-6b-32k", "chatglm"),
    "chatglm3_6b_128k": ("zai-org/chatglm3-6b-128k", "chatglm"),
    "glm4_9b_chat": ("zai-org/glm-4-9b-chat", "chatglm"),
    "glm4_9b_chat_1m": ("zai-org/glm-4-9b-chat-1m", "chatglm"),
    "codegeex4_9b": ("zai-org/codegeex4-all-9b", "chatglm"),
    "glm4_9b_chat_hf": ("zai-org/glm-4-9b-chat-hf", "glm"),
    "glm4_9b_chat_1m_hf": ("zai-org/glm-4-9b-chat-1m-hf", "glm"),
    "glm_edge_1_5b": ("zai-org/glm-edge-1.5b-chat", "glm"),
    "glm_edge_4b": ("zai-org/glm-edge-4b-chat", "glm"),
    "glm4_9b_0414": ("zai-org/GLM-4-9B-0414", "glm4"),
    "glm4_32b_0414": ("zai-org/GLM-4-32B-0414", "glm4"),
    "glm4_32b_base_0414": ("zai-org/GLM-4-32B-Base-0414", "glm4"),
    "glm_z1_9b_0414": ("zai-org/GLM-Z1-9B-0414", "glm4"),
    "glm_z1_32b_0414": ("zai-org/GLM-Z1-32B-0414", "glm4"),
    "glm4_5_air": ("zai-org/GLM-4.5-Air", "glm4_moe"),
    "glm4_5": ("zai-org/GLM-4.5", "glm4_moe"),
    "glm4_6": ("zai-org/GLM-4.6", "glm4_moe"),
    "glm4_7": ("zai-org/GLM-4.7", "glm4_moe"),
    "glm4_7_flash": ("zai-org/GLM-4.7-Flash", "glm4_moe_lite"),
    "glm5": ("zai-org/GLM-5", "glm_moe_dsa"),
    "glm5_1": ("zai-org/GLM-5.1", "glm_moe_dsa"),
    "glm5_2": ("zai-org/GLM-5.2", "glm_moe_dsa"),
    "tiny_glm": ("package://tiny_glm", "glm"),
}
IN_TRANSFORMERS = sorted({model_type for _, model_type in HUB.values()} - {"chatglm"})


def config_json(model_type: str) -> dict[str, Any]:
    """What transformers writes for the model type's defaults, which are those of a published model."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))


@pytest.fixture(scope="module", params=IN_TRANSFORMERS)
def model(request: pytest.FixtureRequest) -> Any:
    return built(request.param)


def families_of(model_type: str) -> list[Family]:
    return [family for family in FAMILIES.values() if model_type in family.model_types]


def linears_in(family: Family, model: nn.Module) -> set[str]:
    """The names of the linear layers in all blocks, by their paths inside a block."""
    return {
        path
        for block in family.blocks(model)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_the_table_has_every_preset() -> None:
    assert PRESETS.keys() == HUB.keys()
    assert sorted(CONFIGS) == IN_TRANSFORMERS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_the_model_as_its_maker_does_and_a_family_that_fits(preset: str) -> None:
    composed = compose([f"model={preset}"])
    name, model_type = HUB[preset]
    assert composed.run.model.model_name_or_path == name
    family = FAMILIES[composed.run.model.family]
    assert model_type in family.model_types
    assert family.template == OWN or family.template in TEMPLATES
    assert list(family.attention) == composed.run.finetuning.lora_target
    if model_type != "chatglm":
        assert family_of(config_json(model_type), family.name) is family


@pytest.mark.parametrize(
    ("preset", "config", "fitting"),
    [
        ("chatglm_6b", {"vocab_size": 130528}, {"chatglm"}),
        ("chatglm2_6b_32k", {"padded_vocab_size": 65024, "rope_ratio": 50}, {"chatglm2", "chatglm3"}),
        ("chatglm3_6b_128k", {"padded_vocab_size": 65024, "rope_ratio": 500}, {"chatglm2", "chatglm3"}),
        ("glm4_9b_chat_1m", {"padded_vocab_size": 151552, "rope_ratio": 10000}, {"glm4_original", "codegeex4"}),
        ("codegeex4_9b", {"padded_vocab_size": 151552, "rope_ratio": 500}, {"glm4_original", "codegeex4"}),
    ],
)
def test_families_of_the_first_release_by_their_config(preset: str, config: dict, fitting: set[str]) -> None:
    config = {"model_type": "chatglm", **config}
    assert {family.name for family in families_that_fit(config)} == fitting
    declared = PRESETS[preset]["family"]
    assert family_of(config, declared) is FAMILIES[declared]


@pytest.mark.parametrize("model_type", IN_TRANSFORMERS)
def test_a_config_of_transformers_is_recognised(model_type: str) -> None:
    """Without a declared family, too: the first of those that fit."""
    family = family_of(config_json(model_type), "auto")
    assert family is not None and family.name == model_type
    assert families_of(model_type)[0] is family


def test_latent_attention_without_latent_queries_is_another_model() -> None:
    """Its query projection is one layer, which the family does not name, so the structure decides."""
    config = {**config_json("glm4_moe_lite"), "q_lora_rank": None}
    assert family_of(config, "glm4_moe_lite") is None


def test_a_family_names_the_linear_layers_of_its_blocks(model: Any) -> None:
    """All of them but the indexer's, which get no gradient."""
    for family in families_of(model.config.model_type):
        paths = linears_in(family, model)
        left_out = {path for path in paths if "indexer" in path}
        assert {path.rpartition(".")[2] for path in paths - left_out} == {*family.linears}
        named = {path.rpartition(".")[2] for path in paths}
        assert {*family.experts} - named == {*expert_names(model)}  # nothing in a dense model
        assert len(family.blocks(model)) == 2
        for block in family.blocks(model):
            attention = block.get_submodule(family.attention_block)
            assert {name for name, module in attention.named_children() if isinstance(module, nn.Linear)} >= {
                *family.attention
            }
            assert block.get_submodule(family.mlp)


def test_the_structure_gives_the_same_attention(model: Any) -> None:
    family, inferred = families_of(model.config.model_type)[0], family_from_structure(model)
    assert {*inferred.attention} == {*family.attention}
    assert (inferred.layers, inferred.attention_block, inferred.mlp) == (
        family.layers,
        family.attention_block,
        family.mlp,
    )


@pytest.mark.parametrize("target", [[], ["all"]])
def test_default_lora_targets_are_trained_and_the_router_is_not(model: Any, target: list[str]) -> None:
    import torch

    family = families_of(model.config.model_type)[0]
    method = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.1, lora_target=target)
    adapted = method.resolved(family, 2).attach(built(model.config.model_type), family)
    ids = torch.arange(2, 26).view(2, 12)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    named = {re.sub(r".*\.(\w+)\.lora_[AB].*", r"\1", name) for name in trained}
    experts = {"experts", "base_layer"} if target and family.experts else set()  # one inside of the other
    assert named == {*(family.linears if target else family.attention)} | experts
    assert all(each.grad is not None for each in trained.values())
    # B is zero at the start, so only it has a gradient that is not
    assert all(each.grad.abs().max() > 0 for name, each in trained.items() if "lora_B" in name)
    assert not any("gate." in name or "indexer" in name for name in trained)
    if target and family.experts:  # the dense MLP of the first block, and the shared expert of the second
        assert {name.split(".mlp.")[1].split(".lora")[0] for name in trained if ".mlp." in name} == {
            *("gate_proj", "up_proj", "down_proj", "experts", "experts.base_layer"),
            *("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
        }


MOE = [family.name for family in FAMILIES.values() if family.experts]


@pytest.mark.parametrize("name", MOE)
def test_routed_experts_are_adapted_where_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both of their parameters, and no router, without dropout, which is said; half of a fused parameter is refused."""
    family = FAMILIES[name]

    def method(target: list[str], dropout: float = 0.0) -> Lora:
        lora = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=dropout, lora_target=target)
        return lora.resolved(family, 2)

    adapted = method(["down_proj", "o_proj"], 0.1).attach(built(family.model_types[0]), family)
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "finetuning.lora_dropout=0.1 holds for the 2 other layers: routed experts are adapted without dropout" in told
    )
    assert adapted.peft_config["default"].lora_dropout == 0
    assert {each.p for each in adapted.modules() if isinstance(each, nn.Dropout)} >= {0.1}
    with pytest.raises(
        ConfigError, match=r"'gate_prj'; did you mean 'gate_proj'\? .*down_proj select the routed experts"
    ):
        method(["gate_prj"])
    with pytest.raises(ConfigError, match=r"lora_target=\[gate_proj\]: .*without also targeting up_proj"):
        method(["gate_proj"]).attach(built(family.model_types[0]), family)
    adapted = method(["gate_proj", "up_proj", "down_proj"]).attach(built(family.model_types[0]), family)
    trained = {name: each.shape for name, each in adapted.named_parameters() if each.requires_grad}
    # 4 experts with rank 2 in the second block; gate and up projection, one parameter, have rank 2 each
    experts = "base_model.model.model.layers.1.mlp.experts."
    assert {name.removeprefix(experts): tuple(shape) for name, shape in trained.items()} == {
        "base_layer.lora_A.default.weight": (16, 32),
        "base_layer.lora_B.default.weight": (32, 16),
        "lora_A.default.weight": (8, 16),
        "lora_B.default.weight": (32, 8),
    }


def test_experts_that_are_adapted_are_not_called_ignored() -> None:
    """As PEFT does, which looks for its own pattern of them among the modules."""
    family = FAMILIES["glm4_moe"]
    lora = Lora(
        finetuning_type="lora",
        lora_rank=2,
        lora_alpha=4,
        lora_dropout=0.0,
        lora_target=["gate_proj", "up_proj", "down_proj"],
    )
    with warnings.catch_warnings(record=True) as shown:
        quieten_libraries()
        lora.resolved(family, 2).attach(built("glm4_moe"), family)
    assert not [each.message for each in shown if issubclass(each.category, RuntimeWarning)]


SHARED = {f"1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize(
    "pattern, expected",
    [
        (
            r".*\.(gate|up|down)_proj",
            {
                *(f"0.mlp.{name}_proj" for name in ("gate", "up", "down")),
                "1.mlp.experts",
                "1.mlp.experts.base_layer",
                *SHARED,
            },
        ),
        (r".*\.shared_experts\.(gate|up|down)_proj", SHARED),
        (r".*layers\.1\..*(experts\.gate_up_proj|o_proj)", {"1.mlp.experts", "1.self_attn.o_proj"}),
        (r".*\.gate|.*0\.self_attn\.o_proj", {"1.mlp.gate", "0.self_attn.o_proj"}),
    ],
)
def test_a_regular_expression_adapts_what_it_matches(name: str, pattern: str, expected: set[str]) -> None:
    """And nothing else, although PEFT reads some names as experts; with dropout, which experts do not have."""
    family = FAMILIES[name]
    method = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.1, lora_target=[pattern])
    adapted = method.resolved(family, 2).attach(built(family.model_types[0]), family)
    found = {path.split(".lora_")[0] for path, each in adapted.named_parameters() if each.requires_grad}
    assert {path.removeprefix("base_model.model.model.layers.") for path in found} == expected


def test_stops_are_the_role_tokens_that_end_an_answer() -> None:
    roles = {"<|endoftext|>", "<|user|>", "<|observation|>"}
    for family in FAMILIES.values():
        if family.model_types != ("chatglm",):
            assert {*family.stop_tokens} == roles
    assert {*FAMILIES["codegeex4"].stop_tokens} == {*roles, "<|assistant|>"}


# The templates of ../shared that come with a preset's model, by whose tokenizer they are used.
OFFICIAL = {
    "glm_z1_9b_0414": "glm-z1-9b-0414",
    "glm4_5_air": "glm-4.5",
    "glm4_5": "glm-4.5",
    "glm4_6": "glm-4.6",
    "glm4_7": "glm-4.7",
    "glm4_7_flash": "glm-4.7-flash",
    "glm5": "glm-5",
    "glm5_1": "glm-5.1",
    "glm5_2": "glm-5.2",
}


def test_models_that_publish_a_template_use_it(shared: Path | None) -> None:
    """Its answers end at a stop of the family: no official template of GLM writes anything else behind them."""
    for preset in OFFICIAL:
        assert FAMILIES[PRESETS[preset]["family"]].template == OWN
    for preset, name in OFFICIAL.items():
        source = official(shared, name).source
        assert {"<|user|>", "<|observation|>"} <= {*re.findall(r"<\|\w+\|>", source)} <= {
            "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
            "<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>",
        }, preset  # fmt: skip


def test_the_page_of_models_lists_every_preset() -> None:
    """With the sizes and contexts that its file says in words."""
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = {
        match[1]: line for line in page.splitlines() if (match := re.match(r"\| `(\w+)`(?: \(default\))? \|", line))
    }
    assert PRESETS.keys() <= rows.keys()
    num_facts = 0
    for preset, values in PRESETS.items():
        family = FAMILIES[values["family"]]
        assert values["model_name_or_path"] in rows[preset] or preset == "tiny_glm"
        assert f"`{family.name}`" in rows[preset] and f"`{family.template}`" in rows[preset], preset
        said = (conf_dir() / f"model/{preset}.yaml").read_text(encoding="utf-8")
        facts = re.findall(r"\d+[kM](?= context)|\d+B(?= parameters)|\d+B active", said)
        assert all(re.search(rf"\b{fact}\b", rows[preset]) for fact in facts), preset
        num_facts += len(facts)
    assert num_facts > len(PRESETS) / 2
