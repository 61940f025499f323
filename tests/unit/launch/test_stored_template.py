"""A run keeps the version of the template that it was trained with: its prompts, and those of what starts from it or goes on with it."""

import json

import pytest
from described_runs import run_with, write_run
from transformers import AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.records import Message
from glmtuner.errors import CheckpointError
from glmtuner.families.family import family_named
from glmtuner.launch.build import resolve_template
from glmtuner.templates.base import TEMPLATES
from glmtuner.templates.stored import version_stored

# What version 0.1.0 wrote into provenance.json: the line break behind <|assistant|> is not learned.
OLD = {
    "name": "glm4",
    "example": "[gMASK]<sop><|system|>\n{system}<|user|>\n{user}<|assistant|>\n{assistant}",
    "tokenized_apart": ["\n{system}", "\n{user}", "\n", "{assistant}"],
    "learned": ["{assistant}"],
    "one_answer_a_row": False,
    "stop": "<|user|>",
}
ASKED = [Message("user", "你好")]
OLD_PROMPT, PROMPT = "[gMASK]<sop><|user|>\n你好<|assistant|>\n", "[gMASK]<sop><|user|>\n你好<|assistant|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


def stored(folder, template, name="glm4"):
    return write_run(folder, {"template": template}, name)


def prompt(template, tokenizer):
    (encoded,) = template.encode(tokenizer, [ASKED])
    return tokenizer.decode(encoded.input_ids)


def learned(template, tokenizer):
    (encoded,) = template.encode(tokenizer, [[*ASKED, Message("assistant", "好")]])
    return tokenizer.decode([token for token in encoded.labels(True) if token >= 0])


@pytest.mark.parametrize("words", [("trainer=predict",), ()], ids=["predicted", "trained on"])
def test_a_checkpoint_of_before_is_asked_as_it_was_trained(tmp_path, tokenizer, words):
    folder = stored(tmp_path / "run", OLD)
    name, template = resolve_template(
        run_with(f"model.checkpoint_dir={folder}", *words), family_named("glm"), tokenizer
    )
    assert name == "glm4" and prompt(template, tokenizer) == OLD_PROMPT
    assert template.describe() == OLD  # what its own folder will say
    assert learned(template, tokenizer) == "好<|user|>"
    messages = [{"role": "user", "content": "你好"}]
    assert tokenizer.apply_chat_template(
        messages, chat_template=template.jinja(), tokenize=False, add_generation_prompt=True
    ) == (OLD_PROMPT)


def test_a_checkpoint_of_today_is_asked_as_it_was_trained(tmp_path, tokenizer):
    about = json.loads(json.dumps(TEMPLATES["glm4"].describe()))
    folder = stored(tmp_path / "run", about)
    _, template = resolve_template(run_with(f"model.checkpoint_dir={folder}"), family_named("glm"), tokenizer)
    assert prompt(template, tokenizer) == PROMPT and learned(template, tokenizer) == "\n好<|user|>"


@pytest.mark.parametrize("family", ["glm", "glm4"], ids=["glm-4-9b", "0414, whose family has another template today"])
def test_a_resumed_run_of_before_goes_on_with_its_template(tmp_path, tokenizer, family):
    folder = stored(tmp_path / "run", OLD)
    name, template = resolve_template(run_with(), family_named(family), tokenizer, resumed=folder)
    assert (name, prompt(template, tokenizer)) == ("glm4", OLD_PROMPT)


def test_a_run_is_not_resumed_with_another_template(tmp_path, tokenizer):
    folder = stored(tmp_path / "run", OLD)
    with pytest.raises(
        CheckpointError, match=r"model\.template=plain: the run in .*run is trained with model\.template=glm4; leave"
    ):
        resolve_template(run_with("model.template=plain"), family_named("glm"), tokenizer, resumed=folder)


def test_a_resumed_run_goes_on_with_the_jinja_that_is_stored_with_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = stored(tmp_path / "run", {"name": "tokenizer", "jinja": source, "thinking": "auto"}, name="tokenizer")
    (folder / "template.jinja").write_text(source, encoding="utf-8")
    name, template = resolve_template(run_with("model.template=tokenizer"), None, tokenizer, resumed=folder)
    assert (name, template.source) == ("tokenizer", source)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_model_that_was_exported_before_is_asked_as_it_was_trained(tmp_path, tokenizer, family):
    (tmp_path / "export.json").write_text(json.dumps({"template": OLD}), encoding="utf-8")
    name, template = resolve_template(run_with(f"model.model_name_or_path={tmp_path}"), family_named(family), tokenizer)
    assert (name, prompt(template, tokenizer)) == ("glm4", OLD_PROMPT)
    name, template = resolve_template(
        run_with(f"model.model_name_or_path={tmp_path}", "model.template=plain"), family_named(family), tokenizer
    )
    assert name == "plain"


def test_a_run_of_chatglm3_goes_on_with_the_stop_token_that_it_learned():
    old = {
        "name": "chatglm3",
        "example": "[gMASK]sop<|system|>\n{system}<|user|>\n{user}<|assistant|>\n{assistant}",
        "tokenized_apart": ["\n", "{system}", "\n", "{user}", "\n", "{assistant}"],
        "learned": ["\n", "{assistant}"],
        "one_answer_a_row": False,
        "stop": "</s>",
    }
    today = json.loads(json.dumps(TEMPLATES["chatglm3"].describe()))
    version = version_stored("chatglm3", old)
    assert version is not TEMPLATES["chatglm3"] and not version.inner_stop and version.calls
    assert version_stored("chatglm3", today) is TEMPLATES["chatglm3"]
    assert version_stored("chatglm3", {**old, "example": "?"}) is None
    assert version_stored("glm4", old) is None


def test_a_version_that_is_not_known_is_said(tmp_path, tokenizer, capsys):
    folder = stored(tmp_path / "run", {**OLD, "example": "[gMASK]{user}"})
    _, template = resolve_template(run_with(f"model.checkpoint_dir={folder}"), family_named("glm"), tokenizer)
    assert prompt(template, tokenizer) == PROMPT
    said = " ".join(capsys.readouterr().err.split())
    assert "model.template=glm4: " in said and '"[gMASK]{user}"' in said and "train it again" in said


def test_weights_of_before_that_are_not_shipped_any_more_are_said(tmp_path, tokenizer, capsys):
    folder = stored(tmp_path / "run", OLD)
    resolve_template(run_with(f"model.checkpoint_dir={folder}"), family_named("glm"), tokenizer)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"model.model_name_or_path=package://tiny_glm: {folder} was trained on the weights of an earlier version"
        in said
    )
    (folder / "model").mkdir()  # all of its weights are its own
    resolve_template(run_with(f"model.checkpoint_dir={folder}"), family_named("glm"), tokenizer)
    assert capsys.readouterr().err == ""
