"""Fixtures of all tests: the reference values beside the checkout, a cache of their own, the command line in a child."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"  # the default suite never asks for the network
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference values and real records beside the checkout; tests that need them are skipped without."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip("needs ../shared (reference values and real records)")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized data for this session alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["GLMTUNER_CACHE"] = str(folder)
    return folder


@pytest.fixture
def glmtuner(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m glmtuner <words>` in a child process, in a folder of its own; in `env` None removes a variable."""

    def run(
        *words: str, env: dict[str, str | None] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "glmtuner", *words],
            cwd=tmp_path,
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
