"""The mode in which a model is asked: generation.thinking, else that of its training; and templates of earlier versions."""

import json

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.launch.build import asked_mode, resolve_template
from glmtuner.launch.register import register_presets

SOURCE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>{{ enable_thinking }}"


def stored_run(folder, thinking, template):
    """A folder with the files that describe a run."""
    folder.mkdir()
    register_presets()
    config = OmegaConf.to_container(compose(["model=tiny_glm"]).config, resolve=True, enum_to_str=True)
    config["model"]["template"] = "tokenizer"
    del config["generation"]["thinking"], config["data"]["thinking"]  # as earlier versions wrote it
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    (folder / "overrides.txt").write_text("model=tiny_glm\n", encoding="utf-8")
    (folder / "template.jinja").write_text(SOURCE, encoding="utf-8")
    about = {"template": template, "data": {}, **({"thinking": thinking} if thinking else {})}
    (folder / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def run_with(*words):
    register_presets()
    return compose(["model=tiny_glm", "model.template=tokenizer", "trainer=predict", *words]).run


@pytest.mark.parametrize(("stored", "mode"), [("on", True), ("off", False), (None, None)])
def test_a_run_is_asked_in_the_mode_that_it_was_trained_in(tmp_path, stored, mode):
    folder = stored_run(tmp_path / "run", stored, {"jinja": SOURCE, "thinking": "auto"})
    assert asked_mode(run_with(f"model.checkpoint_dir={folder}")) is mode
    for word, asked in (("on", True), ("off", False)):
        assert asked_mode(run_with(f"model.checkpoint_dir={folder}", f"generation.thinking={word}")) is asked
    assert asked_mode(run_with()) is None


def test_a_template_of_before_keeps_its_prompts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    for number, (template, thinking) in enumerate(
        [({"jinja": SOURCE}, "empty"), ({"jinja": SOURCE, "thinking": "auto"}, "auto")]
    ):
        folder = stored_run(tmp_path / str(number), None, template)
        name, found = resolve_template(run_with(f"model.checkpoint_dir={folder}"), None, tokenizer)
        assert (name, found.source, found.thinking) == ("tokenizer", SOURCE, thinking)


@pytest.mark.parametrize("word", ["on", "off"])
def test_the_mode_survives_a_config_file(word):
    register_presets()
    config = compose(["model=tiny_glm", f"generation.thinking={word}"]).config
    text = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(config.generation, enum_to_str=True)))
    assert OmegaConf.create(text).thinking == word
