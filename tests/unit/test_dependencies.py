"""What is imported is declared: an installation from pyproject.toml alone has everything, and nothing by luck."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# installed into environments of their own, beside this one, by who uses them
ELSEWHERE = {"llamafactory": "scripts/benchmark.py", "triton": "make test-liger", "trl": "make test-trl"}
# declared under another name than the module's, and not installed where the tests run
NAMES = {
    "liger_kernel": "liger-kernel",
    "vllm": "vllm",
    "lm_eval": "lm-eval",
    "comet_ml": "comet-ml",
}
EXTRAS = ("dashboard", "liger", "vllm", "benchmark", "mlflow", "swanlab", "trackio", "comet", "ray")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml names, those of these extras among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(it for extra in extras for it in project["optional-dependencies"][extra])]
    return {plain(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in wanted}


def imported(folder: Path) -> dict[str, str]:
    """Module -> a file that imports it, at its top or in a function."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for name in modules_of(path.read_text(encoding="utf-8")):
            found.setdefault(name, str(path.relative_to(folder.parent)))
    return found


def modules_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def undeclared(modules: dict[str, str], allowed: set[str]) -> list[str]:
    """The modules that are of no allowed distribution, with a file each."""
    own = {path.stem for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").glob("*.py"))} | {
        "glmtuner",
        "gpu_parts",
        "docs_parts",
    }
    known = packages_distributions()
    wrong = []
    for module, path in modules.items():
        if module in sys.stdlib_module_names or module in own or module in ELSEWHERE:
            continue
        distributions = {plain(name) for name in known.get(module, [NAMES.get(module, module)])}
        if not distributions & allowed:
            wrong.append(f"{module} ({path})")
    return wrong


def test_what_the_package_imports_is_declared() -> None:
    assert undeclared(imported(ROOT / "glmtuner"), declared(*EXTRAS)) == []


def test_what_scripts_and_tests_import_is_declared() -> None:
    allowed = declared(*EXTRAS, "dev")
    assert undeclared({**imported(ROOT / "scripts"), **imported(ROOT / "tests")}, allowed) == []


@pytest.mark.parametrize("line", ["import yaml", "from yaml import dump", "def late():\n    import yaml.representer"])
def test_an_import_that_is_not_declared_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(line, encoding="utf-8")
    assert undeclared(imported(tmp_path), declared() - {"pyyaml"}) == [f"yaml ({tmp_path.name}/new.py)"]
    assert undeclared(imported(tmp_path), declared()) == []


def test_every_pinned_version_meets_its_bound() -> None:
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[plain(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[plain(requirement.name)]), text
