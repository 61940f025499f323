"""Adapters that PEFT made, of every setting that finetuning=lora has: their loss is PEFT's own, unmerged, merged and exported."""

import json
from pathlib import Path

import pytest
import torch
from adapter_bases import IDS, base, loss
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from glmtuner.errors import CheckpointError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.peft import Peft, peft_types
from glmtuner.finetuning.start import LORA, TUNED, Checkpoint, build_trainable_model, checkpoint_in
from glmtuner.kernels.fused_lora import fuse_lora

torch.set_num_threads(1)

NAMES = {
    "glm": ("q_proj", "v_proj", "self_attn.q_proj", "lm_head", "mlp.down_proj.weight", "norm"),
    "qwen3": ("q_proj", "v_proj", "self_attn.q_proj", "lm_head", "mlp.down_proj.weight", "norm"),
    "chatglm2": (
        "query_key_value", "dense_h_to_4h", "self_attention.query_key_value", "output_layer", "mlp.dense_4h_to_h.weight", "final_layernorm",
    ),
}  # fmt: skip


def settings(name: str) -> dict[str, dict[str, object]]:
    """Setting -> the arguments of PEFT's LoraConfig."""
    first, second, path, head, parameter, norm = NAMES[name]
    return {
        "use_rslora": {"use_rslora": True},
        "use_dora": {"use_dora": True},
        "gaussian": {"init_lora_weights": "gaussian"},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "mica": {"init_lora_weights": "mica"},
        "eva": {
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(),
            "rank_pattern": {second: 2},
            "alpha_pattern": {second: 4},
        },
        "rank_pattern": {"rank_pattern": {first: 2}, "alpha_pattern": {rf"layers\.1\.{path}": 3}},
        "exclude_modules": {"exclude_modules": r".*layers\.0\..*"},
        "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
        "lora_bias": {"lora_bias": True, "target_modules": [first]},
        "bias": {"bias": "all"},
        "modules_to_save": {"modules_to_save": [head, norm]},
        "trainable_token_indices": {"trainable_token_indices": [7, 9]},
        "target_parameters": {"target_parameters": [parameter]},
    }


def save(name: str, config: PeftConfig, folder: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base(name), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.05 * torch.randn_like(value)
    model.save_pretrained(folder)


def started(name: str, folder: Path, method: object, kind: object = LORA) -> torch.nn.Module:
    model = base(name)
    family = family_from_structure(model)
    return build_trainable_model(
        model, method, family, [Checkpoint(kind, folder)], resume_lora=True, trains=False, user_keys=set()
    )[0]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", settings("glm"))
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_peft_s_unmerged_merged_and_exported(tmp_path: Path, name: str, setting: str) -> None:
    first, second, *_ = NAMES[name]
    values = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [first, second],
        "task_type": "CAUSAL_LM",
        **settings(name)[setting],
    }
    save(name, LoraConfig(**values), tmp_path / "adapter")
    expected = loss(PeftModel.from_pretrained(base(name), tmp_path / "adapter"))
    assert abs(expected - loss(base(name))) > 1e-4
    lora = Lora(finetuning_type="lora", lora_rank=8, lora_alpha=32.0, lora_dropout=0.1, lora_target=[first])
    unmerged = started(name, tmp_path / "adapter", lora)
    assert loss(unmerged) == pytest.approx(expected, abs=1e-5)
    fuse_lora(unmerged)
    assert loss(unmerged) == pytest.approx(expected, abs=1e-5)
    merged = started(name, tmp_path / "adapter", NoTuning(finetuning_type="none"))
    assert loss(merged) == pytest.approx(expected, abs=1e-5)
    merged.save_pretrained(tmp_path / "model")
    again = type(merged).from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loss(again) == pytest.approx(expected, abs=1e-5)


def raw(how: str, folder: Path) -> torch.Tensor:
    """Save an adapter that took something off its base, as PEFT's examples do it, unconverted; returns the model's logits."""
    model = base("qwen3")
    configs = {"lora_ga": {"lora_ga_config": LoraGAConfig()}, "corda": {"corda_config": CordaConfig()}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=how, task_type="CAUSAL_LM", **configs.get(how, {}))  # fmt: skip
    if how == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    if how == "corda":
        preprocess_corda(model, config, run_model=lambda: [model(input_ids=IDS[:1].repeat(1, 4)) for _ in range(8)])
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    return adapted(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("pissa_niter_16", "it took a random SVD off the base's weights, which loading draws again with other values, in PEFT too; convert"),
        ("lora_ga", "which PEFT leaves out when it loads the adapter; convert the adapter where it was trained"),
        ("corda", "without which PEFT does not load it either; convert the adapter where it was trained"),
    ],
)  # fmt: skip
def test_what_peft_does_not_load_as_it_was_is_refused_with_the_reason(tmp_path: Path, how: str, told: str) -> None:
    expected = raw(how, tmp_path)
    model = base("qwen3")
    torch.manual_seed(2)
    try:
        by_peft = PeftModel.from_pretrained(model, tmp_path)(input_ids=IDS).logits
    except ValueError as error:
        assert how == "corda" and "`eigens` attribute not found" in str(error)
    else:
        assert (by_peft - expected).abs().max() > 0.1
    with pytest.raises(CheckpointError, match=rf"init_lora_weights={how}: .*{told}"):
        checkpoint_in(str(tmp_path)).settings()


