"""Each rank's rows of every weight, put together, are what plain transformers loads; nobody computes with what stands in for them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import AutoModelForCausalLM

from glmtuner.distributed import ranks, shares
from glmtuner.models.load import is_finite

NAMES = [
    "glm",
    "glm4_moe",
    "llama",
    "gemma",
    "mixtral",
    "qwen3_moe",
    "gpt_neox",
    "jamba",
]  # tied, converted, stacked, biases


@contextmanager
def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> Iterator[None]:
    """Within this, the process is one of several ranks, which all have the same."""
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "rank", lambda: rank)
        patched.setattr(ranks, "world_size", lambda: count)
        patched.setattr(ranks, "all_gather", lambda value: [value] * count)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("zoo")
    return lambda name: folder / name if (folder / name).is_dir() else zoo.write_checkpoint(name, folder / name)


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_rows_of_all_ranks_are_the_weights(
    name: str, count: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name)
    whole = loaded(folder)
    parts = []
    for rank in range(count):
        with as_rank(monkeypatch, rank, count), shares.loading_shares():
            parts.append(loaded(folder))
    for path, value in whole.named_parameters():
        found = [dict(part.named_parameters())[path] for part in parts]
        assert all(
            shares.is_stand_in(each) and each.isnan().all() and each.untyped_storage().nbytes() <= 4 for each in found
        ), path
        rows = [shares.share_of(each) for each in found]
        assert torch.equal(torch.cat(rows), value), path
        # the same rows as torch's own
        chunks = value.chunk(count)
        assert [len(each) for each in rows if len(each)] == [len(each) for each in chunks]
        assert sum(each.untyped_storage().nbytes() for each in rows) == value.numel() * 4, (
            "a view keeps all of its storage"
        )
    for part in parts:
        assert {path for path, _ in part.named_parameters()} == {
            path for path, _ in whole.named_parameters()
        }  # tied where it is
        for path, value in whole.named_buffers():
            assert torch.equal(dict(part.named_buffers())[path], value), path


def test_tied_weights_that_the_checkpoint_has_twice_are_compared_by_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    folder = zoo.write_checkpoint("gemma", tmp_path / "gemma")
    tensors = load_file(folder / "model.safetensors")
    for change, is_tied in ((0.0, True), (1.0, False)):
        head = tensors["model.embed_tokens.weight"] + change
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        whole = loaded(folder)
        with as_rank(monkeypatch, 1, 2), shares.loading_shares():
            part = loaded(folder)
        assert (whole.lm_head.weight is whole.model.embed_tokens.weight) is is_tied
        assert (part.lm_head.weight is part.model.embed_tokens.weight) is is_tied


def test_a_cast_takes_no_memory_and_casts_the_rows() -> None:
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
    made = shares.stand_in(parameter)
    shares.cast(made, torch.float32)
    assert made.dtype == torch.float32 and made.shape == (5, 3) and made.untyped_storage().nbytes() == 4
    assert torch.equal(shares.share_of(made), parameter.float())
    plain = nn.Parameter(torch.randn(2, dtype=torch.bfloat16))
    shares.cast(plain, torch.float32)
    assert plain.dtype == torch.float32


def test_a_copy_stays_when_the_parameter_changes() -> None:
    made = shares.stand_in(nn.Parameter(torch.zeros(4, 2)))
    copied = shares.copy_of(made)
    shares.share_of(made).add_(1)
    assert isinstance(copied, shares.Share) and copied.rows.eq(0).all()


def test_what_is_computed_from_stand_ins_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = shares.stand_in(model[0].weight)
    assert shares.computed_with_stand_ins(model, is_finite) == []
    model.add_module("copied", copy.deepcopy(nn.ParameterList([nn.Parameter(model[0].weight.detach() * 2)])))
    assert shares.computed_with_stand_ins(model, is_finite) == ["copied.0"]
