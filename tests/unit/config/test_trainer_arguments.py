"""The committed schema of the trainer's arguments is transformers' own, and the words it dropped still mean something."""

import dataclasses
import importlib.util
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments

from glmtuner.config import trainer_arguments
from glmtuner.config.compose import compose
from glmtuner.config.groups import Trainer
from glmtuner.config.schema import legal_keys
from glmtuner.config.trainer_arguments import UNIONS, WORDS, TrainerArguments
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()

ROOT = Path(__file__).parent.parent.parent.parent
FIELDS = {declared.name: declared for declared in dataclasses.fields(Seq2SeqTrainingArguments)}


def default_of(declared: dataclasses.Field) -> object:
    value = declared.default if declared.default is not dataclasses.MISSING else declared.default_factory()
    return value.value if isinstance(value, Enum) else value


def experiment(folder: Path, text: str) -> str:
    """A folder of presets with one experiment, `mine`."""
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    return str(folder)


def test_the_committed_schema_is_what_the_script_writes():
    path = ROOT / "scripts" / "generate_trainer_schema.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = Path(trainer_arguments.__file__).read_text(encoding="utf-8")
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length=120", "-"],
        input=script.generate(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert committed == formatted, "run scripts/generate_trainer_schema.py, then ruff format"


def test_every_field_of_transformers_is_there_with_its_default():
    ours = {declared.name: default_of(declared) for declared in dataclasses.fields(TrainerArguments)}
    theirs = {name: default_of(declared) for name, declared in FIELDS.items()}
    assert ours == theirs
    assert {f"trainer.{name}" for name in FIELDS} <= legal_keys().keys()


def test_every_field_is_accepted_at_its_default_value():
    redirected = {
        *("report_to", "generation_num_beams", "generation_max_length"),
        *("fsdp", "fsdp_config", "deepspeed"),
    }
    defaults = {name: default_of(declared) for name, declared in FIELDS.items() if name not in redirected}
    written = {name: {None: "null", "": "''"}.get(value, str(value)) for name, value in defaults.items() if value != []}
    words = [f"trainer.{name}={value}" for name, value in written.items() if name != "do_train"]
    assert len(words) > 100
    assert compose(words).config.trainer == compose([]).config.trainer


@pytest.mark.parametrize("name", sorted(UNIONS))
def test_a_union_takes_every_shape_it_lists_and_no_other(name):
    samples = {"dict": {"a": 1}, "list": ["a"], "str": "a", "bool": True, "null": None, "int": 7}
    for shape, value in samples.items():
        if shape in UNIONS[name]:
            Trainer(**{name: value})
        else:
            with pytest.raises(ConfigError, match=rf"trainer\.{name}=.*expected .*, not|expected"):
                Trainer(**{name: value})


@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_field_of_words_takes_those_and_offers_the_nearest(name):
    for word in WORDS[name]:
        assert getattr(Trainer(**{name: word}), name) == word
    wrong = f"{WORDS[name][1]}x"
    with pytest.raises(ConfigError, match=rf"trainer\.{name}={wrong}; did you mean '{WORDS[name][1]}'\?"):
        Trainer(**{name: wrong})


def test_enums_refuse_what_they_do_not_list():
    with pytest.raises(ConfigError, match=r"trainer\.optim=adamw_torh: .*did you mean 'adamw_torch'\?"):
        compose(["trainer.optim=adamw_torh"])
    with pytest.raises(ConfigError, match=r"trainer\.lr_scheduler_type=cosin: .*did you mean 'cosine'\?"):
        compose(["trainer.lr_scheduler_type=cosin"])


# Words that transformers 5 dropped or renamed


def test_no_cuda_is_use_cpu():
    assert compose(["trainer.no_cuda=true"]).run.trainer.use_cpu is True
    assert compose([]).run.trainer.use_cpu is False


def test_warmup_ratio_is_a_share_in_warmup_steps():
    assert compose(["trainer.warmup_ratio=0.05"]).run.trainer.warmup_steps == 0.05
    with pytest.raises(ConfigError, match=r"trainer\.warmup_ratio=0\.05 with trainer\.warmup_steps=10: choose one"):
        compose(["trainer.warmup_ratio=0.05", "trainer.warmup_steps=10"])
    with pytest.raises(ConfigError, match=r"trainer\.warmup_ratio=1\.5: .* \[0, 1\)"):
        compose(["trainer.warmup_ratio=1.5"])


def test_group_by_length_is_a_sampling_strategy():
    assert compose(["trainer.group_by_length=true"]).run.trainer.train_sampling_strategy == "group_by_length"
    assert compose([]).run.trainer.train_sampling_strategy == "random"


def test_overwrite_output_dir_is_a_word_of_ours():
    assert compose(["trainer.overwrite_output_dir=true"]).run.trainer.overwrite_output_dir is True


def test_evaluation_strategy_is_answered_with_its_new_name():
    with pytest.raises(ConfigError, match=r"trainer\.evaluation_strategy=steps .* type trainer\.eval_strategy=steps"):
        compose(["trainer.evaluation_strategy=steps"])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("trainer.save_safetensors=false", "trainer.save_safetensors=False: .* nothing but safetensors"),
        ("trainer.logging_dir=logs", "trainer.logging_dir=logs: .*leave it out"),
        (
            "trainer.auto_find_batch_size=true",
            "trainer.auto_find_batch_size=true: .*set trainer.per_device_train_batch_size",
        ),
    ],
)
def test_words_that_cannot_be_followed_say_why(word, told):
    with pytest.raises(ConfigError, match=told):
        compose([word])


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_no_in_yaml_means_the_word(tmp_path, name):
    folder = experiment(tmp_path, f"trainer:\n  {name}: no\n")
    for words in (["experiment=mine"], [f"trainer.{name}=no"]):
        composed = compose(words, config_dir=folder)
        assert getattr(composed.run.trainer, name) == "no"


def test_true_is_no_strategy(tmp_path):
    folder = experiment(tmp_path, "trainer:\n  eval_strategy: yes\n")
    with pytest.raises(ConfigError, match=r"trainer\.eval_strategy=True; legal: no, steps, epoch"):
        compose(["experiment=mine"], config_dir=folder)


def test_a_misspelt_field_in_an_experiment_file_is_answered_too(tmp_path):
    folder = experiment(tmp_path, "trainer:\n  lerning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'trainer\.lerning_rate'; did you mean 'learning_rate'\?"):
        compose(["experiment=mine"], config_dir=folder)


def test_the_word_no_of_a_yaml_file_is_kept_as_a_word(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/quiet.yaml").write_text("# @package _global_\ntrainer:\n  save_strategy: no\n")
    composed = compose(["experiment=quiet"], config_dir=str(tmp_path))
    assert composed.run.trainer.save_strategy == composed.config.trainer.save_strategy == "no"
