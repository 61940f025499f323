"""Files of trained weights."""

from pathlib import Path

import torch

from glmtuner.families.weight_files import file_metadata
from glmtuner.finetuning.trained import load_tensors, save_tensors


def test_a_file_with_metadata_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    """safetensors writes the metadata of a header in the order of a hash table."""
    tensors, metadata = (
        {"单位.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)},
        {f"key{n}": "值" for n in range(8)},
    )
    for time in range(4):
        save_tensors(tensors, tmp_path / f"{time}.safetensors", **metadata)
        assert (tmp_path / f"{time}.safetensors").read_bytes() == (tmp_path / "0.safetensors").read_bytes()
    found = load_tensors(tmp_path / "3.safetensors")
    assert found.keys() == tensors.keys() and all(found[name].equal(value) for name, value in tensors.items())
    assert file_metadata(tmp_path / "3.safetensors") == {"format": "pt", **metadata}
