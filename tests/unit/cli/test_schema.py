"""The schemas take every file of conf/, and refuse typos, by the packages jsonschema and OmegaConf's own composition.

Editors know draft 7 best: the same schemas are asked as ones of that draft, too.
"""

import json
import random
import string
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from referencing import Registry, Resource

from glmtuner.cli.main import main
from glmtuner.cli.schema import every_schema, merged_settings
from glmtuner.config.compose import compose
from glmtuner.config.key_meanings import key_meanings
from glmtuner.config.paths import conf_dir
from glmtuner.config.schema import legal_keys
from glmtuner.data.catalog import spec_of
from glmtuner.errors import ConfigError, DataError
from glmtuner.launch.register import register_presets

register_presets()
CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
BASE = "https://glmtuner.example/"
DRAFTS = {"draft 2020-12": (Draft202012Validator, "https://json-schema.org/draft/2020-12/schema"),
          "draft 7": (Draft7Validator, "http://json-schema.org/draft-07/schema#")}  # fmt: skip
SEED = 20261127


@pytest.fixture(scope="module")
def schemas():
    return every_schema(None, "en")


@pytest.fixture(scope="module", params=DRAFTS, ids=str)
def valid(request, schemas):
    """(name of a schema, document) -> is it valid? by the package jsonschema."""
    validator, draft = DRAFTS[request.param]
    contents = {f"{BASE}{name}.json": {**schema, "$schema": draft} for name, schema in schemas.items()}
    for schema in contents.values():
        validator.check_schema(schema)
    registry = Registry().with_resources((uri, Resource.from_contents(each)) for uri, each in contents.items())
    asked = {name: validator({"$ref": f"{BASE}{name}.json"}, registry=registry) for name in schemas}
    return lambda name, document: asked[name].is_valid(document)


def load(path):
    """As Hydra reads it."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())


def schema_of(path: Path) -> str:
    place = path.relative_to(CONF).with_suffix("").parts
    return "config" if len(place) == 1 else ".".join(place[:-1])


def test_every_file_of_conf_is_valid(valid):
    assert len(FILES) > 150
    assert [str(path) for path in FILES if not valid(schema_of(path), load(path))] == []


def test_every_entry_of_the_catalogue_is_valid_in_a_dataset_info(valid):
    entries = {path.stem: load(path) for path in FILES if schema_of(path) == "dataset"}
    assert valid("dataset_info", entries) and valid("dataset_info", {}) and not valid("dataset_info", [entries])
    assert not valid("dataset_info", {**entries, "mine": {"file_nme": "a.json"}})


def test_a_real_dataset_info_is_valid(valid, shared):
    """With entries in the form of LLaMA-Factory; each is taken by the catalogue, too."""
    if shared is None or not (file := shared / "data" / "dataset_info.json").is_file():
        pytest.skip("needs ../shared")
    entries = json.loads(file.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        spec_of(name, entry, kind="dataset_info", origin=str(file))
    assert len(entries) > 5 and valid("dataset_info", entries)


def closed_objects(document, place=()):
    """The places of mappings whose keys a schema knows; those of free ones are left out."""
    if not isinstance(document, dict) or place[-1:] in (("params",), ("additional_parameters",)):
        return
    yield place
    for key, value in document.items():
        if key != "defaults":
            yield from closed_objects(value, (*place, key))


def at(document, place):
    for key in place:
        document = document[key]
    return document


def misspelt(word, rng):
    """One edit away: a character more, fewer, another, or two in each other's place."""
    index = rng.randrange(len(word))
    letter = rng.choice(string.ascii_lowercase)
    swapped = word[:index] + word[index + 1 : index + 2] + word[index] + word[index + 2 :]
    return rng.choice([word[:index] + letter + word[index:], word[:index] + word[index + 1 :],
                       word[:index] + letter + word[index + 1 :], swapped])  # fmt: skip


LEGAL = {part for key in (*legal_keys(), *key_meanings()) for part in key.split(".")} | {"defaults", "hydra", "kernels"}


def wrong_key(document, rng):
    """A copy with one key of the document misspelt, and that key's new name."""
    copy = json.loads(json.dumps(document))
    places = [place for place in closed_objects(copy) if at(copy, place)]
    owner = at(copy, rng.choice(places))
    key = rng.choice(list(owner))
    new = key
    while new in LEGAL or new in owner or new in ("", key):
        new = misspelt(key, rng)
    owner[new] = owner.pop(key)
    return copy, new


def test_a_hundred_and_fifty_misspelt_keys_of_conf_are_refused(valid):
    rng = random.Random(SEED)
    documents = [(schema_of(path), load(path)) for path in FILES]
    documents = [(name, document) for name, document in documents if document]
    for _ in range(150):
        name, document = rng.choice(documents)
        wrong, key = wrong_key(document, rng)
        assert not valid(name, wrong), (name, key)


