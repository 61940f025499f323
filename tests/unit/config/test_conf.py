"""Every preset composes, keeps no default that its class has already, and says what the specification says."""

import dataclasses
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from glmtuner.config.compose import compose
from glmtuner.config.groups import (
    SCHEMA_CLASSES,
    AskedThinking,
    Dtype,
    Engine,
    LayerPart,
    LossOn,
    QuantizationType,
    Thinking,
)
from glmtuner.config.paths import PACKAGE_DATA, conf_dir
from glmtuner.config.schema import classes_of, groups
from glmtuner.data import find
from glmtuner.errors import ConfigError
from glmtuner.finetuning.lora import Bias
from glmtuner.launch.register import register_presets
from glmtuner.sweep import launchers
from glmtuner.sweep.search_pruners import pruner_of
from glmtuner.sweep.search_samplers import sampler_class

register_presets()

CONF = conf_dir()
PRESETS = [
    path
    for path in sorted(CONF.rglob("*.yaml"))
    if path.relative_to(CONF).parts[0] not in ("dataset", "hydra") and path != CONF / "config.yaml"
]
HYDRA = sorted((CONF / "hydra").rglob("*.yaml"))
DATASETS = sorted((CONF / "dataset").glob("*.yaml"))
COMPANY = {  # what a preset needs beside itself
    "trainer=benchmark": ["benchmark=ceval"],
    "model=causal_lm": ["model.model_name_or_path=x"],
    "finetuning=none": ["trainer=evaluate"],
    "finetuning=peft": ["finetuning.peft_type=OFT"],
    "stage=ppo": ["model.reward_model=x"],
    "stage=grpo": ["reward=number"],
    **{f"reward={name}": ["stage=grpo"] for name in ("exact", "number", "format", "length")},
    "reward=model": ["stage=grpo", "model.reward_model=x"],
    "experiment=rlhf_rm": ["model.checkpoint_dir=[]"],  # step 1 makes it
    "experiment=rlhf_ppo": ["model.checkpoint_dir=[]"],
}


LORA_PRESETS = ("dora", "rslora", "pissa", "qlora")


def word_of(path: Path) -> str:
    group, *name = path.relative_to(CONF).with_suffix("").parts
    return f"{group}={'/'.join(name)}"


@pytest.fixture(scope="module")
def default():
    return compose([])


def test_presets_and_datasets_were_found():
    assert len(PRESETS) > 20 and len(DATASETS) > 50
    without_presets = {"benchmark"}  # its values are the names of another package's tasks
    assert {path.relative_to(CONF).parts[0] for path in PRESETS} >= {*groups(), "experiment"} - without_presets
    assert not list(CONF.rglob("*.yml"))


@pytest.mark.parametrize("path", PRESETS, ids=word_of)
def test_preset_composes(path):
    word = word_of(path)
    composed = compose([word, *COMPANY.get(word, [])])
    group, _, name = word.partition("=")
    if group == "reward":  # of which there are several
        assert {each: type(reward) for each, reward in composed.run.reward.items()} == {
            name: SCHEMA_CLASSES[group][name]
        }
        return
    assert name in (group, "default", composed.hydra.runtime.choices[group])
    if group in SCHEMA_CLASSES and name in SCHEMA_CLASSES[group]:
        assert type(getattr(composed.run, group)) is SCHEMA_CLASSES[group][name]
    elif group == "finetuning":
        assert type(composed.run.finetuning) is SCHEMA_CLASSES[group]["lora"] and name in LORA_PRESETS


