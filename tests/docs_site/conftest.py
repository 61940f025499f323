"""The site that `make docs` built, and a copy of the project's pages that a test may break."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site() -> Path:
    """site/, which `make test-docs` builds before the tests."""
    built = ROOT / "site"
    if not (built / "en/index.html").is_file():
        pytest.fail("site/ is not built: type make test-docs")
    return built


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the site is made of, copied."""
    for name in ("docs", "conf", "glmtuner", "scripts", "tests/unit/families", "tests/architectures"):
        shutil.copytree(ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    return tmp_path / "project"


@pytest.fixture
def build(checkout: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Runs the copy's own scripts/build_docs.py."""

    def built() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(checkout / "scripts/build_docs.py")]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True)

    return built
