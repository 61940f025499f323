"""A folder of the board, and a function that writes runs into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from board_folders import write_run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """The folder of the board."""
    path = tmp_path / "outputs"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture
def run(outputs: Path) -> Callable[..., Path]:
    """`write_run` below the folder of the board."""

    def make(name: str, *arguments: Any, **files: Any) -> Path:
        return write_run(outputs / name, *arguments, **files)

    return make
