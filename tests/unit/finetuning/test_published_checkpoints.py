"""Checkpoints that ChatGLM's own code and ChatGLM-Efficient-Tuning left behind go on here, and ours go back."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glmtuner.models  # noqa: F401, makes chatglm known
from glmtuner.errors import CheckpointError
from glmtuner.families import family_named
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.p_tuning import PTuning, save_published_prefix
from glmtuner.finetuning.start import CHANGED, LORA, PREFIX, WEIGHTS, build_trainable_model, checkpoint_in


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def started(model: torch.nn.Module, finetuning, folder: Path, family: str = "chatglm2"):
    """The model on the checkpoint in a folder, and the method with the settings in use."""
    checkpoint = checkpoint_in(str(folder))
    model, finetuning = build_trainable_model(
        model, finetuning, family_named(family), [checkpoint], resume_lora=True, trains=False, user_keys=set()
    )
    return model.eval(), finetuning


@pytest.mark.parametrize(("golden", "family"), [("chatglm_v1", "chatglm"), ("chatglm2", "chatglm2")])
@pytest.mark.parametrize("kind", ["ptuning_noproj", "ptuning_proj"])
def test_prefixes_of_the_published_trainer_load_and_are_written_back(golden_folder, tmp_path, golden, family, kind):
    source = golden_folder / golden
    saved = load_file(source / f"{kind}.safetensors")
    shutil.copy(source / "config.json", tmp_path)  # as its checkpoint folders have it
    torch.save(saved, tmp_path / "pytorch_model.bin")
    assert checkpoint_in(str(tmp_path)).kind == PREFIX
    method = PTuning(finetuning_type="p_tuning", pre_seq_len=64)
    model, method = started(base(source), method, tmp_path, family)
    assert (method.pre_seq_len, method.prefix_projection) == (8, kind == "ptuning_proj")
    values = load_file(source / "golden.safetensors")
    with torch.no_grad():
        logits = model(values[f"{kind}/single/input_ids"]).logits
    assert (logits - values[f"{kind}/single/logits"]).abs().max() < 1e-4
    method.save(model, tmp_path / "ours")
    written = torch.load(save_published_prefix(tmp_path / "ours", tmp_path / "theirs"), weights_only=True)
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_adapters_made_on_the_remote_code_models_load(upstream_files, golden_folder, tmp_path, form):
    source, golden = upstream_files / "chatglm2_realvocab", golden_folder / "parity_v2/lora/adapter_peft040"
    shutil.copy(golden / "adapter_config.json", tmp_path)
    adapter = load_file(golden / "adapter_model.safetensors")
    if form == "bin":
        torch.save(adapter, tmp_path / "adapter_model.bin")
    else:
        shutil.copy(golden / "adapter_model.safetensors", tmp_path)
    assert checkpoint_in(str(tmp_path)).kind == LORA
    ids = torch.tensor([[64790, 64792, 36474, 54591]])
    plain = base(source)
    with torch.no_grad():
        for name, value in adapter.items():
            if name.endswith("lora_B.weight"):
                stem = name.removesuffix(".lora_B.weight")
                update = 32 / 8 * value @ adapter[f"{stem}.lora_A.weight"]
                plain.get_submodule(stem.removeprefix("base_model.model.")).weight += update
        wanted = plain(ids).logits
        method = Lora(finetuning_type="lora", lora_rank=4, lora_alpha=1.0, lora_dropout=0.1, lora_target=["dense"])
        model, method = started(base(source), method, tmp_path)
        found = model(ids).logits
        merged = started(base(source), NoTuning(finetuning_type="none"), tmp_path)[0](ids).logits
    assert (method.lora_rank, method.lora_target) == (8, ["query_key_value"])
    assert (found - wanted).abs().max() < 1e-4
    assert (merged - wanted).abs().max() < 1e-4
    assert (base(source)(ids).logits - wanted).abs().max() > 1e-2


def test_weights_that_freeze_tuning_wrote_are_put_into_the_base(upstream_files, golden_folder, tmp_path):
    source = upstream_files / "chatglm2_realvocab"
    trained = load_file(golden_folder / "parity_v2/freeze/final_trainable.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    torch.save(trained, tmp_path / "pytorch_model.bin")
    assert checkpoint_in(str(tmp_path)).kind == CHANGED
    state = started(base(source), NoTuning(finetuning_type="none"), tmp_path)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())


def test_a_whole_model_is_told_from_a_part(golden_folder):
    assert checkpoint_in(str(golden_folder / "chatglm2")).kind == WEIGHTS


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_nothing_but_tensors_is_unpickled(upstream_files, golden_folder, tmp_path, capsys):
    golden = golden_folder / "parity_v2/lora/adapter_peft040"
    shutil.copy(golden / "adapter_config.json", tmp_path)
    torch.save({"x": _Evil()}, tmp_path / "adapter_model.bin")
    method = Lora(
        finetuning_type="lora", lora_rank=8, lora_alpha=32.0, lora_dropout=0.0, lora_target=["query_key_value"]
    )
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin holds more than tensors"):
        started(base(upstream_files / "chatglm2_realvocab"), method, tmp_path)
    assert "code ran" not in capsys.readouterr().out
