"""What the fast paths compute, through the command line: the losses of the plain one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from glmtuner.config.paths import ASSETS

WORDS = [
    *("model=tiny_glm", "data.dataset=alpaca_zh_sample", "data.max_samples=12", "tracker=none", "metric=none"),
    *("finetuning.lora_dropout=0", "trainer.logging_steps=1", "trainer.learning_rate=1e-2"),
]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def fast_paths(folder: Path) -> dict[str, int]:
    """The fast paths in metrics.json."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name.removeprefix("fast_path_"): value for name, value in metrics.items() if "fast_path" in name}


def assert_same_run(found: Path, wanted: Path) -> None:
    for mine, theirs in zip(history(found), history(wanted), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    theirs = load_file(wanted / "adapter" / "adapter_model.safetensors")
    for name, value in load_file(found / "adapter" / "adapter_model.safetensors").items():
        # as a whole: where a gradient is nearly 0, Adam's first steps make something of its rounding
        assert (value - theirs[name]).norm() <= 2e-3 * max(theirs[name].norm(), 1e-3), name


def test_without_padding_a_run_is_what_it_is_with_it(glmtuner, tmp_path):
    words = [*WORDS, "trainer.per_device_train_batch_size=4", "trainer.num_train_epochs=2", "data.dev_ratio=0.2"]
    words += ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.gradient_accumulation_steps=2"]
    for name, value in (("free", "true"), ("padded", "false")):
        done = glmtuner(*words, f"data.padding_free={value}", f"trainer.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        left_out = "left out: batches without padding (data.padding_free=false)"
        assert "fast paths" in done.stdout and (left_out in done.stdout) == (name == "padded")
        assert fast_paths(tmp_path / name) == {
            "without_padding": int(name == "free"), "chunked_loss": 1, "fused_lora": 1,
        }  # fmt: skip
    assert_same_run(tmp_path / "free", tmp_path / "padded")
    losses = [(tmp_path / name / "losses.jsonl").read_text().splitlines() for name in ("free", "padded")]
    for mine, theirs in zip(*losses, strict=True):
        assert json.loads(mine) == pytest.approx(json.loads(theirs), abs=1e-3)


def test_a_packed_run_is_an_unpacked_one_with_the_same_samples_a_step(glmtuner, tmp_path):
    words = [*WORDS, "trainer.num_train_epochs=3", "trainer.per_device_train_batch_size=12"]
    words += ["trainer.group_by_length=true"]  # which says nothing of packs
    for name in ("true", "false"):
        done = glmtuner(*words, f"data.packing={name}", f"trainer.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert ("packed rows, 3 epochs" in done.stdout) == (name == "true")
    assert len(history(tmp_path / "true")) == 3
    assert_same_run(tmp_path / "true", tmp_path / "false")


def test_samples_that_cannot_be_kept_apart_are_grouped_by_length(glmtuner, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.save_pretrained(tmp_path / "bloom")
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bloom")
    words = [*WORDS[1:], "model=causal_lm", f"model.model_name_or_path={tmp_path / 'bloom'}", "data.packing=true"]
    words += ["trainer.per_device_train_batch_size=3", "trainer.max_steps=2", f"trainer.output_dir={tmp_path / 'out'}"]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.replace("│", " ").split())
    assert "batches of similar length" in told
    assert "batches without padding (BloomForCausalLM does not compute attention through" in told
    assert fast_paths(tmp_path / "out") == {"without_padding": 0, "chunked_loss": 1, "fused_lora": 1}
    assert len(history(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage=dpo"], "data.packing=true with stage=dpo: only the samples of stage=sft are packed"),
        (["data.padding_free=false"], "data.packing=true with data.padding_free=false: packed rows have no padding"),
        (["data.ignore_pad_token_for_loss=false"], "data.packing=true with data.ignore_pad_token_for_loss=false"),
    ],
)
def test_what_cannot_be_packed(glmtuner, tmp_path, words, told):
    done = glmtuner(*WORDS, "data.packing=true", *words, f"trainer.output_dir={tmp_path / 'out'}")
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


STAGES = {
    "dpo": ["data.dataset=preference_sample", "stage.sft_weight=0.5"],
    "kto": ["data.dataset=feedback_sample"],
    "rm": ["data.dataset=preference_sample"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_preferences_are_learned_without_padding_as_with_it(glmtuner, tmp_path, stage):
    words = [*WORDS[:1], *WORDS[2:], *STAGES[stage], f"stage={stage}", "trainer.per_device_train_batch_size=4"]
    words += ["trainer.max_steps=3", "data.dev_ratio=0.2", "trainer.eval_strategy=steps", "trainer.eval_steps=3"]
    words += ["trainer.learning_rate=2e-3"]
    for name, value in (("free", "true"), ("padded", "false")):
        done = glmtuner(*words, f"data.padding_free={value}", f"trainer.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert (f"(stage={stage} has no use for logits)" in " ".join(done.stdout.replace("│", " ").split())) == (
            stage == "rm"
        )
        assert fast_paths(tmp_path / name) == {
            "without_padding": int(name == "free"), "chunked_loss": int(stage != "rm"), "fused_lora": 1,
            "common_beginnings": int(name == "free"),
        }  # fmt: skip
    assert_same_run(tmp_path / "free", tmp_path / "padded")


def test_a_reference_that_is_computed_before_is_the_same_reference(glmtuner, tmp_path):
    words = [*WORDS[:1], *WORDS[2:], *STAGES["dpo"], "stage=dpo", "trainer.per_device_train_batch_size=4"]
    words += ["trainer.max_steps=6", "data.dev_ratio=0.2", "trainer.do_eval=true", "trainer.learning_rate=2e-3"]
    for name, value in (("before", "true"), ("during", "false")):
        done = glmtuner(*words, f"stage.precompute_reference={value}", f"trainer.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert ("train records are computed, once" in done.stdout) == (name == "before")
    assert_same_run(tmp_path / "before", tmp_path / "during")
    tensors = load_file(tmp_path / "before/reference.safetensors")
    assert sorted(name.partition(".")[0] for name in tensors) == ["evaluation", "train"]
    assert all(tensor.shape[1] == 2 and (tensor < 0).all() for tensor in tensors.values())
    (tmp_path / "before/metrics.json").unlink()  # as if it was killed before its end
    again = glmtuner(*words, "stage.precompute_reference=true", f"trainer.output_dir={tmp_path / 'before'}")
    assert again.returncode == 0, again.stderr
    assert "train records are read from reference.safetensors" in again.stdout
