"""Whole models in the layouts in which transformers saves them: read again bit by bit, by every way that reads them."""

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from glmtuner.errors import CheckpointError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.full import Full
from glmtuner.finetuning.start import CHANGED, WEIGHTS, checkpoint_in
from glmtuner.finetuning.trained import differing, own_parameters, weights_in
from glmtuner.objectives.objective import Weights

# renamed, split by expert, split and renamed, transposed, as they are, tied
CONVERTED = ["gpt_neox", "glm4_moe_lite", "granitemoe", "mixtral", "jamba", "jetmoe"]
KINDS = [*CONVERTED, "gpt_oss", "gpt2", "llama", "mpt"]


def attached(kind, seed):
    model = zoo.built(kind)
    model = Full(finetuning_type="full").attach(model, family_from_structure(model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in own_parameters(model).values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_read_again_bit_by_bit(kind, tmp_path):
    model, method = attached(kind, 1), Full(finetuning_type="full")
    method.save(model, tmp_path)
    assert differing(model, tmp_path) == []
    assert checkpoint_in(str(tmp_path)).kind is WEIGHTS
    other = attached(kind, 2)
    assert len(differing(other, tmp_path)) == len(own_parameters(other))
    reference = Weights.from_checkpoint(tmp_path, other, method)
    for name, value in own_parameters(model).items():
        assert torch.equal(reference.values[name], value)
    method.restore(other, tmp_path)
    assert all(torch.equal(value, own_parameters(other)[name]) for name, value in own_parameters(model).items())


@pytest.mark.parametrize("kind", ["llama", "glm4_moe_lite", "gpt_neox"])
def test_one_changed_bit_in_a_file_is_found(kind, tmp_path):
    model = attached(kind, 1)
    Full(finetuning_type="full").save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    name = next(name for name in saved if "down_proj" in name or "dense_4h" in name)
    saved[name].view(torch.int32).flatten()[3] ^= 1
    save_file(saved, path, metadata={"format": "pt"})
    (found,) = differing(model, tmp_path)
    assert "down_proj" in found or "dense_4h" in found


@pytest.mark.parametrize("kind", ["llama", "glm4_moe_lite", "gpt_neox"])
def test_a_folder_that_lacks_a_weight_is_refused(kind, tmp_path):
    model = attached(kind, 1)
    Full(finetuning_type="full").save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    gone = next(name for name in saved if "norm" in name)
    save_file({name: value for name, value in saved.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"of its parameters 1 are missing \(such as .*norm"):
        differing(model, tmp_path)


def test_only_values_are_compared_that_a_model_has(tmp_path):
    """A folder of another architecture, whose weights transformers renames, is refused and not read in part."""
    Full(finetuning_type="full").save(attached("gpt_neox", 1), tmp_path)
    with pytest.raises(CheckpointError):
        differing(attached("glm4_moe_lite", 1), tmp_path)


def test_part_of_a_model_is_no_whole_one(tmp_path):
    save_file({"transformer.h.0.attn.c_attn.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert checkpoint_in(str(tmp_path)).kind is CHANGED


def test_what_a_model_does_not_have_is_left_out_of_what_is_read(tmp_path):
    model = attached("glm4_moe_lite", 1)
    Full(finetuning_type="full").save(model, tmp_path)
    assert weights_in(tmp_path, model).keys() == own_parameters(model).keys()
