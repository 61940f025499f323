"""Fixtures of all tests: the reference values beside the checkout, a cache of their own, the command line in a child."""

import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

GOLDEN = ROOT / "tests/golden"

os.environ["HF_HUB_OFFLINE"] = "1"  # the default suite never asks for the network
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference values of the published code on random weights."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared() -> Path:
    """The published tokenizers, what was trained with them, and real records; tests that need them are skipped without."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip("needs ../shared (the published tokenizers and real records)")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized data for this session alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["GLMTUNER_CACHE"] = str(folder)
    return folder


@pytest.fixture
def glmtuner_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
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


@pytest.fixture
def glmtuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same command line in this process, which saves the seconds that importing torch takes."""
    from glmtuner.cli.main import main

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main(list(words))
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
            except Exception:
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())

    return run
