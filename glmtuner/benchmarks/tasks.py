"""The tasks that a run's benchmarks name: found in lm-evaluation-harness' list or the user's folder, and pointed to local sets."""

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.benchmarks.sets import copy_of, is_named, load_set, missing_set
from glmtuner.config.benchmarks import FOLDER_VARIABLE, KNOWN_AS, Benchmark
from glmtuner.console import say
from glmtuner.errors import ConfigError, GlmtunerError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PACKAGE = "lm_eval>=0.4.13"


@dataclass(frozen=True)
class Asked:
    """A benchmark as it was asked for: its tasks, and the group that takes their mean if there is one."""

    name: str
    tasks: dict[str, Any]  # lm_eval's Task by name
    group: Any = None  # lm_eval's Group

    @property
    def is_one(self) -> bool:
        """Whether it is one task itself, and no group."""
        return self.group is None and len(self.tasks) == 1


def check_benchmarks(benchmark: Benchmark) -> None:
    """Raise ConfigError or DataError where a benchmark cannot be asked: its package, its name, or its set is missing."""
    if not benchmark.tasks:
        return
    manager = task_manager(benchmark)
    roots = roots_of(benchmark)
    for name in benchmark.tasks:
        for task, entry in leaves(manager.task_index, KNOWN_AS.get(name, name)):
            path = (entry.cfg or {}).get("dataset_path")
            if isinstance(path, str) and is_named(path) and copy_of(path, roots) is None:
                raise missing_set(task, path, roots)


def roots_of(benchmark: Benchmark) -> list[Path]:
    """The folders with copies of sets: benchmark.data_dir, else $GLMTUNER_BENCHMARKS, and benchmark.include_path."""
    named = benchmark.data_dir or os.environ.get(FOLDER_VARIABLE)
    knob = f"benchmark.data_dir={named}" if benchmark.data_dir else f"{FOLDER_VARIABLE}={named}"
    roots = [Path(named).expanduser()] if named else []
    if roots and not roots[0].is_dir():
        raise ConfigError(f"{knob}: no such folder; it holds the benchmarks' sets, each as <folder>/ORG/NAME")
    return [*roots, *([Path(benchmark.include_path).expanduser()] if benchmark.include_path else [])]


def require_package() -> None:
    """Raise ConfigError unless the harness and all that it needs can be imported."""
    command = f"type pip install 'glmtuner[benchmark]', or pip install '{PACKAGE}'"
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"benchmark: lm-evaluation-harness is not installed; {command}")
    from packaging.requirements import Requirement

    version = importlib.metadata.version("lm_eval")
    if not Requirement(PACKAGE).specifier.contains(version, prereleases=True):
        raise ConfigError(f"benchmark: lm_eval {version} is too old; {command}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each value that the run sets
    try:
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"benchmark: lm_eval cannot be imported ({error}); {command}") from None


def task_manager(benchmark: Benchmark) -> "TaskManager":
    """The harness' index of tasks, with all that the benchmarks name; raises ConfigError for an unknown name."""
    require_package()
    if benchmark.include_path:
        folder = Path(benchmark.include_path).expanduser()
        if not any(folder.rglob("*.yaml")):
            problem = "it has no task, each a .yaml file" if folder.is_dir() else "no such folder"
            raise ConfigError(f"benchmark.include_path={benchmark.include_path}: {problem}")
    return _index(tuple(benchmark.tasks), benchmark.include_path)


@cache
def _index(names: tuple[str, ...], include_path: str | None) -> "TaskManager":
    """The same; the whole index is of more than ten thousand files, so that the benchmarks' folders alone are read if these suffice."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    own = [Path(include_path).expanduser()] if include_path else []
    asked = [KNOWN_AS.get(name, name) for name in names]
    shipped = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_defaults=False, include_path=[*_folders(shipped, asked), *own])
    if all(_is_whole(manager.task_index, name) for name in asked):
        return manager
    say("benchmark: reading the list of all tasks of lm-evaluation-harness")
    manager = TaskManager(include_path=own)
    for name in asked:
        if name not in manager.task_index:
            known = [*manager.all_tasks, *KNOWN_AS]
            listed = f"legal: a task, a group or a tag of lm-evaluation-harness, such as {', '.join((*KNOWN_AS, 'cmmlu', 'mmlu', 'gsm8k'))}"
            own_tasks = "" if own else ", or one of your own in benchmark.include_path=<folder>"
            raise ConfigError(f"benchmark={name}: there is no such task{did_you_mean(name, known, listed)}{own_tasks}")
    return manager


def _folders(shipped: Path, names: Sequence[str]) -> list[Path]:
    """The folders of the harness' tasks that are named like the beginning of a name, the longest for each."""
    folders = [folder for folder in sorted(shipped.iterdir()) if folder.is_dir()]
    found = []
    for name in names:
        fitting = [folder for folder in folders if name.replace("-", "_").startswith(folder.name.replace("-", "_"))]
        found += [max(fitting, key=lambda folder: len(folder.name))] if fitting else []
    return list(dict.fromkeys(found))


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Whether the index has the name, and all that a group of this name refers to."""
    if name not in index:
        return False
    return all(_is_whole(index, each) for each in _members(index[name]))


def _members(entry: Any) -> list[str]:
    """The names that a group or a tag refers to."""
    listed = (entry.cfg or {}).get("task")
    names = (
        [each if isinstance(each, str) else each.get("group") or each.get("task") for each in listed or ()]
        if isinstance(listed, list)
        else []
    )
    return [*names, *(sorted(entry.tags) if entry.yaml_path is None else ())]


def leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """(name, entry) of each task that a name stands for."""
    if name not in index:
        return
    members = _members(index[name])
    if not members:
        yield name, index[name]
    for member in members:
        yield from leaves(index, member)


def load_asked(benchmark: Benchmark) -> list[Asked]:
    """Each benchmark with its tasks and their records; raises GlmtunerError for a set that is missing or damaged, or a task that is wrong."""
    manager, roots = task_manager(benchmark), roots_of(benchmark)
    asked = []
    for name in benchmark.tasks:
        with local_sets(name, roots):
            try:
                loaded = manager.load([KNOWN_AS.get(name, name)])
            except GlmtunerError:
                raise
            except Exception as error:  # a task's YAML and its Python are the user's, or the harness'
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ConfigError(f"benchmark={name}: the task cannot be built ({reason}); check its YAML") from error
        group = loaded["groups"].get(KNOWN_AS.get(name, name))
        asked.append(Asked(name, dict(loaded["tasks"]), group if group is not None and group.has_aggregation else None))
    return asked


@contextmanager
def local_sets(name: str, roots: Sequence[Path]) -> Iterator[None]:
    """The harness' tasks load their sets from local copies within this context, and show no progress of their own.

    The harness asks `datasets` for each set by its name on the hub; there is no hook for where the files are.
    """
    import datasets
    import lm_eval.api.task as harness

    class LocalSets:
        """`datasets`, with another load_dataset."""

        def __getattr__(self, attribute: str) -> Any:
            return getattr(datasets, attribute)

        @staticmethod
        def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
            return load_set(task, path, name, roots, options)

    task, progress = name, harness.tqdm
    harness.datasets, harness.tqdm = LocalSets(), partial(progress, disable=True)
    try:
        yield
    finally:
        harness.datasets, harness.tqdm = datasets, progress
