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

from glmtuner.distributed.shard_files import read_whole
from glmtuner.errors import CheckpointError
from glmtuner.finetuning.streamed import File, described, units_of
from glmtuner.finetuning.trained import holds_trained
from glmtuner.training.optimizer_state import is_by_names, load_state

ROOT = Path(__file__).parent.parent.parent.parent
NAMES = ["glm", "gemma", "glm4_moe", "mixtral", "qwen3_moe", "jamba"]  # tied, stacked experts, a hybrid


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which three ranks have saved each of the models."""
    root = tmp_path_factory.mktemp("streamed")
    for name in NAMES:
        zoo.write_checkpoint(name, root / name)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=3",
        sharded_models.__file__,
        str(root),
        *NAMES,
    ]
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


def told(saved: Path, key: str) -> list[object]:
    return [found[key] for found in json.loads((saved / "differing.json").read_text())]


@pytest.mark.parametrize("layout", ["shards", "by-number", "by-name"])
def test_each_rank_reads_its_part_of_an_optimizer_state_in_every_layout(saved: Path, layout: str) -> None:
    """As three ranks write it, as one process does (transformers), and as earlier versions did under fsdp2."""
    assert told(saved, f"state {layout}") == [True] * 3


def test_what_ranks_have_written_beside_the_training_is_read_by_them_and_by_one_process(saved: Path) -> None:
    assert told(saved, "trained") == [True] * 3
    wanted = torch.load(saved / "values.pt") | torch.load(saved / "wanted.pt")
    for beginning in ("model.", "optimizer."):
        whole = read_whole(saved / "shards", beginning)
        assert {f"{beginning}{name}" for name in whole} == {name for name in wanted if name.startswith(beginning)}
        assert all(torch.equal(value, wanted[f"{beginning}{name}"]) for name, value in whole.items())
    # and by safetensors alone: the rows of the ranks, one after the other
    files = sorted((saved / "shards/shards").glob("*.safetensors"))
    parts = [load_file(path) for path in files]
    for name, value in wanted.items():
        rows = [part[name] for part in parts if name in part]
        assert torch.equal(torch.cat(rows) if value.dim() else rows[0], value), name
    assert len(files) == 3 and holds_trained(saved / "shards") and not holds_trained(saved / "by-name")


def test_an_optimizer_state_of_ranks_in_one_process(saved: Path) -> None:
    wanted = torch.load(saved / "wanted.pt")
    for layout in ("shards", "by-name"):
        model = AutoModelForCausalLM.from_pretrained(saved / NAMES[-1], dtype="auto")
        groups = [
            [value for path, value in model.named_parameters() if ("norm" in path) == norm] for norm in (False, True)
        ]
        optimizer = torch.optim.AdamW([*({"params": group} for group in groups), {"params": [], "lr": 0.5}])
        assert is_by_names(saved / layout)
        load_state(model, optimizer, saved / layout)
        for path, parameter in model.named_parameters():
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(value, wanted[f"optimizer.{path}.{key}"]), (layout, path, key)
        assert [group["weight_decay"] for group in optimizer.param_groups[:2]] == [0.1, 0.0]
        assert optimizer.param_groups[2]["lr"] == 0.5 and "betas" in optimizer.param_groups[2]  # without parameters
    assert not is_by_names(saved / "by-number")
    with pytest.raises(CheckpointError, match="holds the state of another optimizer"):
        load_state(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), saved / "shards")


def test_a_rank_that_cannot_write_ends_the_checkpoint_on_all(saved: Path) -> None:
    for key in ("write", "wait"):
        first, *others = told(saved, key)
        assert first == "OSError: [Errno 28] No space left on device"
        assert all(str(other).startswith("ReportedByRank0: ") and "No space left" in str(other) for other in others)
    assert told(saved, "completed") == [[], [], []]


def test_a_header_is_that_of_safetensors(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8)
    tensors = {f'名 "{n}': torch.ones(n + 1, 3, dtype=dtype) for n, dtype in enumerate(dtypes)} | {"0": torch.ones(())}
    save_file(tensors, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    wanted = (tmp_path / "plain.safetensors").read_bytes()
    file = File.of(described(tensors), {"format": "pt"})
    assert wanted.startswith(file.header) and len(wanted) == file.size
    for name, begin in file.begins.items():
        numbers = tensors[name].flatten().view(torch.uint8).numpy().tobytes()
        assert wanted[begin : begin + len(numbers)] == numbers


def test_a_layer_is_a_unit() -> None:
    names = [
        "embed.weight",
        "model.layers.0.a",
        "model.layers.0.experts.1.b",
        "model.layers.10.a",
        "model.layers.1.a",
        "head.weight",
    ]
    assert units_of(dict.fromkeys(names)) == [
        ["embed.weight"], ["model.layers.0.a", "model.layers.0.experts.1.b"], ["model.layers.10.a"], ["model.layers.1.a"],
        ["head.weight"],
    ]  # fmt: skip
