"""Every field of Seq2SeqTrainingArguments is obeyed, redirected or refused, and none silently does nothing."""

import ast
import dataclasses
import re
from enum import Enum
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments

from glmtuner.config.compose import compose
from glmtuner.config.groups import Trainer
from glmtuner.config.trainer_fields import OBEYED, REDIRECTED, REFUSED
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()

TESTS = Path(__file__).parent.parent.parent
FIELDS = {declared.name: declared for declared in dataclasses.fields(Seq2SeqTrainingArguments)}
# A value other than the default of each redirected or refused field, and the words of the answer.
ANSWERS = {
    "report_to": ("wandb", "type tracker=wandb"),
    "run_name": ("mine", "type name=mine"),
    "project": ("mine", "tracker.project=mine"),
    "fsdp": ("full_shard", "type parallel=fsdp2"),
    "fsdp_config": ("{min_num_params: 1}", "type parallel=fsdp2"),
    "deepspeed": ("ds.json", "type parallel=fsdp2"),
    "parallelism_config": ("{tp_size: 2}", "type parallel=ddp"),
    "generation_num_beams": ("3", "type data.eval_num_beams=3"),
    "generation_max_length": ("99", "type data.max_target_length=99"),
    "generation_config": ("folder", "data.eval_num_beams="),
    "sortish_sampler": ("true", "type trainer.train_sampling_strategy=group_by_length"),
    "length_column_name": ("size", "type trainer.train_sampling_strategy=group_by_length"),
    "auto_find_batch_size": ("true", "set trainer.per_device_train_batch_size"),
    "trackio_space_id": ("me/x", "type tracker=trackio"),
    "trackio_bucket_id": ("me/x", "type tracker=trackio"),
    "trackio_static_space_id": ("me/x", "type tracker=trackio"),
    "eval_do_concat_batches": ("false", "leave it out"),
    "eval_use_gather_object": ("true", "leave it out"),
    "eval_accumulation_steps": ("2", "leave it out"),
    "include_for_metrics": ("[inputs]", "leave it out"),
    "batch_eval_metrics": ("true", "leave it out"),
    "save_on_each_node": ("true", "leave it out"),
    "enable_jit_checkpoint": ("true", "leave it out"),
    "hub_always_push": ("true", "leave it out"),
    "restore_callback_states_from_checkpoint": ("true", "leave it out"),
    "label_names": ("[labels]", "leave it out"),
    "ddp_backend": ("nccl", "leave it out"),
    "local_rank": ("0", "leave it out"),
}
ARGUMENTS = "unit/launch/test_arguments.py"
# Where each obeyed field is tested; the test's source names it.
TESTED_IN = dict.fromkeys(OBEYED, ARGUMENTS) | {
    **dict.fromkeys(("do_eval", "do_predict", "predict_with_generate"), "e2e/test_stages.py"),
    "do_train": "unit/config/test_trainer_rules.py",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "unit/launch/test_build.py"),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "unit/launch/test_rehearsal.py"),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_revision", "hub_private_repo"), "e2e/test_cli.py"
    ),
    "hub_strategy": "unit/config/test_trainer_rules.py",
    "prediction_loss_only": "unit/config/test_trainer_rules.py",
    "resume_from_checkpoint": "e2e/test_resume.py",
    "output_dir": "e2e/test_cli.py",
}


def default_of(declared: dataclasses.Field) -> object:
    value = declared.default if declared.default is not dataclasses.MISSING else declared.default_factory()
    return value.value if isinstance(value, Enum) else value


def test_every_field_has_one_standing():
    standings = [*OBEYED, *REDIRECTED, *REFUSED]
    assert sorted(standings) == sorted(FIELDS)


def test_every_redirected_and_refused_field_is_tested_below():
    assert ANSWERS.keys() == REDIRECTED.keys() | REFUSED.keys()


def answers(words, **options):
    with pytest.raises(ConfigError) as caught:
        compose(words, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OF_A_WRONG_TYPE = "parallelism_config"  # no type is legal, which is checked first


def test_a_field_that_is_not_obeyed_says_what_to_type():
    words = [f"trainer.{name}={value}" for name, (value, _) in ANSWERS.items() if name != OF_A_WRONG_TYPE]
    sentences = answers(words).split("; also: ")
    for name, (value, advice) in ANSWERS.items():
        if name == OF_A_WRONG_TYPE:
            assert advice in answers([f"trainer.{name}={value}"])
        else:
            (sentence,) = [one for one in sentences if one.startswith(f"trainer.{name}=")]
            assert advice in sentence


def test_its_default_is_accepted():
    words = []
    for name in ANSWERS:
        default = default_of(FIELDS[name])
        words.append(f"trainer.{name}={'[]' if default == [] else {None: 'null'}.get(default, default)}")
    assert compose(words).run.trainer == compose([]).run.trainer


def test_a_preset_that_sets_it_gets_the_same_answer(tmp_path):
    (tmp_path / "experiment").mkdir()
    lines = [f"  {name}: {value}\n" for name, (value, _) in ANSWERS.items() if name != OF_A_WRONG_TYPE]
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\ntrainer:\n{''.join(lines)}", encoding="utf-8")
    told = answers(["experiment=mine"], config_dir=str(tmp_path))
    assert all(f"trainer.{name}=" in told for name in ANSWERS if name != OF_A_WRONG_TYPE)


@pytest.mark.parametrize("name", sorted(OBEYED))
def test_an_obeyed_field_is_named_by_its_test(name):
    source = (TESTS / TESTED_IN[name]).read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert any(isinstance(text, str) and re.search(rf"\b{name}\b", text) for text in texts), (
        f"{TESTED_IN[name]} does not mention {name}"
    )


def test_harmless_values_are_accepted():
    compose(["trainer.report_to=[none]", "trainer.remove_unused_columns=false", "trainer.logging_nan_inf_filter=false"])
    assert Trainer(hub_token="hf_x").hub_token == "hf_x"