@pytest.fixture(scope="module")
def default_run():
    return OmegaConf.to_container(compose([]).config, enum_to_str=True)


WRONG = {bool: ["maybe", {"a": 1}, [True]], int: ["many", {"a": 1}, [1]], float: ["fast", {"a": 1}, [1.0]],
         str: [{"a": 1}, ["a"]], list: [{"a": 1}, 3]}  # fmt: skip
WORD_KEYS = {"model.dtype", "data.loss_on", "data.thinking", "generation.engine", "generation.thinking", "finetuning.bias",
             "trainer.optim", "trainer.lr_scheduler_type", "trainer.hub_strategy", "trainer.eval_strategy",
             "trainer.save_strategy", "trainer.logging_strategy", "trainer.log_level", "trainer.train_sampling_strategy"}  # fmt: skip
ANY = {"trainer.debug", "trainer.report_to", "trainer.include_num_input_tokens_seen"}  # of several types


def experiments(default_run, number):
    """(an experiment that says what the default run has, in the seeded order) times number."""
    rng = random.Random(SEED)
    leaves = [
        (group, key)
        for group, values in default_run.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value is not None and value not in ({}, []) and key not in ("name", "finetuning_type") and "." not in key
    ]
    for _ in range(number):
        experiment = {"name": "typo"}
        for group, key in rng.sample(leaves, 8):
            experiment.setdefault(group, {})[key] = default_run[group][key]
        yield experiment, rng


def wrong_value(experiment, rng):
    """A copy with one value that the key does not take."""
    copy = json.loads(json.dumps(experiment))
    keys = [(g, k) for g, values in copy.items() if isinstance(values, dict) for k in values if f"{g}.{k}" not in ANY]
    group, key = rng.choice(keys)
    value = copy[group][key]
    if f"{group}.{key}" in WORD_KEYS:
        copy[group][key] = f"{value}x"
    else:
        copy[group][key] = rng.choice(WRONG[type(value)])
    return copy, f"{group}.{key}={copy[group][key]}"


