"""The files from which others install: Dockerfile, .dockerignore, environment.yml. No image is built here."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
KEYWORDS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of each instruction of the Dockerfile, its lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines()]


def test_every_instruction_is_one() -> None:
    assert {keyword for keyword, _ in instructions()} == KEYWORDS
    assert instructions()[0][0] == "ARG"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_starts_from_one_that_was_defined_before(device: str) -> None:
    defined: dict[str, str] = {}
    arguments = {"PYTHON": "", "DEVICE": ""}
    for keyword, rest in instructions():
        if keyword == "ARG":
            name, _, value = rest.partition("=")
            assert name in arguments and value
            arguments[name] = value
        if keyword != "FROM":
            continue
        base, _, name = re.sub(r"\$\{(\w+)\}", lambda it: {**arguments, "DEVICE": device}[it[1]], rest).partition(
            " AS "
        )
        assert base in defined or base.startswith("python:3."), base
        defined[name] = base
    assert [*defined][-1] == "glmtuner" and defined["glmtuner"] == f"torch-{device}"
    python = re.search(r"PYTHON=(\S+)", (ROOT / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python and Requirement(f"python{project['requires-python']}").specifier.contains(python[1])
    assert f"Programming Language :: Python :: {python[1]}" in project["classifiers"]


def is_sent(name: str) -> bool:
    """Whether .dockerignore lets a file of the checkout through: the last line that fits counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, keeps = line.removeprefix("!"), line.startswith("!")
        parts = [name, *(str(parent) for parent in Path(name).parents)][:-1]
        everywhere = pattern.startswith("**/") and pattern.removeprefix("**/") in Path(name).parts
        if everywhere or any(fnmatch.fnmatch(part, pattern) for part in parts):
            sent = keeps
    return sent


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copied = [word for keyword, rest in instructions() if keyword == "COPY" for word in shlex.split(rest)[:-1]]
    assert {*copied} == {"pyproject.toml", "README.md", "LICENSE", "conf", "glmtuner", "constraints.txt"}
    for name in copied:
        files = [ROOT / name] if (ROOT / name).is_file() else [*(ROOT / name).rglob("*.*")]
        assert files
        for file in files:
            relative = file.relative_to(ROOT).as_posix()
            assert is_sent(relative) is ("__pycache__" not in relative), relative
    assert (
        not is_sent("outputs/mine/adapter.safetensors")
        and not is_sent(".git/config")
        and not is_sent(".venv/bin/python")
    )


def test_the_shell_of_every_step_is_one() -> None:
    steps = [re.sub(r"^--mount=\S+\s+", "", rest) for keyword, rest in instructions() if keyword == "RUN"]
    assert len(steps) == 6
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'EXTRAS="\[(\w+)\]"', (ROOT / "Dockerfile").read_text())
    assert named == ["liger"] and {*named} <= {*extras}


def test_the_environment_of_conda() -> None:
    values = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = values["dependencies"]
    assert values["name"] == "glmtuner" and "pip" in conda and values["channels"] == ["conda-forge"]
    assert last == {"pip": ["--constraint constraints.txt", "--editable ."]} and (ROOT / "constraints.txt").is_file()
    assert any(re.fullmatch(r"python=3\.1[12]", each) for each in conda)
