"""Adapters that PEFT saved: each gives PEFT's own logits, resumed, merged and trained further, or is refused by the setting's name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GlmConfig, GlmForCausalLM

from glmtuner.config.groups import Model
from glmtuner.errors import CheckpointError
from glmtuner.families import FAMILIES
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG, adapter_parameters, lora_settings
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.p_tuning import PTuning
from glmtuner.finetuning.start import LORA, Checkpoint, build_trainable_model, check_checkpoints
from glmtuner.finetuning.trained import trained_parameters

torch.set_num_threads(1)

IDS = torch.randint(2, 48, (2, 9), generator=torch.Generator().manual_seed(3))
ATTENTION = ["q_proj", "k_proj", "v_proj"]
HONOURED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 100}},
    "alpha_pattern_of_a_layer": {"alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 1}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "v_proj": 7}, "use_rslora": True},
    "dora": {"use_dora": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "modules_to_save_norm": {"modules_to_save": ["norm"]},
    "some_layers": {"layers_to_transform": [1]},
    "one_layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "regex": {"target_modules": r".*layers\.0\.self_attn\.(q|k)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "exclude_pattern": {"exclude_modules": r".*layers\.0\..*"},
    "exclude_names": {"exclude_modules": ["v_proj"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "a_module_by_its_path": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "no_task": {"task_type": None},
}
REFUSED = {
    "layer_replication": {"layer_replication": [[0, 1], [0, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "use_qalora": {"use_qalora": True},
    "kasa_config": {"kasa_config": {}},
    "velora_config": {"velora_config": {}},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
}


def base(tied: bool = False) -> GlmForCausalLM:
    torch.manual_seed(0)
    config = GlmConfig(
        num_hidden_layers=2, vocab_size=48, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1, attention_bias=True, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return GlmForCausalLM(config).eval()


def save_adapter(folder: Path, tied: bool = False, **settings: object) -> Path:
    """An adapter with random weights, saved by PEFT."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(1)
    model = get_peft_model(base(tied), LoraConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, **values: object) -> Path:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def model_of(folder: Path, name: str = "x", **more: object) -> Model:
    return Model(model_name_or_path=name, family="glm", checkpoint_dir=[str(folder)], **more)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def peft_logits(folder: Path, tied: bool = False) -> torch.Tensor:
    """What PEFT itself computes with the files."""
    return logits(PeftModel.from_pretrained(base(tied), folder))


def lora(**settings: object) -> Lora:
    values = {"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.0, "lora_target": ATTENTION, **settings}
    return Lora(finetuning_type="lora", **values)


def started(folder: Path, how: str = "resumed", tied: bool = False, model: torch.nn.Module | None = None):
    method = NoTuning(finetuning_type="none") if how == "merged" else lora()
    return build_trainable_model(
        base(tied) if model is None else model, method, FAMILIES["glm"], [Checkpoint(LORA, folder)],
        resume_lora=True, trains=how == "trained", user_keys=set(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HONOURED)
def test_every_setting_gives_peft_s_logits(adapters: Path, tmp_path: Path, name: str) -> None:
    folder = save_adapter(adapters / name, **HONOURED[name])
    wanted = peft_logits(folder)
    assert (wanted - logits(base())).abs().max() > 1e-2
    resumed, method = started(folder)
    assert (logits(resumed) - wanted).abs().max() < 1e-6
    assert (logits(started(folder, "merged")[0]) - wanted).abs().max() < 1e-4
    trained, method = started(folder, "trained")
    with torch.no_grad():
        for parameter in trained_parameters(trained).values():
            parameter += 0.1 * torch.randn_like(parameter)
    method.save(trained, tmp_path / "again")
    written = peft_logits(tmp_path / "again")
    assert (written - wanted).abs().max() > 1e-3
    assert (written - logits(trained)).abs().max() < 1e-6
    assert (logits(started(tmp_path / "again")[0]) - written).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    folder = save_adapter(tmp_path / "adapter")
    change(folder, **REFUSED[name])
    with pytest.raises(CheckpointError, match=rf"cannot be used as it was trained: {name}=.*: "):
        check_checkpoints(model_of(folder))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"use_future_lora": True, "peft_version": "9.9"}, r"use_future_lora=true: the installed PEFT .* saved by 9\.9\)"),
        ({"r": "8"}, "r=\"8\": legal is a whole number"),
        ({"r": 10**9}, f"a rank of {10**9}, and .* have 4 at most"),
        ({"rank_pattern": {"q_proj": 10**9}}, "a rank of 1000000000"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": float("nan")}, "lora_alpha=NaN: legal is a number above 0"),
        ({"lora_dropout": 2}, r"lora_dropout=2: legal is a share in \[0, 1\)"),
        ({"target_modules": "("}, "target_modules=\"\\(\": legal is a list of names or a regular expression"),
        ({"target_modules": [1]}, r"target_modules=\[1\]"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"use_dora": "yes"}, "use_dora=\"yes\": legal is true or false"),
        ({"bias": True}, "bias=true: legal is none, all or lora_only"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern="),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform with a regular expression"),
        ({"peft_type": 5}, "not an object with a peft_type"),
    ],
)  # fmt: skip
def test_a_broken_configuration_is_one_paragraph(tmp_path: Path, values: dict, told: str) -> None:
    folder = change(save_adapter(tmp_path / "adapter"), **values)
    with pytest.raises(CheckpointError, match=told):
        check_checkpoints(model_of(folder))