@pytest.fixture(scope="module")
def composes(tmp_path_factory):
    """experiment -> whether Hydra and glmtuner take it; raises what is no mistake of the user's."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "experiment").mkdir()

    @cache
    def taken(text):
        (folder / "experiment" / "typo.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
        try:
            compose(["experiment=typo"], config_dir=str(folder))
        except ConfigError:
            return False
        return True

    return lambda experiment: taken(yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))


def test_schema_and_composition_agree_on_experiments(valid, default_run, composes):
    """A hundred of them: as they should be, with a misspelt key, or with a wrong value; half of them are composed."""
    for number, (experiment, rng) in enumerate(experiments(default_run, 100)):
        if number % 4 == 0:
            assert valid("experiment", experiment) and (number > 50 or composes(experiment)), experiment
            continue
        wrong, what = wrong_key(experiment, rng) if number % 4 == 1 else wrong_value(experiment, rng)
        assert not valid("experiment", wrong) and (number > 50 or not composes(wrong)), what


@pytest.mark.parametrize(
    ("experiment", "legal"),
    [
        ({"defaults": [{"override /finetuning": "dora"}], "finetuning": {"lora_rank": 4}}, True),
        ({"defaults": [{"override /finetuning": "freeze"}], "finetuning": {"lora_rank": 4}}, False),
        ({"defaults": [{"override /finetuning": "freeze"}], "finetuning": {"num_layer_trainable": 2}}, True),
        ({"defaults": [{"override /finetuning": "frieze"}]}, False),
        ({"defaults": [{"override /finetunig": "freeze"}]}, False),
        ({"defaults": [{"override /stage": "dpo"}], "stage": {"loss": "ipo"}}, True),
        ({"defaults": [{"override /stage": "dpo"}], "stage": {"loss": "grpo"}}, False),
        ({"defaults": [{"override /stage": "grpo"}, {"override /reward": ["number", "format"]}],
          "reward": {"number": {"weight": 2}}, "trainer": {"per_device_train_batch_size": 8}}, True),
        ({"defaults": [{"override /stage": "grpo"}, {"override /reward": ["number", "formt"]}]}, False),
        ({"defaults": [{"override /finetuning": "peft"}], "finetuning": {"peft_type": "IA3", "config": {"init_ia3_weights": True}}}, True),
        ({"defaults": [{"override /finetuning": "peft"}], "finetuning": {"peft_type": "IA3", "config": {"init_ia3_wights": True}}}, False),
        ({"defaults": [{"override /finetuning": "peft"}], "finetuning": {"peft_type": "OFT", "config": {"r": "four"}}}, False),
        ({"trainer": {"bf16": "yes", "learning_rate": 1}, "name": 2024}, True),
        ({"trainer": {"eval_strategy": False, "save_strategy": "no"}}, True),
        ({"trainer": {"max_steps": "${oc.env:NOWHERE,12}", "output_dir": "${name}"}, "name": "x"}, True),
        ({"finetuning": {"rank_pattern": {"layers.0": 4}, "init_lora_weights": "gaussian"}}, True),
        ({"finetuning": {"rank_pattern": {"layers.0": "four"}}}, False),
        ({"finetuning": {"lora_target": ["all"], "layers_to_transform": [0, 1]}}, True),
        ({"finetuning": {"layers_to_transform": ["first"]}}, False),
        ({"objective": ["eval_loss", "train_runtime"]}, True),
        ({"objective": ["a", "b", "c"]}, False),
        ({"objective": 3}, False),
        ({"trainer": {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine_with_restarts"}}, True),
        ({"trainer": {"lr_scheduler_kwargs": [1]}}, False),
        ({"hydra": {"job": {"chdir": False}, "run": {"dir": "x"}}}, True),
        ({"hydra": {"jbo": {}}}, False),
    ],
    ids=lambda value: json.dumps(value)[:90],
)  # fmt: skip
def test_schema_and_composition_agree_on_choices(valid, composes, experiment, legal):
    assert valid("experiment", experiment) is legal
    assert composes(experiment) is legal


@pytest.mark.parametrize(
    ("name", "document", "legal"),
    [
        ("finetuning", {"defaults": ["lora"], "lora_rank": 4}, True),
        ("finetuning", {"defaults": ["dora"], "pre_seq_len": 4}, False),
        ("finetuning", {"defaults": ["/schema/finetuning/p_tuning@_here_"], "pre_seq_len": 4}, True),
        ("finetuning", {"defaults": ["/schema/finetuning/p_tunning@_here_"]}, False),
        ("finetuning", {"defaults": ["/finetuning/freeze@_here_"], "lora_rank": 4}, False),
        ("finetuning", {"lora_rank": 4, "pre_seq_len": 2}, True),  # of no class yet
        ("finetuning", {"lora_rnk": 4}, False),
        ("finetuning", {"defaults": [{"override /quant": "int4"}], "finetuning": {"lora_rank": 4}}, True),
        ("finetuning", {"defaults": [{"override /quant": "int5"}], "finetuning": {"lora_rank": 4}}, False),
        ("finetuning", {"finetuning": {"lora_rnk": 4}}, False),
        ("kernels", {"torch_compile": True}, True),
        ("kernels", {"torch_compil": True}, False),
        ("trainer", {"learning_rate": "${oc.env:RATE}", "optim": "???"}, True),
        ("trainer", {"learning_rate": "high"}, False),
        ("reward", {"defaults": ["/schema/reward/number@_here_"], "tolerance": 0.1}, True),
        ("reward", {"defaults": ["/schema/reward/exact@_here_"], "tolerance": 0.1}, False),
        ("hydra.launcher", {"defaults": ["/hydra/launcher/slurm@_here_"], "partition": "gpu"}, True),
        ("hydra.launcher", {"defaults": ["/hydra/launcher/slurm@_here_"], "partion": "gpu"}, False),
        ("hydra.launcher", {"_target_": "mine.Launcher", "anything": 1}, True),
        ("hydra.sweeper", {"n_trials": "many"}, False),
        ("config", {"defaults": [{"finetuning": "freeze"}, "_self_"], "finetuning": {"num_layer_trainable": 1}}, True),
        ("config", {"defaults": [{"finetuning": "freeze"}, "_self_"], "finetuning": {"lora_rank": 1}}, False),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else str(value),
)
def test_a_preset_has_the_keys_of_its_class(valid, name, document, legal):
    assert valid(name, document) is legal


@pytest.mark.parametrize(
    ("entry", "legal"),
    [
        ({"file_name": "a.json"}, True),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}}, True),
        ({"file_name": "a.json", "formatting": "sharegtp"}, False),
        ({"file_name": "a.json", "columns": {"promt": "instruction"}}, False),
        ({"file_name": "a.json", "columns": {"images": "pictures"}}, False),
        ({"file_name": "a.json", "columns": {"images": None}, "subset": None, "folder": ""}, True),
        ({"file_name": "a.json", "tags": {"role_tag": "from", "user_tag": "human"}}, True),
        ({"file_name": "a.json", "tags": {"role": "from"}}, False),
        ({"file_name": "a.json", "num_samples": 0}, False),
        ({"file_name": "a.json", "num_samples": True}, False),
        ({"file_name": "a.json", "ranking": "yes"}, False),
        ({"columns": {"prompt": "instruction"}}, False),
        ({"hf_hub_url": "a/b", "data_files": ["x.json"], "ignore_columns": ["images"]}, True),
        ({"url": "https://example.org/a.json"}, False),
        ({"script_url": "x"}, False),
        ({"script_url": "x", "ms_hub_url": "a/b"}, True),
    ],
    ids=lambda value: json.dumps(value)[:80],
)
def test_schema_and_catalogue_agree_on_entries(valid, entry, legal):
    try:
        spec_of("mine", entry, kind="dataset_info", origin="dataset_info.json")
        taken = True
    except DataError:
        taken = False
    assert valid("dataset", entry) is valid("dataset_info", {"mine": entry}) is taken is legal


def test_every_property_has_its_meaning_and_the_default_of_the_default_run(schemas, default_run):
    seen = set()
    for group in ("model", "data", "generation", "trainer", "budget"):
        for key, schema in schemas["experiment"]["$defs"][group]["properties"].items():
            assert schema["description"] == key_meanings()[f"{group}.{key}"]["en"]
            seen.add(f"{group}.{key}")
    assert len(seen) > 180
    rank = schemas["finetuning"]["$defs"]["finetuning.lora"]["properties"]["lora_rank"]
    assert rank["default"] == 8 and {"type": "integer"} in rank["anyOf"]
    assert schemas["trainer"]["$defs"]["trainer"]["properties"]["optim"]["default"] == "adamw_torch_fused"
    described = [
        schema
        for name in schemas
        for owner in schemas[name].get("$defs", {}).values()
        for schema in owner.get("properties", {}).values()
    ]
    assert sum("description" in schema for schema in described) > 900


def test_the_verb_writes_schemas_and_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine" / "finetuning"
    own.mkdir(parents=True)
    (own / "small.yaml").write_text("defaults: [lora]\nlora_rank: 2\n", encoding="utf-8")
    assert main(["schema", "--config-dir", "mine", "--lang", "zh"]) == 0
    told = capsys.readouterr().out
    assert "--vscode" in told and '"yaml.schemas"' in told
    folder = tmp_path / ".glmtuner" / "schema"
    text = (folder / "experiment.json").read_text(encoding="utf-8")
    assert key_meanings()["trainer.learning_rate"]["zh"] in text and '"small"' in text
    settings = json.loads((folder / "vscode.json").read_text(encoding="utf-8"))
    assert settings["yaml.schemas"]["./.glmtuner/schema/finetuning.json"] == [
        "**/*conf/finetuning/*.yaml",
        "**/mine/finetuning/*.yaml",
    ]
    for place in settings["yaml.schemas"]:
        assert (tmp_path / place).is_file()
    assert (tmp_path / settings["json.schemas"][0]["url"]).is_file() and not (tmp_path / ".vscode").exists()
    assert main(["schema", "--to", "elsewhere", "--vscode"]) == 0
    assert "elsewhere/trainer.json" in (tmp_path / ".vscode" / "settings.json").read_text(encoding="utf-8")


def test_settings_keep_what_they_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / ".vscode" / "settings.json"
    settings.parent.mkdir()
    settings.write_text('{"editor.tabSize": 2, "yaml.schemas": {"x.json": "x.yaml"}, "json.schemas": [{"url": "y"}]}')
    for _ in range(2):  # the second time changes nothing
        assert main(["schema", "--vscode"]) == 0
        content = json.loads(settings.read_text(encoding="utf-8"))
        assert content["editor.tabSize"] == 2 and content["yaml.schemas"]["x.json"] == "x.yaml"
        assert [each["url"] for each in content["json.schemas"]] == ["y", "./.glmtuner/schema/dataset_info.json"]
    settings.write_text('{\n  // a comment\n  "editor.tabSize": 2\n}')
    capsys.readouterr()
    assert main(["schema", "--vscode", "--to", "new"]) == 2
    said = capsys.readouterr().err
    assert "not plain JSON" in said and said.count("\n") == 1 and not (tmp_path / "new").exists()
    assert "// a comment" in settings.read_text()
    assert merged_settings({"yaml.schemas": 3}, {"yaml.schemas": {"a": []}, "json.schemas": []})["yaml.schemas"] == {
        "a": []
    }


def test_mistakes_of_the_verb_are_one_paragraph(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for words, said in ((["--to", "file"], "it is a file"), (["trainer.seed=1"], "only plugins=<module>"),
                        (["--config-dir", "nowhere"], "no such folder"), (["--too", "x"], "--too")):  # fmt: skip
        assert main(["schema", *words]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_nothing_heavy_is_loaded(tmp_path):
    code = "import sys; from glmtuner.cli.main import main; main(['schema']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = {*done.stdout.splitlines()[-1].split()}
    assert "glmtuner.cli.schema" in loaded and not {"torch", "transformers", "datasets", "peft", "rich"} & loaded
