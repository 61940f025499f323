"""A tiny model of each architecture that a preset names trains one step of LoRA and predicts, through the command line.

tests/attack/test_families.py tries the other methods and export on each of them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import CONFIGS, write_model
from json_lines import lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from upstream import write_checkpoint

# model_type of config.json -> a preset of that architecture
PRESETS = {"glm": "glm_edge_1_5b", "glm4": "glm_z1_9b_0414", "glm4_moe": "glm4_5_air", "glm4_moe_lite": "glm4_7_flash", "glm_moe_dsa": "glm5_2"}  # fmt: skip
SHORT = (
    "tracker=none", "data.dataset=identity_sample", "data.eval_dataset=identity_sample", "data.max_samples=6",
    "trainer.max_steps=1", "trainer.logging_steps=1", "trainer.do_predict=true", "trainer.predict_with_generate=true",
    "generation.max_new_tokens=6", "trainer.disable_tqdm=true", "trainer.learning_rate=1e-2", "trainer.output_dir=run",
)  # fmt: skip


def test_every_architecture_is_tried() -> None:
    assert PRESETS.keys() == CONFIGS.keys()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_trains_one_step_and_predicts(glmtuner: Callable, tmp_path: Path, model_type: str) -> None:
    """And the answers are those of transformers for each prompt alone, with PEFT's adapter on the same weights."""
    from peft import PeftModel

    base = write_model(model_type, tmp_path / "base")
    done = glmtuner(f"model={PRESETS[model_type]}", "model.model_name_or_path=base", "model.template=tokenizer", *SHORT)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(tmp_path / "run/history.jsonl")[0]["grad_norm"] > 0
    answers = lines(tmp_path / "run/predictions.jsonl")
    assert len(answers) == 6

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run/adapter").eval()
    for answer in answers[:3]:
        turns = [{"role": "user", "content": answer["prompt"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert (
            tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer["predict"]
        )


def test_code_geex_trains_and_predicts(glmtuner: Callable, tmp_path: Path, upstream_files: Path) -> None:
    """In the layout of GLM-4-9B's first release, with a template of its own."""
    write_checkpoint("glm4_9b_chat", tmp_path / "base", upstream_files)
    done = glmtuner("model=codegeex4_9b", "model.model_name_or_path=base", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/provenance.json").read_text())["template"]["name"] == "codegeex4"
    assert len(lines(tmp_path / "run/predictions.jsonl")) == 6


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_mixture_of_experts_is_saved_and_read_again(glmtuner: Callable, tmp_path: Path, method: str) -> None:
    """transformers saves experts one by one and holds them in one parameter; what is read again is what was trained."""
    write_model("glm4_moe_lite", tmp_path / "base")
    extra = ["finetuning.num_layer_trainable=1"] if method == "freeze" else []
    done = glmtuner("model=glm4_7_flash", "model.model_name_or_path=base", f"finetuning={method}", *SHORT, "trainer.max_steps=3", *extra)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = glmtuner(
        "trainer=predict", "model.checkpoint_dir=run", "tracker=none", "data.dataset=identity_sample", "data.max_samples=6",
        "trainer.disable_tqdm=true", "trainer.output_dir=predicted",
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert lines(tmp_path / "predicted/predictions.jsonl") == lines(tmp_path / "run/predictions.jsonl")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= changed
    assert method == "full" or all(name.startswith("model.layers.1.mlp.") for name in changed)


@pytest.mark.parametrize(("model_type", "preset"), [("glm4_moe_lite", "glm4_7_flash"), ("glm_moe_dsa", "glm5")])
def test_a_prefix_for_latent_attention_is_learned_resumed_and_exported(
    glmtuner: Callable, tmp_path: Path, model_type: str, preset: str
) -> None:
    write_model(model_type, tmp_path / "base")
    words = (f"model={preset}", "model.model_name_or_path=base", "finetuning=p_tuning", "finetuning.pre_seq_len=3", "tracker=none",
             "data.dataset=identity_sample", "data.max_samples=6", "trainer.disable_tqdm=true", "trainer.max_steps=2",
             "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.learning_rate=0.1")  # fmt: skip
    for more in (["run"], ["again", "trainer.resume_from_checkpoint=run/checkpoints/checkpoint-1"]):
        done = glmtuner(*words, f"trainer.output_dir={more[0]}", *more[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    name = "adapter/prefix_encoder.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    exported = glmtuner("export", "run", "--to", "exported")
    assert exported.returncode == 0, exported.stdout + exported.stderr


@pytest.mark.parametrize("model_type", ["bloom", "rwkv"])
def test_a_prefix_is_refused_before_weights_are_read(glmtuner: Callable, tmp_path: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    done = glmtuner("model=causal_lm", "model.model_name_or_path=base", "finetuning=p_tuning", *SHORT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "so there are no keys and values to add a prefix to; type finetuning=lora" in done.stderr


def test_a_model_type_with_several_prompts_is_told(glmtuner: Callable, tmp_path: Path) -> None:
    """GLM-4-0414 and GLM-Z1 have the same model_type; config.json does not say which prompt a model was trained behind."""
    write_model("glm4", tmp_path / "base")
    told = "model.family=auto: config.json fits glm4, glm_z1, which are prompted differently; glm4 is used"
    words = ["model=causal_lm", "model.model_name_or_path=base", *SHORT]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told in " ".join(done.stdout.split())
    for extra in ("model.family=glm_z1", "model.template=tokenizer"):
        done = glmtuner(*words, extra, "trainer.output_dir=other", "trainer.overwrite_output_dir=true")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "model.family=auto" not in done.stdout
