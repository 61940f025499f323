"""Files of weights: the same bytes, by how much tensors differ, tensors of other shapes, damaged files."""

import torch
from safetensors.torch import save_file

from glmtuner.compare.tensors import compare_tensors

WEIGHTS = {
    "a": torch.tensor([3.0, 4.0]),
    "b": torch.arange(6.0).reshape(2, 3),
    "c": torch.ones(2, dtype=torch.bfloat16),
}


def files(folder, name, weights, **metadata):
    folder = folder / name
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata or None)
    return {"model.safetensors": folder / "model.safetensors"}


def test_the_same_bytes(tmp_path):
    found = compare_tensors(files(tmp_path, "one", WEIGHTS), files(tmp_path, "other", WEIGHTS))
    assert found.same_bytes and (found.files, found.tensors, found.differing) == (1, 3, 0)


def test_the_tensor_that_differs_most_is_named_with_its_distance(tmp_path):
    other = {**WEIGHTS, "a": torch.tensor([3.0, 4.5]), "c": torch.tensor([1.0, 1.25], dtype=torch.bfloat16)}
    found = compare_tensors(files(tmp_path, "one", WEIGHTS), files(tmp_path, "other", other))
    assert not found.same_bytes and (found.differing, found.name, found.largest) == (2, "a", 0.5)
    assert abs(found.relative - 0.1) < 1e-12  # 0.5 over the norm of (3, 4)


def test_other_bytes_of_the_same_values(tmp_path):
    found = compare_tensors(files(tmp_path, "one", WEIGHTS), files(tmp_path, "other", WEIGHTS, format="pt"))
    assert not found.same_bytes and (found.other_bytes, found.differing) == (1, 0)


def test_shapes_names_and_files_that_only_one_has(tmp_path):
    other = {"a": torch.zeros(3), "d": torch.zeros(1), "c": WEIGHTS["c"]}
    one = files(tmp_path, "one", WEIGHTS)
    found = compare_tensors(one, files(tmp_path, "other", other))
    assert found.unlike == [
        "b is only in one",
        "d is only in one",
        "1 tensor has another shape, such as a, [2] and [3]",
    ]
    assert compare_tensors(one, {}).unlike == ["model.safetensors is only in one"]


def test_a_value_that_is_no_number_is_infinitely_far(tmp_path):
    found = compare_tensors(
        files(tmp_path, "one", WEIGHTS), files(tmp_path, "other", {**WEIGHTS, "a": torch.tensor([3.0, torch.nan])})
    )
    assert (found.name, found.largest) == ("a", torch.inf)


def test_a_truncated_file_is_named(tmp_path):
    one, other = files(tmp_path, "one", WEIGHTS), files(tmp_path, "other", WEIGHTS)
    path = other["model.safetensors"]
    path.write_bytes(path.read_bytes()[:-3])
    (sentence,) = compare_tensors(one, other).unlike
    assert str(path) in sentence and "damaged" in sentence
