"""The wheel in an empty folder, used from another empty folder: nothing is read from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COPIED = ("pyproject.toml", "README.md", "LICENSE", "conf", "glmtuner")  # by the Dockerfile's first stage
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")
SHORT = ["experiment=quickstart", "trainer.num_train_epochs=1", "trainer.max_steps=4", "data.max_samples=8", "tracker=none",
         "trainer.output_dir=run"]  # fmt: skip


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GLMTUNER_CACHE")}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "GLMTUNER_CACHE": str(folder.parent / "cache"), **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy of the files that the Dockerfile copies."""
    source = tmp_path_factory.mktemp("source")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"ignore": SKIPPED} if (ROOT / name).is_dir() else {}))
    built = tmp_path_factory.mktemp("dist")
    isolated = [] if find_spec("setuptools") is None else ["--no-build-isolation"]
    done = run(
        source, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolated, "--wheel-dir", str(built), "."
    )
    assert done.returncode == 0, done.stderr
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which only the wheel's glmtuner is found, beside the other packages."""
    target = tmp_path_factory.mktemp("target")
    done = run(
        target, sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in target.iterdir()} == {"glmtuner", "bin", next(target.glob("*.dist-info")).name}
    return {"PYTHONPATH": str(target)}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.heavy
def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "glmtuner").rglob("*") if path.is_file()}
    conf = {f"glmtuner/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected = {name for name in package | conf if "__pycache__" not in name}
    assert names == expected


@pytest.mark.heavy
def test_help_and_doctor(installed: dict[str, str], empty: Path) -> None:
    done = run(empty, sys.executable, "-c", "import glmtuner; print(glmtuner.__file__)", **installed)
    assert done.stdout.startswith(installed["PYTHONPATH"])
    done = run(empty, sys.executable, "-m", "glmtuner", "--help", **installed)
    assert done.returncode == 0 and "doctor" in done.stdout and done.stderr == ""
    done = run(
        empty,
        sys.executable,
        "-m",
        "glmtuner",
        "doctor",
        "--json",
        **installed,
        HF_HUB_OFFLINE="1",
        WANDB_MODE="offline",
    )
    findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0 and f"in {installed['PYTHONPATH']}," in findings["glmtuner"]["text"], findings[
        "glmtuner"
    ]
    assert findings["glmtuner"]["state"] == "ok" and "packages are as declared" in findings["glmtuner"]["text"]
    assert "pip install 'glmtuner[" in findings["extras"]["type"] and str(ROOT) not in done.stdout
    assert list(empty.iterdir()) == []


@pytest.mark.heavy
def test_a_training_and_what_follows_it(installed: dict[str, str], empty: Path) -> None:
    command = [sys.executable, "-m", "glmtuner"]
    done = run(empty, *command, *SHORT, **installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((empty / "run/metrics.json").read_text())["train_loss"] > 0
    provenance = json.loads((empty / "run/provenance.json").read_text())
    assert str(ROOT) not in json.dumps({name: value for name, value in provenance.items() if name != "packages"})
    for words in (["show", "run"], ["report", "run"], ["export", "run", "--to", "exported"]):
        done = run(empty, *command, *words, **installed)
        assert done.returncode == 0, (words, done.stdout + done.stderr)
    script = Path(installed["PYTHONPATH"]) / "bin" / "glmtuner"
    done = run(empty, str(script), "--version", **installed)
    assert done.returncode == 0 and done.stdout.startswith("glmtuner "), done.stderr
    assert Path(sysconfig.get_path("scripts")) != script.parent
