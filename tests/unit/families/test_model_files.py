"""config.json and weight files that cannot belong to a model are refused before anything is built from them."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from glmtuner.config.groups import Model
from glmtuner.errors import CheckpointError
from glmtuner.families.config_json import check_config
from glmtuner.families.hub import read_config
from glmtuner.families.weight_files import file_metadata, shard_files, tensor_shapes
from glmtuner.models.load import check_loading
from glmtuner.models.value_head import ValueHead, load_head


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "llama"))


def change(folder: Path, **values: object) -> Model:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return Model(model_name_or_path=str(folder), family="auto")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, where 4096 is the most"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers=2000, and they hold 42 tensors in all"),
        ({"num_hidden_layers": "abc", "hidden_size": -1}, "num_hidden_layers='abc', .*; hidden_size=-1, where|hidden_size=-1.*'abc'"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000 with vocab_size=40, and they hold at most"),
        ({"hidden_size": [16]}, r"hidden_size=\[16\], where a whole number of at least 1"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": 2**70}, "vocab_size=1180591620717411303424"),
        ({"intermediate_size": 10**9}, "intermediate_size=1000000000"),
        ({"intermediate_size": "24"}, "intermediate_size='24', where a whole number"),
        ({"num_attention_heads": 1.5}, "num_attention_heads=1.5"),
        ({"model_type": ["llama"]}, "model_type=.*where the name of a model type"),
        ({"text_config": {"hidden_size": -4}}, "text_config.hidden_size=-4"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(folder: Path, values: dict, told: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=told):
        read_config(change(folder, **values))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "3", "", "{", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is (damaged: it holds|not a JSON file)"):
        read_config(Model(model_name_or_path=str(folder), family="auto"))


def test_legal_configs_are_not_refused(folder: Path) -> None:
    """Null for a default, lists with a size for each layer, sizes of a model whose weights stand elsewhere."""
    read_config(change(folder, num_key_value_heads=None, intermediate_size=[24, 24, 24], head_dim=None, n_inner=0))
    large = {
        "model_type": "x",
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "vocab_size": 256000,
        "intermediate_size": 53248,
    }
    assert check_config(large, Path("config.json")) == large
    (folder / "model.safetensors").unlink()
    read_config(change(folder, num_hidden_layers=126))


def header(text: str, more: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + more


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1234567", header("{"), header("[]"), header('{"a": 1}'), struct.pack("<Q", 2**60) + b"{}",
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"12345678"),
        header('{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', b"1234"),
    ],
)  # fmt: skip
def test_a_damaged_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        tensor_shapes(tmp_path / "x.safetensors")


def test_a_header_says_what_the_file_holds(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0, 4)}, tmp_path / "x", metadata={"k": "v"}
    )
    assert tensor_shapes(tmp_path / "x") == {"a": (2, 3), "b": (), "c": (0, 4)}
    assert file_metadata(tmp_path / "x") == {"k": "v"}


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": "../other/model.safetensors"}, "which is not a file in its folder"),
        ({"a": "/etc/passwd"}, "which is not a file in its folder"),
        ({"a": "x.safetensors"}, "is incomplete: x.safetensors of"),
        ({"a": None}, "is damaged"),
        ({"a": 5, "b": "x"}, "is damaged"),
        ([], "is damaged"),
        ({}, "is incomplete"),
    ],
)
def test_an_index_that_names_other_files(tmp_path: Path, weight_map: object, told: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=told):
        shard_files(path)


def loaded(folder: Path) -> tuple:
    return LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": 2}, "which has 2 layers, leaves out 13 of the checkpoint's weights"),
        ({"attention_bias": False}, r"leaves out 12 of the checkpoint's weights \(such as model.layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 4}, "lacks 13 of the model's weights"),
        ({"mlp_bias": True}, "lacks 9 of the model's weights"),
    ],
)  # fmt: skip
def test_weights_that_the_model_would_compute_without(folder: Path, values: dict, told: str) -> None:
    change(folder, **values)
    with pytest.raises(CheckpointError, match=told):
        check_loading(*loaded(folder), "x")


def test_an_adapter_beside_the_model_is_not_added_unchecked(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_rslora=True)).save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=r"an adapter_config\.json stands beside the model.*model\.checkpoint_dir="
    ):
        check_loading(*loaded(folder), "x")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(folder: Path, value: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 of the model's weights hold values that are NaN or infinite \(such as model\.norm"
    ):
        check_loading(*loaded(folder), "x")


def test_weights_of_other_parts_are_a_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["vision.layers.7.q_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_loading(*loaded(folder), "x")
    assert "1 weights of the checkpoint are not used by the model (such as vision.layers.7" in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1], {"v_head.summary.weight": 3}, {"weight": torch.zeros(1, 4)}, {"weight": torch.full((1, 4), float("nan")), "bias": torch.zeros(1)}])  # fmt: skip
def test_a_value_head_that_does_not_fit(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "value_head.bin")
    with pytest.raises(CheckpointError, match=r"value_head\.bin is not a value head of this model"):
        load_head(ValueHead(4), tmp_path / "value_head.bin")
