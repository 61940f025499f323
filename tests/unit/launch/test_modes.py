"""The mode in which a model is asked: generation.thinking, else that of its training; and templates of earlier versions."""

import json

import described_runs
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.data.splits import mode_of_checkpoint
from glmtuner.errors import CheckpointError
from glmtuner.launch.build import asked_mode, resolve_template
from glmtuner.launch.register import register_presets

SOURCE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>{{ enable_thinking }}"


def stored_run(folder, thinking, template):
    """A folder with the files that describe a run, as earlier versions wrote them."""
    about = {"template": template, **({"thinking": thinking} if thinking else {})}
    described_runs.write_run(folder, about, "tokenizer", without=[("generation", "thinking"), ("data", "thinking")])
    (folder / "template.jinja").write_text(SOURCE, encoding="utf-8")
    return folder


def run_with(*words):
    return described_runs.run_with("model.template=tokenizer", "trainer=predict", *words)


@pytest.mark.parametrize(("stored", "mode"), [("on", True), ("off", False), (None, None)])
def test_a_run_is_asked_in_the_mode_that_it_was_trained_in(tmp_path, stored, mode):
    folder = stored_run(tmp_path / "run", stored, {"jinja": SOURCE, "thinking": "auto"})
    assert asked_mode(run_with(f"model.checkpoint_dir={folder}")) is mode
    for word, asked in (("on", True), ("off", False)):
        assert asked_mode(run_with(f"model.checkpoint_dir={folder}", f"generation.thinking={word}")) is asked
    assert asked_mode(run_with()) is None


def test_thoughts_are_rendered_as_in_the_training_unless_it_goes_on(tmp_path):
    folder = stored_run(tmp_path / "run", None, {"jinja": SOURCE, "thinking": "strip"})
    config = OmegaConf.load(folder / "config.yaml")
    config.data.thinking = "strip"
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    words = (f"model.checkpoint_dir={folder}",)
    assert run_with(*words).data.thinking.value == "strip"
    assert run_with(*words, "data.thinking=auto").data.thinking.value == "auto"
    trained = ("trainer.do_train=true", "trainer.do_predict=false", "trainer.predict_with_generate=false")
    assert run_with(*words, *trained).data.thinking.value == "auto"
    config.data.thinking = "sometimes"
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged \(data\.thinking"):
        run_with(*words)


@pytest.mark.parametrize(
    ("stored", "mode"),
    [
        ([(3, 0, 1.0), (0, 9, None)], True),
        ([(0, 3, 1.0)], False),
        ([(1, 3, 1.0)], None),
        ([(3, 0, 0.5), (0, 3, 0.5)], None),
        ([(0, 0, 1.0)], None),
        ([], None),
    ],
)
def test_the_only_mode_of_a_training_is_that_of_what_was_trained(tmp_path, stored, mode):
    folder = stored_run(tmp_path / "run", "on", {"jinja": SOURCE, "thinking": "auto"})
    entries = {
        f"d{number}": {"thinking": on, "not_thinking": off, **({} if share is None else {"share": share})}
        for number, (on, off, share) in enumerate(stored)
    }
    (folder / "provenance.json").write_text(json.dumps({"data": entries}), encoding="utf-8")
    assert mode_of_checkpoint(run_with(f"model.checkpoint_dir={folder}")) is mode
    assert mode_of_checkpoint(run_with()) is None


def test_a_template_of_before_keeps_its_prompts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    for number, (template, thinking) in enumerate(
        [({"jinja": SOURCE}, "empty"), ({"jinja": SOURCE, "thinking": "auto"}, "auto")]
    ):
        folder = stored_run(tmp_path / str(number), None, template)
        name, found = resolve_template(run_with(f"model.checkpoint_dir={folder}"), None, tokenizer)
        assert (name, found.source, found.thinking) == ("tokenizer", SOURCE, thinking)


@pytest.mark.parametrize(("template", "has_modes"), [("glm4", False), ("tokenizer", True)])
def test_a_mode_that_the_template_does_not_have_is_told(template, has_modes, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.chat_template = SOURCE
    for word in ("auto", "on", "off"):
        resolve_template(run_with(f"model.template={template}", f"generation.thinking={word}"), None, tokenizer)
        told = capsys.readouterr().out
        assert (f"generation.thinking={word} has no effect" in told) == (word != "auto" and not has_modes)


@pytest.mark.parametrize("word", ["on", "off"])
def test_the_mode_survives_a_config_file(word):
    register_presets()
    config = compose(["model=tiny_glm", f"generation.thinking={word}"]).config
    text = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(config.generation, enum_to_str=True)))
    assert OmegaConf.create(text).thinking == word