@pytest.mark.parametrize("path", HYDRA, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_preset_of_hydra_composes(path):
    """A launcher or a sweeper keeps what its preset says, and has a class that exists."""
    launchers.register()
    group = path.parent.relative_to(CONF).as_posix()
    words = [f"{group}={path.stem}", "objective=eval_loss", "name=test"]
    if group in ("hydra/sweeper/sampler", "hydra/sweeper/pruner"):
        words.append("hydra/sweeper=optuna")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", words, return_hydra_config=True)
    resolved = OmegaConf.to_container(OmegaConf.select(composed, group.replace("/", ".")), resolve=False)
    name = resolved["_target_"].rsplit(".", 1)[1]
    ours = ("SlurmLauncher", "JoblibLauncher", "SharedLauncher", "OptunaSweeper", "RaceSweeper", "RayLauncher")
    if group == "hydra/sweeper/pruner":
        assert type(pruner_of(resolved)).__name__ == name
    else:
        assert name in ours or sampler_class(resolved).__name__ == name
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {*written} - {"defaults", "_self_"} <= {*resolved}


@pytest.mark.parametrize("method", ["full", "freeze"])
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_methods_that_change_the_base_refuse_a_quantized_one(method, quant):
    with pytest.raises(ConfigError, match=rf"quant={quant} .* finetuning={method} .*; type finetuning=lora, or quant="):
        compose([f"finetuning={method}", f"quant={quant}"])
    compose([f"finetuning={method}", f"quant={quant}", "trainer=evaluate"])


def class_of(path: Path) -> type:
    group, name = path.relative_to(CONF).with_suffix("").parts
    group = "trainer" if group == "kernels" else group  # whose keys it sets
    owners = classes_of(group)
    return owners.get("lora" if name in LORA_PRESETS else name) or owners[group]


def default_values(cls: type) -> dict[str, object]:
    """Name -> default, enums as their words."""
    found = {}
    for declared in dataclasses.fields(cls):
        if declared.default_factory is not dataclasses.MISSING:
            found[declared.name] = declared.default_factory()
        elif declared.default is not dataclasses.MISSING:
            found[declared.name] = declared.default.value if isinstance(declared.default, Enum) else declared.default
    return found


def repeated(values: dict[str, object], cls: type) -> list[str]:
    defaults = default_values(cls)
    values = values.get("finetuning", values)  # of a preset that sets keys of two groups
    return [key for key, value in values.items() if key in defaults and value == defaults[key]]


@pytest.mark.parametrize(
    "path", [path for path in PRESETS if path.relative_to(CONF).parts[0] != "experiment"], ids=word_of
)
def test_preset_repeats_no_default(path):
    assert repeated(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, class_of(path)) == []


def test_experiments_repeat_no_default_either():
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        for group, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if isinstance(values, dict):
                classes = classes_of(group).values()
                assert not any(repeated(values, cls) for cls in classes), f"{path.name}: {group}"


def test_a_repeated_default_is_noticed():
    data = classes_of("data")["data"]
    assert repeated({"split": "train", "dev_ratio": 0.1, "loss_on": "every_answer"}, data) == ["split", "loss_on"]


# The specification's tables: key, type, default with nothing typed. Where a preset must be chosen first, it stands in
# front of the key's own table.
MODEL = {
    "model_name_or_path": (str, "THUDM/chatglm-6b"),
    "config_name": (str | None, None),
    "tokenizer_name": (str | None, None),
    "cache_dir": (str | None, None),
    "use_fast_tokenizer": (bool, True),
    "model_revision": (str, "main"),
    "use_auth_token": (bool, False),
    "checkpoint_dir": (list[str], []),
    "reward_model": (str | None, None),
    "resume_lora_training": (bool, True),
    "plot_loss": (bool, False),
    "family": (str, "chatglm"),
    "template": (str | None, None),
    "dtype": (Dtype, "auto"),
    "rope_scaling": (Any, None),
    "use_modelscope": (bool, False),
}
QUANT = {
    "quantization_bit": (int | None, None),
    "quantization_type": (QuantizationType, "nf4"),
    "double_quantization": (bool, True),
}
DATA = {
    "dataset": (list[str], ["alpaca_zh"]),
    "dataset_dir": (str, "data"),
    "split": (str, "train"),
    "overwrite_cache": (bool, False),
    "preprocessing_num_workers": (int | None, None),
    "max_source_length": (int, 512),
    "max_target_length": (int, 512),
    "max_samples": (int | None, None),
    "eval_num_beams": (int | None, None),
    "ignore_pad_token_for_loss": (bool, True),
    "source_prefix": (str | None, None),
    "input_separator": (str, "\n"),
    "ignore_columns": (list[str], []),
    "dev_ratio": (float, 0.0),
    "eval_dataset": (list[str], []),
    "mix_probabilities": (list[float], []),
    "weights": (list[float], []),
    "new_tokens": (list[str], []),
    "loss_on": (LossOn, "every_answer"),
    "packing": (bool, False),
    "padding_free": (bool, True),
    "max_bad_records": (int, 0),
    "tiktoken_engine": (bool, True),
    "thinking": (Thinking, "auto"),
    "use_modelscope": (bool, False),
}
LORA = {
    "finetuning_type": (str, "lora"),
    "lora_rank": (int, 8),
    "lora_alpha": (float, 32.0),
    "lora_dropout": (float, 0.1),
    "lora_target": (list[str], ["query_key_value"]),
    "loraplus_lr_ratio": (float | None, None),
    "loraplus_lr_embedding": (float, 1e-6),
    "use_rslora": (bool, False),
    "use_dora": (bool, False),
    "init_lora_weights": (bool | str, True),
    "rank_pattern": (dict[str, int], {}),
    "alpha_pattern": (dict[str, float], {}),
    "exclude_modules": (list[str], []),
    "layers_to_transform": (list[int], []),
    "layers_pattern": (list[str], []),
    "lora_bias": (bool, False),
    "bias": (Bias, "none"),
    "modules_to_save": (list[str], []),
    "trainable_token_indices": (list[int], []),
    "target_parameters": (list[str], []),
    "eva_rho": (float, 2.0),
    "eva_tau": (float, 0.99),
    "eva_use_label_mask": (bool, True),
    "eva_whiten": (bool, False),
    "eva_adjust_scaling_factors": (bool, True),
    "eva_batch_size": (int, 4),
    "eva_max_batches": (int, 1000),
}
FREEZE = {
    "finetuning_type": (str, "freeze"),
    "num_layer_trainable": (int, 3),
    "name_module_trainable": (LayerPart, "mlp"),
}
P_TUNING = {
    "finetuning_type": (str, "p_tuning"),
    "pre_seq_len": (int, 64),
    "prefix_projection": (bool, False),
}
GENERATION = {
    "do_sample": (bool, True),
    "temperature": (float, 0.95),
    "top_p": (float, 0.7),
    "top_k": (int, 50),
    "num_beams": (int, 1),
    "max_length": (int, 2048),
    "max_new_tokens": (int | None, None),
    "repetition_penalty": (float, 1.0),
    "max_batch_size": (int | None, None),
    "engine": (Engine, "transformers"),
    "thinking": (AskedThinking, "auto"),
}
TRAINER = {  # those that CET's page lists
    "output_dir": (str | None, None),
    "overwrite_output_dir": (bool, False),
    "do_train": (bool, True),
    "do_eval": (bool, False),
    "do_predict": (bool, False),
    "per_device_train_batch_size": (int, 8),
    "per_device_eval_batch_size": (int, 8),
    "gradient_accumulation_steps": (int, 1),
    "learning_rate": (float, 5e-5),
    "weight_decay": (float, 0.0),
    "max_grad_norm": (float, 1.0),
    "num_train_epochs": (float, 3.0),
    "logging_steps": (float, 500),
    "save_steps": (float, 500),
    "no_cuda": (bool, False),
    "fp16": (bool, False),
    "predict_with_generate": (bool, False),
    "seed": (int, 42),
}
WHOLE = [  # every key of these is in the specification
    ("model", MODEL, []),
    ("quant", QUANT, []),
    ("data", DATA, []),
    ("finetuning", LORA, []),
    (
        "finetuning",
        {"finetuning_type": (str, "peft"), "peft_type": (str, "OFT"), "config": (dict[str, Any], {})},
        [
            "finetuning=peft",
            "finetuning.peft_type=OFT",
        ],
    ),
    ("finetuning", FREEZE, ["finetuning=freeze"]),
    ("finetuning", P_TUNING, ["finetuning=p_tuning"]),
    ("finetuning", {"finetuning_type": (str, "full")}, ["finetuning=full"]),
    ("finetuning", {"finetuning_type": (str, "none")}, ["finetuning=none", "trainer=evaluate"]),
    ("generation", GENERATION, []),
]


@pytest.mark.parametrize(("group", "table", "words"), WHOLE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_group_has_the_keys_types_and_defaults_of_the_specification(group, table, words):
    composed = compose(words)
    hints = typing.get_type_hints(type(getattr(composed.run, group)))
    values = OmegaConf.to_container(composed.config[group], enum_to_str=True)
    assert values == {key: default for key, (_, default) in table.items()}
    assert {key: hints[key] for key in table} == {key: kind for key, (kind, _) in table.items()}


def test_trainer_has_the_defaults_of_the_specification(default):
    hints = typing.get_type_hints(type(default.run.trainer))
    assert {key: default.config.trainer[key] for key in TRAINER} == {key: value for key, (_, value) in TRAINER.items()}
    assert {key: hints[key] for key in TRAINER} == {key: kind for key, (kind, _) in TRAINER.items()}


def test_the_root_has_name_and_objective(default):
    assert (default.run.name, default.run.objective) == (None, None)
    assert {*default.config} - {*groups()} == {"name", "objective", "plugins"}


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("quant=int8", {"quant.quantization_bit": 8}),
        ("quant=int4", {"quant.quantization_bit": 4}),
        ("trainer=evaluate", {"trainer.do_train": False, "trainer.do_eval": True}),
        (
            "trainer=predict",
            {"trainer.do_train": False, "trainer.do_predict": True, "trainer.predict_with_generate": True},
        ),
        ("generation=greedy", {"generation.do_sample": False, "generation.temperature": 1.0, "generation.top_p": 1.0}),
    ],
)
def test_a_preset_changes_what_it_is_for_and_nothing_else(default, word, changed):
    composed = compose([word])
    before, after = (
        {f"{group}.{key}": value for group in groups() for key, value in OmegaConf.to_container(config[group]).items()}
        for config in (default.config, composed.config)
    )
    assert {key: value for key, value in after.items() if value != before[key]} == changed


