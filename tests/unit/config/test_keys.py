"""Every key has a meaning in both languages and no other has one; `keys` finds keys by name, glob and meaning."""

import json
import re
from pathlib import Path

import pytest
import yaml

from glmtuner.cli.main import main
from glmtuner.config import plugins
from glmtuner.config.compose import compose
from glmtuner.config.groups import SCHEMA_CLASSES
from glmtuner.config.key_meanings import ENTRY, LANGUAGES, MEANINGS, key_meanings, language_of_locale
from glmtuner.config.keys import all_keys, matching
from glmtuner.config.paths import conf_dir
from glmtuner.config.preset_files import default_presets, preset_files
from glmtuner.config.schema import legal_keys
from glmtuner.data.entry_keys import entry_keys
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def keys():
    return {key.name: key for key in [*all_keys([conf_dir()], "en"), *entry_keys("en")]}


def keys_of_hydra() -> set[str]:
    """Read off conf/hydra by PyYAML alone."""
    found = set()
    for path in (conf_dir() / "hydra").rglob("*.yaml"):
        group = ".".join(path.parent.relative_to(conf_dir()).parts)
        found |= {f"{group}.{name}" for name in yaml.safe_load(path.read_text(encoding="utf-8"))}
    return {name for name in found if name.rpartition(".")[2] not in ("defaults", "_target_")}


def test_every_key_has_a_meaning_in_both_languages_and_no_other_has_one(keys):
    shipped = {
        key
        for key in legal_keys()
        if not key.startswith("reward.")
        or SCHEMA_CLASSES["reward"][key.split(".")[1]].__module__.startswith("glmtuner.")
    }
    written = key_meanings()
    assert len(shipped) > 250 and {*written} >= shipped | keys_of_hydra()
    others = {*written} - shipped - keys_of_hydra()
    assert others <= {key.name for key in entry_keys("en")} and all(name.startswith(f"{ENTRY}.") for name in others)
    assert {key.name for key in entry_keys("en")} <= {*written}
    assert {*keys} >= {*written}


def test_a_meaning_is_one_short_line_in_its_language():
    for name, meanings in key_meanings().items():
        assert {*meanings} == {*LANGUAGES}, name
        assert all(text == text.strip() and "\n" not in text and text[-1] not in ".。" for text in meanings.values()), (
            name
        )
        assert len(meanings["en"]) <= 170 and len(meanings["zh"]) <= 90, name
        # a word such as `true` is no sentence; `not used` has a reason
        assert not CHINESE.search(meanings["en"]) and (CHINESE.search(meanings["zh"]) or name.endswith("do_train")), (
            name
        )


def test_a_key_that_can_be_null_says_what_null_means():
    exempt = ("not used", "earlier name")
    for name, hint in legal_keys().items():
        meaning = key_meanings().get(name, {"en": "null", "zh": "null"})
        if type(None) in getattr(hint, "__args__", ()) and not meaning["en"].startswith(exempt):
            assert "null" in meaning["en"] and "null" in meaning["zh"], name