def test_an_adapter_of_loftq_is_refused_with_the_reason(tmp_path: Path) -> None:
    """PEFT initializes and loads it with CUDA alone."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base("qwen3"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(
        json.dumps({**saved, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})
    )
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError, match="CUDA"):
            PeftModel.from_pretrained(base("qwen3"), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"init_lora_weights=loftq: .*which PEFT repeats on a GPU alone; merge it"
    ):
        checkpoint_in(str(tmp_path)).settings()


PEFT_TYPES: dict[str, dict[str, object]] = {
    "ADALORA": {"skip": "test_adalora.py has it: its ranks change"},
    "ADAMSS": {"skip": "needs scikit-learn"}, "ADAPTION_PROMPT": {"skip": "has PEFT's code for Llama, Mistral and GPT-2 alone"},
    "BEFT": {}, "BOFT": {}, "C3A": {"block_size": 8}, "DEFT": {}, "DELORA": {}, "FOURIERFT": {"n_frequency": 16}, "FROD": {}, "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2}, "HIRA": {}, "HRA": {}, "IA3": {"feedforward_modules": []}, "LILY": {},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]}, "LOHA": {}, "LOKR": {}, "MISS": {"r": 8}, "OFT": {"oft_block_size": 8},
    "OSF": {}, "PEANUT": {}, "PSOFT": {"r": 8}, "PVERA": {"r": 8}, "RANDLORA": {"r": 8}, "ROAD": {"group_size": 16}, "SHIRA": {"r": 2},
    "SUPERTUNING": {}, "TINYLORA": {}, "TRAINABLE_TOKENS": {"token_indices": [7, 9], "target_modules": ["embed_tokens"]}, "UNILORA": {},
    "VBLORA": {"vector_length": 8, "num_vectors": 16}, "VERA": {"r": 8}, "WAVEFT": {"n_frequency": 16},
}  # fmt: skip
UNMERGEABLE = ("LILY",)


def test_every_method_of_peft_is_tried_or_refused() -> None:
    from glmtuner.finetuning.peft import REFUSED

    assert {*PEFT_TYPES} | {*REFUSED} == peft_types()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peft_type", [name for name, values in PEFT_TYPES.items() if "skip" not in values])
def test_every_method_of_peft_trains_is_saved_and_gives_peft_s_loss(tmp_path: Path, peft_type: str) -> None:
    values = {"target_modules": ["q_proj", "k_proj", "v_proj"], **PEFT_TYPES[peft_type]}
    model = base("qwen3")
    family, before = family_from_structure(model), loss(model)
    torch.manual_seed(2)
    method = Peft(finetuning_type="peft", peft_type=peft_type, config=values)
    attached = method.attach(model, family).train()
    trained = [value for value in attached.parameters() if value.requires_grad]
    assert trained and all(value.dtype == torch.float32 for value in trained)
    optimizer = torch.optim.SGD(trained, lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        attached(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        for value in trained:
            value += 0.02 * torch.randn_like(value)
    expected = loss(attached)
    assert expected != before
    method.save(attached, tmp_path / "adapter")
    torch.manual_seed(99)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path / "adapter", config=config)) == pytest.approx(
        expected, abs=1e-5
    )
    torch.manual_seed(98)
    resumed = started("qwen3", tmp_path / "adapter", Peft(finetuning_type="peft", peft_type=peft_type), TUNED)
    assert loss(resumed) == pytest.approx(expected, abs=1e-5)
    none = NoTuning(finetuning_type="none")
    if peft_type in UNMERGEABLE:
        with pytest.raises(
            Exception, match=r"cannot be merged into this model: .* use it unmerged, with finetuning=peft"
        ):
            started("qwen3", tmp_path / "adapter", none, TUNED)
        return
    assert loss(started("qwen3", tmp_path / "adapter", none, TUNED)) == pytest.approx(expected, abs=1e-5)