@pytest.mark.parametrize(
    ("group", "chosen", "presets"),
    [
        (
            "model",
            "chatglm_6b",
            "chatglm_6b chatglm2_6b chatglm2_6b_32k chatglm3_6b chatglm3_6b_32k glm4_9b_chat glm4_9b_chat_hf glm4_9b_0414 "
            "glm4_32b_0414 tiny_glm causal_lm",
        ),
        ("quant", "none", "none int8 int4"),
        ("data", "default", "default"),
        ("finetuning", "lora", "lora freeze p_tuning full none"),
        ("stage", "sft", "sft"),
        ("trainer", "train", "train evaluate predict"),
        ("metric", "rouge_bleu_zh", "rouge_bleu_zh none"),
        ("generation", "default", "default greedy"),
        ("tracker", "wandb", "wandb tensorboard none"),
        ("experiment", None, "quickstart"),
    ],
)
def test_a_group_offers_the_presets_of_the_specification(default, group, chosen, presets):
    assert default.hydra.runtime.choices[group] == chosen
    assert {path.stem for path in (CONF / group).glob("*.yaml")} >= {*presets.split()}


@pytest.mark.parametrize(
    ("model", "target"), [("chatglm2_6b", ["query_key_value"]), ("glm4_9b_0414", ["q_proj", "k_proj", "v_proj"])]
)
def test_the_resolved_config_shows_the_names_of_the_family_s_attention_projections(model, target):
    assert compose([f"model={model}"]).run.finetuning.lora_target == target


def test_an_experiment_wins_over_presets_and_the_command_line_over_the_experiment():
    assert compose(["experiment=quickstart"]).run.trainer.learning_rate == 1e-2
    typed = compose(
        ["experiment=quickstart", "trainer.learning_rate=1e-3", "model=glm4_9b_0414", "finetuning.lora_target=q_proj"]
    )
    assert (typed.run.trainer.learning_rate, typed.run.model.family) == (1e-3, "glm4")
    assert typed.run.finetuning.lora_target == ["q_proj"]


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_catalogue_entry_loads(path, tmp_path):
    spec = find(path.stem, tmp_path, [CONF / "dataset"])
    assert spec.kind == "catalogue" and spec.origin == str(path)
    assert spec.columns and spec.description
    if spec.name.endswith("_sample"):
        assert (PACKAGE_DATA / spec.file_name).is_file()
