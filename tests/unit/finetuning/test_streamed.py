"""What the ranks of a sharded model write, a layer at a time, is the folder of plain transformers, byte by byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_models
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glmtuner.finetuning.streamed import File, described, units_of

ROOT = Path(__file__).parent.parent.parent.parent
NAMES = ["glm", "gemma", "glm4_moe", "mixtral", "qwen3_moe", "jamba"]  # tied, stacked experts, a hybrid


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which three ranks have saved each of the models."""
    root = tmp_path_factory.mktemp("streamed")
    for name in NAMES:
        zoo.write_checkpoint(name, root / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", sharded_models.__file__, str(root), *NAMES]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_that_of_one_process(saved: Path, name: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved / name, dtype="auto")
    sharded_models.saved_small(plain)
    plain.save_pretrained(saved / f"{name}-plain")
    wanted = {path.name: path.read_bytes() for path in (saved / f"{name}-plain").iterdir()}
    found = {path.name: path.read_bytes() for path in (saved / f"{name}-saved").iterdir()}
    assert found == wanted and sum(file.endswith(".safetensors") for file in found) > 1


def test_each_rank_compares_its_rows(saved: Path) -> None:
    for found in json.loads((saved / "differing.json").read_text()):
        assert all(found[name] == [] for name in NAMES)
        assert len(found["changed"]) == 1 and "norm" in found["changed"][0]


def test_no_more_than_a_layer_is_gathered(saved: Path) -> None:
    with torch.device("meta"):
        model = zoo.built(NAMES[-1])
    layers = max(sum(path.startswith(f"model.layers.{n}.") for path in model.state_dict()) for n in range(8))
    assert 1 < json.loads((saved / "differing.json").read_text())[0]["largest"] <= layers


def test_a_full_disk_of_one_rank_is_an_error_of_all(saved: Path) -> None:
    errors = [found["full"] for found in json.loads((saved / "differing.json").read_text())]
    assert errors[1] == "OSError: [Errno 28] No space left on device"
    assert {errors[0], errors[2]} == {"OSError: rank 1: OSError: [Errno 28] No space left on device"}


def test_trained_parameters_in_one_file(saved: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved / NAMES[-1], dtype="auto")
    changed = json.loads((saved / "differing.json").read_text())[0]["changed"]
    kept = load_file(saved / "kept/trained.safetensors")
    wanted = {path: value for path, value in plain.named_parameters() if "layers.0" in path}
    assert kept.keys() == wanted.keys() and kept.keys() - {*changed}
    assert all(torch.equal(value, wanted[path]) for path, value in kept.items() if path not in changed)


def test_a_header_is_that_of_safetensors(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8)
    tensors = {f"名 \"{n}": torch.ones(n + 1, 3, dtype=dtype) for n, dtype in enumerate(dtypes)} | {"0": torch.ones(())}
    save_file(tensors, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    wanted = (tmp_path / "plain.safetensors").read_bytes()
    file = File.of(described(tensors), {"format": "pt"})
    assert wanted.startswith(file.header) and len(wanted) == file.size
    for name, begin in file.begins.items():
        numbers = tensors[name].flatten().view(torch.uint8).numpy().tobytes()
        assert wanted[begin : begin + len(numbers)] == numbers


def test_a_layer_is_a_unit() -> None:
    names = ["embed.weight", "model.layers.0.a", "model.layers.0.experts.1.b", "model.layers.10.a", "model.layers.1.a", "head.weight"]
    assert units_of(dict.fromkeys(names)) == [
        ["embed.weight"], ["model.layers.0.a", "model.layers.0.experts.1.b"], ["model.layers.10.a"], ["model.layers.1.a"],
        ["head.weight"],
    ]  # fmt: skip
