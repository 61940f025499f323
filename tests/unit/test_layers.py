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
RANK = {
    **dict.fromkeys(("errors", "preemption"), 0),
    **dict.fromkeys(("bpe", "config", "console", "ranks", "replay"), 1),
    **dict.fromkeys(
        (
            *("data", "decoding", "families", "hub", "losses", "metrics", "parallel", "quant", "prefix", "run_folder"),
            *("scoring", "value_head"),
        ),
        2,
    ),
    **dict.fromkeys(("report", "finetuning", "generate", "models", "preflight", "throughput", "trackers"), 3),
    **dict.fromkeys(("assemble", "fast_paths", "objectives", "trainer", "vllm_engine"), 4),
    **dict.fromkeys(("conversation", "memory", "predict", "serving"), 5),
    "stages": 6,
    **dict.fromkeys(("launch", "launchers", "verbs"), 7),
    "sweep": 8,
    "__main__": 9,
}
# Of these no run takes anything that asked for no tracker, no pictures, no scores and no compiled model.
UNUSED = {"wandb", "tensorboard", "matplotlib", "jieba", "nltk", "rouge_chinese", "rapidfuzz", "sklearn", "optuna"}
UNUSED |= {"joblib", "deepspeed", "fastapi", "uvicorn", "torch._inductor.compile_fx", "torch._inductor.scheduler"}
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


def annotations_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs, inside functions too; what stands under `if TYPE_CHECKING:` does not run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if annotations_only(child):
            for other in child.orelse:
                yield from walk(other)
        else:
            yield from walk(child)


def imported_parts(source: str) -> Iterator[str]:
    """The top-level parts of glmtuner that a module imports: `a` of `glmtuner.a.b`, in all forms of the statement."""
    for node in walk(ast.parse(source)):
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
                yield rest.partition(".")[0]


def part_of(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def edges(package: Path) -> list[tuple[str, str]]:
    """(importer, imported) of every import between parts."""
    return [
        (part_of(path, package), part)
        for path in sorted(package.rglob("*.py"))
        for part in imported_parts(path.read_text(encoding="utf-8"))
    ]


def wrong_way(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports that do not point down; siblings of one rank do not import each other either."""
    return sorted({(a, b) for a, b in found if a != b and RANK[b] >= RANK[a]})


def test_imports_point_down():
    found = edges(ROOT / "glmtuner")
    assert {("__main__", "launch"), ("launch", "finetuning"), ("finetuning", "prefix"), ("sweep", "stages")} <= {*found}
    assert wrong_way(found) == []


def test_every_part_has_a_rank():
    package = ROOT / "glmtuner"
    parts = {part_of(path, package) for path in package.rglob("*.py")} - {"__init__", "assets"}
    assert parts == RANK.keys()


@pytest.mark.parametrize(
    "line",
    [
        "import glmtuner.launch",
        "import glmtuner.launch as run",
        "from glmtuner import launch",
        "from glmtuner.launch import launch",
        "def late():\n    from glmtuner.launch import launch",
        "class A:\n    def late(self):\n        if self:\n            import glmtuner.launch",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import glmtuner.launch",
    ],
)
def test_the_walk_sees_every_form_of_an_upward_import(line, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encode.py").write_text(line, encoding="utf-8")
    assert wrong_way(edges(tmp_path)) == [("data", "launch")]


def test_the_walk_refuses_siblings_and_leaves_annotations_alone(tmp_path):
    (tmp_path / "quant.py").write_text("from glmtuner.families.family import Family", encoding="utf-8")
    (tmp_path / "prefix.py").write_text(
        "if TYPE_CHECKING:\n    from glmtuner.families.family import Family", encoding="utf-8"
    )
    assert wrong_way(edges(tmp_path)) == [("quant", "families")]


def modules_loaded_by(folder: Path, *words: str) -> tuple[int, set[str]]:
    """Exit code and modules of a child that ran these words."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
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
