"""Imports point down only, and nothing heavy is imported before a run is known to be valid."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "glmtuner"
FLOORS = (  # a room imports from the floors below its own, never from its own or from one above
    ("assets", "console", "errors"),
    ("run_folder", "templates"),
    ("config",),
    ("distributed",),
    ("families", "metrics", "parallel", "quant", "rewards", "trackers"),
    ("data", "models", "report"),
    ("finetuning", "inference", "kernels"),
    ("benchmarks", "memory", "objectives", "serving"),
    ("training",),
    ("stages",),
    ("launch",),
    ("compare", "sweep"),
    ("board",),
    ("cli",),
    ("__main__",),
)
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ROOMS, MOST_LINES = 28, 450
LONGER = {"models/tokenization_chatglm.py"}  # tokenizers and tables of data may be
# Of these no run takes anything that asked for no tracker, no pictures, no scores and no compiled model.
UNUSED = {"wandb", "tensorboard", "matplotlib", "jieba", "nltk", "rouge_chinese", "rapidfuzz", "sklearn", "optuna"}
UNUSED |= {
    "mlflow",
    "swanlab",
    "trackio",
    "comet_ml",
    "ray",
    "joblib",
    "fastapi",
    "uvicorn",
    "torch._inductor.compile_fx",
    "torch._inductor.scheduler",
}
HEAVY = {"torch", "transformers", "datasets", "peft", "matplotlib", "rich", "pandas", "fastapi", "uvicorn", "wandb"}
SPY = """\
import sys
from glmtuner.__main__ import main
code = main(sys.argv[1:])
print("LOADED", code, *sys.modules)
"""


def test_the_wheel_holds_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "glmtuner").rglob("*.py")}
    assert found == {*listed} - {"glmtuner.conf"}


def imported(source: str) -> Iterator[str]:
    """The dotted names below glmtuner that a module imports, in every form of the statement, for annotations alone too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            package, _, rest = name.partition(".")
            if package == "glmtuner" and rest and not rest.startswith("__version__"):
                yield rest


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def edges(package: Path) -> list[tuple[str, str]]:
    """(importer, imported) of every import between rooms."""
    return [
        (room_of(path, package), name.partition(".")[0])
        for path in sorted(package.rglob("*.py"))
        for name in imported(path.read_text(encoding="utf-8"))
    ]


def wrong_way(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports that do not point down; rooms of one floor do not import each other either."""
    return sorted({(a, b) for a, b in found if a != b and RANK[b] >= RANK[a]})


def circles(package: Path) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others of the group."""
    names = {
        path: path.relative_to(package).with_suffix("").as_posix().replace("/", ".") for path in package.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__") for name in names.values()}
    graph = {}
    for path, name in names.items():
        found = set()
        for dotted in imported(path.read_text(encoding="utf-8")):
            found.add(next((part for part in (dotted, dotted.rpartition(".")[0]) if part in modules), ""))
        graph[name.removesuffix(".__init__")] = found - {name.removesuffix(".__init__"), ""}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def test_imports_point_down():
    found = edges(PACKAGE)
    assert {("cli", "launch"), ("launch", "finetuning"), ("finetuning", "models"), ("sweep", "launch")} <= {*found}
    assert wrong_way(found) == []


def test_every_room_has_a_floor_and_few_modules_stand_outside_of_rooms():
    rooms = {room_of(path, PACKAGE) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    outside = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == RANK.keys() and len(rooms - outside) <= MOST_ROOMS
    assert outside == {"__main__", "console", "errors"}


def test_no_modules_import_each_other():
    assert circles(PACKAGE) == []


def test_modules_are_short():
    lines = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONGER


@pytest.mark.parametrize(
    "line",
    [
        "import glmtuner.launch",
        "import glmtuner.launch.run as run",
        "from glmtuner import launch",
        "from glmtuner.launch.run import launch",
        "def late():\n    from glmtuner.launch.run import launch",
        "class A:\n    def late(self):\n        if self:\n            import glmtuner.launch",
        "if TYPE_CHECKING:\n    import glmtuner.launch",
    ],
)
def test_the_walk_sees_every_form_of_an_upward_import(line, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encode.py").write_text(line, encoding="utf-8")
    assert wrong_way(edges(tmp_path)) == [("data", "launch")]


def test_the_walk_refuses_siblings_and_circles(tmp_path):
    for name, line in {
        "quant/int4.py": "from glmtuner.families.family import Family",
        "families/family.py": "if TYPE_CHECKING:\n    from glmtuner.quant import int4",
        "families/hub.py": "from glmtuner.families.family import Family",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line, encoding="utf-8")
    assert wrong_way(edges(tmp_path)) == [("families", "quant"), ("quant", "families")]
    assert circles(tmp_path) == [["families.family", "quant.int4"]]


def modules_loaded_by(folder: Path, *words: str) -> tuple[int, set[str]]:
    """Exit code and modules of a child that ran these words."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "LOADED", done.stderr
    return int(last[1]), set(last[2:])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ["--help"]),
        (0, ["--version"]),
        (0, ["--cfg", "job", "--resolve"]),
        (0, ["keys", "lora_rank", "--json"]),
        (0, ["completion", "bash"]),
        (2, ["finetuning.lora_rnk=4"]),
        (2, ["finetuning=full", "quant=int4"]),
        (2, ["data.dataset=no_such_set"]),
        (2, ["model.checkpoint_dir=no_such_folder"]),
        (2, ["report", "no_such_folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nothing_heavy_is_loaded_before_a_run_is_valid(tmp_path, code, words):
    found, modules = modules_loaded_by(tmp_path, *words)
    assert found == code
    assert "glmtuner" in modules and not modules & HEAVY
    assert list(tmp_path.iterdir()) == []


def test_a_run_and_what_reads_its_folder_load_what_they_use_only(tmp_path):
    train = ["model=tiny_glm", "data.dataset=identity_sample", "trainer.max_steps=1", "tracker=none", "metric=none"]
    found, modules = modules_loaded_by(tmp_path, *train, "trainer.output_dir=run")
    assert found == 0
    assert "peft" in modules and not modules & UNUSED

    found, modules = modules_loaded_by(tmp_path, "chat", "run")  # standard input is at its end
    assert found == 0
    assert "torch" in modules and not modules & {*UNUSED, "datasets", "pandas", "transformers.trainer"}

    for verb in ("show", "report"):
        found, modules = modules_loaded_by(tmp_path, verb, "run")
        assert found == 0
        assert "rich" in modules and not modules & (HEAVY - {"rich"})