def test_no_key_is_written_twice():
    names = re.findall(r"^(\S+):$", MEANINGS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == len({*names}) == len(key_meanings())


def test_a_key_has_the_type_default_choices_and_presets_of_its_class(keys):
    rank, beta, strategy = keys["finetuning.lora_rank"], keys["stage.beta"], keys["trainer.eval_strategy"]
    assert (rank.type, rank.default, rank.choices, rank.presets) == ("whole number", "8", (), ("finetuning=lora",))
    assert beta.default == "0.1 (cpo, dpo, kto, orpo), 0.04 (grpo), 2.0 (simpo)" and "stage=simpo" in beta.presets
    assert (strategy.type, strategy.default, strategy.choices) == ("one of the choices", "no", ("no", "steps", "epoch"))
    assert keys["generation.temperature"].default == "0.95"  # of conf/generation/default.yaml; that of the class is 1
    assert keys["trainer.bf16"].choices == ("true", "false") and keys["trainer.tf32"].type == "true or false or null"
    assert keys["finetuning.lora_target"].type == "list of text" and keys["data.weights"].type == "list of numbers"
    assert keys["finetuning.rank_pattern"].type == "mapping of names to whole numbers"
    assert keys["finetuning.peft_type"].default is None
    assert "shared" not in keys["hydra.launcher.partition"].presets[0]
    assert keys["hydra.sweeper.n_trials"].default == "20" and keys["hydra.sweeper.n_trials"].type == "whole number"
    assert {"alpaca", "sharegpt", "openai"} <= {*keys["dataset_info.formatting"].choices}


def test_shown_defaults_are_those_of_a_composed_run(keys):
    """Against Hydra: the default run has the defaults of the keys that its presets have."""
    run = compose([]).run
    compared = 0
    for name, key in keys.items():
        group, _, inner = name.partition(".")
        owner = getattr(run, group, None)
        if "." in inner or not hasattr(owner, inner) or key.default is None or "$" in key.default or "(" in key.default:
            continue
        value = getattr(owner, inner)
        value = getattr(value, "name", value)  # an enumeration's
        if isinstance(value, float):
            assert float(key.default) == value, name
            compared += 1
            continue
        assert key.default == ("null" if value is None else as_text(value)), name
        compared += 1
    assert compared > 200


def as_text(value):
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {as_text(inner)}' for name, inner in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("trainer.learning_rate", ["trainer.learning_rate"]),
        ("LEARNING_rate", ["trainer.learning_rate"]),
        ("trainer.*g_steps", ["trainer.logging_steps"]),
        ("*.lora_r*", ["finetuning.lora_rank"]),
        ("budget.price", ["budget.price_per_gpu_hour", "budget.price_per_cpu_hour"]),
        ("(DoRA)", ["finetuning.use_dora"]),  # only in a meaning
        ("gpu:a100:?", ["hydra.launcher.gres"]),
    ],
)
def test_a_pattern_finds_keys_and_else_meanings(keys, pattern, names):
    assert [key.name for key in matching([*keys.values()], pattern)] == names


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("lora_rnk", "'lora_rank'"), ("trainer.lerning_rate", "'trainer.learning_rate'"), ("q=q", "keys for all")],
)
def test_a_pattern_that_matches_nothing_is_one_paragraph(keys, pattern, meant):
    with pytest.raises(ConfigError, match=re.escape(meant)) as raised:
        matching([*keys.values()], pattern)
    assert str(raised.value).startswith(f"keys {pattern}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("variables", "language"),
    [({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_US.UTF-8"}, "en"), ({}, "en"), ({"LC_ALL": "C"}, "en"),
     ({"LANG": "zh_TW", "LC_ALL": "C"}, "en"), ({"LANG": "C", "LC_ALL": "zh_CN"}, "zh")],
)  # fmt: skip
def test_the_language_is_that_of_the_locale(monkeypatch, variables, language):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language_of_locale() == language


def test_the_verb_prints_a_table_or_objects(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LC_ALL", "C")
    assert main(["keys", "lora_rank"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"finetuning.lora_rank +│ whole number +│ 8 +│ rank of the update", shown)
    assert main(["keys", "eval_strategy", "--json", "--lang", "zh"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "key": "trainer.eval_strategy",
        "type": "one of the choices",
        "default": "no",
        "choices": ["no", "steps", "epoch"],
        "presets": [],
        "meaning": key_meanings()["trainer.eval_strategy"]["zh"],
    }
    assert main(["keys", "lora_rnk"]) == 2 and "did you mean 'lora_rank'?" in capsys.readouterr().err
    assert main(["keys", "lora_rank", "trainer.seed=1"]) == 2 and "plugins=<module>" in capsys.readouterr().err


def test_keys_of_a_plugin_are_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_keyed_metric.py").write_text(
        "from dataclasses import dataclass\n"
        "from glmtuner.config.groups import Metric, preset\n\n\n"
        "@preset('metric', 'keyed')\n@dataclass(kw_only=True)\nclass Keyed(Metric):\n    rarely_named: int = 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert main(["keys", "rarely_named", "plugins=my_keyed_metric", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (
            found["key"] == "metric.rarely_named" and found["presets"] == ["metric=keyed"] and found["default"] == "3"
        )
    finally:
        SCHEMA_CLASSES["metric"].pop("keyed", None)
        plugins._loaded.pop("my_keyed_metric", None)


def test_presets_are_typed_by_the_class_that_hydra_gives_them():
    files = {(each.group, each.name): each for each in preset_files([conf_dir()])}
    for (group, name), file in files.items():
        if group in SCHEMA_CLASSES:
            assert file.typed_as in SCHEMA_CLASSES[group], (group, name)
    assert files["finetuning", "dora"].typed_as == files["finetuning", "qlora"].typed_as == "lora"
    assert files["finetuning", "qlora"].values["lora_rank"] == 64  # below `finetuning:` in a file for the whole run
    for word in ("finetuning=qlora", "finetuning=pissa"):
        assert type(compose([word]).run.finetuning) is SCHEMA_CLASSES["finetuning"]["lora"]
    assert default_presets(conf_dir())["finetuning"] == "lora" and "experiment" not in default_presets(conf_dir())


def test_a_preset_that_is_no_yaml_or_starts_from_itself_is_no_crash(tmp_path):
    (tmp_path / "finetuning").mkdir()
    (tmp_path / "finetuning" / "broken.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "finetuning" / "round.yaml").write_text("defaults: [round]\nlora_rank: 1\n", encoding="utf-8")
    own = {each.name: each for each in preset_files([conf_dir(), Path(tmp_path)]) if each.path.is_relative_to(tmp_path)}
    assert own.keys() == {"round"} and own["round"].typed_as is None