def test_what_peft_itself_refuses_is_one_paragraph(tmp_path: Path) -> None:
    folder = change(save_adapter(tmp_path / "adapter"), use_dora=True, lora_bias=True)
    with pytest.raises(CheckpointError, match=r"PEFT refuses its adapter_config\.json"):
        started(folder)


def test_harmless_settings_are_not_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    wanted = peft_logits(folder)
    change(
        folder, enable_lora=None, merge_weights=False, use_future_lora=None, future_options={}, loftq_config={}, megatron_core="x",
        qalora_group_size=32, inference_mode=True, lora_dropout=None,
    )  # fmt: skip
    check_checkpoints(model_of(folder))
    assert torch.equal(logits(started(folder)[0]), wanted)


def spoil(folder: Path, how: str) -> None:
    tensors = load_file(folder / ADAPTER)
    first = next(name for name in sorted(tensors) if "lora_A" in name)
    if how == "missing":
        del tensors[first]
    elif how == "left over":
        tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    elif how == "another name":
        tensors[first.replace("layers", "blocks")] = tensors.pop(first)
    elif how == "shape":
        tensors[first] = torch.zeros(4, 31)
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
    elif how == "infinite":
        tensors[first][0, 0] = float("inf")
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}], ids=["plain", "dora"])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", r"does not fit this model: of its parameters 1 are missing \(such as base_model"),
        ("left over", r"does not fit this model: of its parameters 1 belong to another model \(such as .*layers\.2"),
        ("another name", r"1 are missing .*, 1 belong to another model"),
        ("shape", r"1 have another shape"),
        ("nan", r"NaN or infinite, in 1 of"),
        ("infinite", r"NaN or infinite, in 1 of"),
    ],
)
def test_weights_that_do_not_fit_wholly_are_refused(tmp_path: Path, settings: dict, how: str, told: str) -> None:
    folder = save_adapter(tmp_path / "adapter", **settings)
    spoil(folder, how)
    for what in ("resumed", "merged", "trained"):
        with pytest.raises(CheckpointError, match=told):
            started(folder, what)


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_changes_the_logits_is_refused(tmp_path: Path) -> None:
    """PEFT merges the head's update into the tied embedding, too, whose unmerged forward does not have it."""
    folder = save_adapter(tmp_path / "adapter", tied=True, target_modules=["q_proj", "lm_head"])
    assert (logits(started(folder, tied=True)[0]) - peft_logits(folder, tied=True)).abs().max() < 1e-6
    with pytest.raises(
        CheckpointError, match=r"cannot be merged into this model: merged, a logit differs by .*float32 explains"
    ):
        started(folder, "merged", tied=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_a_half_precision_merge_is_not_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_adapter(tmp_path / "adapter", use_rslora=True, lora_alpha=32)
    merged = logits(started(folder, "merged", model=base().to(dtype))[0].float())
    assert 0 < (merged - peft_logits(folder)).abs().max() < 0.3


def test_half_precision_parts_are_not_trained_further(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", bias="all")
    with pytest.raises(CheckpointError, match=r"would be trained in half precision.*model\.dtype=float32 avoids it"):
        started(folder, "trained", model=base().to(torch.bfloat16))
    started(folder, model=base().to(torch.bfloat16))


def notices(folder: Path, capsys: pytest.CaptureFixture, name: str = "org/Base", **model: object) -> str:
    check_checkpoints(model_of(folder, name, **model))
    return " ".join(capsys.readouterr().out.split())


def test_another_base_revision_or_task_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = change(save_adapter(tmp_path / "adapter"), base_model_name_or_path="org/Base")
    for same in ("org/Base", "/models/base", "mirror/base/", "/hub/models--org--Base/snapshots/0123"):
        assert notices(folder, capsys, same) == ""
    assert "was trained on org/Base, and is applied to org/Other" in notices(folder, capsys, "org/Other")
    change(folder, revision="v2")
    assert "was trained on revision v2 of org/Base, and is applied to main" in notices(folder, capsys)
    assert notices(folder, capsys, model_revision="v2") == ""
    change(folder, revision=None, task_type="SEQ_CLS", use_rslora=True, alpha_pattern={"q_proj": 3})
    told = notices(folder, capsys)
    assert "was trained for SEQ_CLS, and is applied to a causal language model" in told
    assert 'is used with its own alpha_pattern={"q_proj": 3}, use_rslora=true' in told


def test_names_are_written_in_order(tmp_path: Path) -> None:
    targets = ["v_proj", "down_proj", "q_proj", "o_proj", "gate_up_proj", "k_proj"]
    method = lora(lora_target=targets)
    method.save(method.attach(base(), FAMILIES["glm"]), tmp_path / "fresh")
    assert json.loads((tmp_path / "fresh" / ADAPTER_CONFIG).read_text())["target_modules"] == sorted(targets)
    folder = save_adapter(
        tmp_path / "adapter", target_modules=targets, exclude_modules=["o_proj", "down_proj", "x", "a", "b"]
    )
    model, method = started(folder)
    method.save(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / ADAPTER_CONFIG).read_text())
    assert again["target_modules"] == sorted(targets)
    assert again["exclude_modules"] == ["a", "b", "down_proj", "o_proj", "x"]


def test_the_names_in_the_file_are_peft_s(tmp_path: Path) -> None:
    settings = {"use_dora": True, "bias": "lora_only", "modules_to_save": ["norm"]}
    folder = save_adapter(tmp_path / "adapter", **settings)
    assert adapter_parameters(started(folder)[0]).keys() == load_file(folder / ADAPTER).keys()
    assert lora_settings(folder)["lora_rank"] == 4


def test_a_peft_checkpoint_of_another_name_or_format_is_read(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    wanted = peft_logits(folder)
    torch.save(load_file(folder / ADAPTER), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (folder / ADAPTER).unlink()
    shutil.copy(tmp_path / "old.bin", folder / "adapter_model.bin")
    assert torch.equal(logits(started(folder)[0]), wanted)
    for content, told in (
        ({"model": {}}, "not a checkpoint of named tensors"),
        ([1], "not a checkpoint of named tensors"),
    ):
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=told):
            started(folder)


def test_a_prefix_of_peft_is_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    """PEFT's prefix is in the cache: it shifts positions, and with ours a logit was off by 3."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(base(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="was trained by PEFT, where it shifts the positions"):
        check_checkpoints(model_of(tmp_path / "theirs"))
    method = PTuning(finetuning_type="p_tuning", pre_seq_len=4)
    method.save(method.attach(base(), FAMILIES["glm"]), tmp_path / "ours")
    check_checkpoints(model_of(tmp_path / "ours"))
    change(tmp_path / "ours", num_virtual_tokens=10**9)
    with pytest.raises(CheckpointError, match=r"num_virtual_tokens=1000000000 in .* the weights hold 4 prefix tokens"):
        check_checkpoints(model_of(tmp_path / "ours"))


@pytest.mark.filterwarnings("ignore")
def test_base_weights_beside_an_adapter_are_used_and_not_lost(tmp_path: Path) -> None:
    """PEFT writes the embeddings of a resized vocabulary beside the adapter, and loads them into the base."""
    folder = save_adapter(tmp_path / "adapter")
    tensors = load_file(folder / ADAPTER)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(48, 32)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    assert torch.equal(logits(started(folder)[0]), peft_logits(folder))
    assert (logits(started(folder, "merged")[0]) - peft_logits(folder)).abs().max() < 1e-4
    with pytest.raises(CheckpointError, match="it holds 1 weights of its base, which would not be saved again"):
        started(folder, "trained")
