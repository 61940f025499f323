"""The sets of benchmarks from local copies, in the layout that they have on the hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.benchmarks import FOLDER_VARIABLE
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
UNNAMED = ("default", "main")  # configurations whose files may also lie without a folder of theirs


def copy_of(path: str, roots: Sequence[Path]) -> Path | None:
    """The folder with a copy of the hub's dataset `path`: ORG/NAME or NAME below one of the roots, or in the layout of the hub's cache."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    for root in roots:
        for name in dict.fromkeys((path, path.rpartition("/")[2])):
            if (root / name).is_dir():
                return root / name
        snapshots = sorted((root / f"datasets--{path.replace('/', '--')}" / "snapshots").glob("*/"))
        if snapshots:
            return max(snapshots, key=lambda folder: folder.stat().st_mtime)
    return None


def is_named(path: str) -> bool:
    """Whether a task's dataset_path names a set, and not the format of files that the task names itself."""
    return path not in (*BUILDERS.values(), "text", "arrow")


def missing_set(task: str, path: str, roots: Sequence[Path]) -> DataError:
    """The error for a set without a copy: where to get it, and where to put it."""
    where = (
        f"has no copy in {' or '.join(map(str, roots))}" if roots
        else f"is read from a local copy: type benchmark.data_dir=<folder>, or set {FOLDER_VARIABLE}"
    )  # fmt: skip
    folder = roots[0] if roots else Path("benchmarks")
    return DataError(
        f"benchmark {task}: its set {path} {where}; get it where there is a network: hf download {path} --repo-type dataset "
        f"--local-dir {folder / path}"
    )


def load_set(
    task: str, path: str, name: str | None, roots: Sequence[Path], options: Mapping[str, Any]
) -> "DatasetDict":
    """The set's splits, from its local copy; files that the task names itself are read by their format.

    Raises DataError where there is no copy, or where it has no files of the configuration `name`.
    """
    import datasets

    if not is_named(path):
        return _read(task, path, lambda: datasets.load_dataset(path, name, **options))
    folder = copy_of(path, roots)
    if folder is None:
        raise missing_set(task, path, roots)
    if _declares(folder, name):
        return _read(task, str(folder), lambda: datasets.load_dataset(str(folder), name))
    files = files_of(folder, name)
    if not files and name in UNNAMED:
        files = files_of(folder, None)
    if not files:
        raise DataError(
            f"benchmark {task}: {folder} has no {', '.join(BUILDERS)} of {name or 'its splits'}; legal are "
            f"{name + '/' if name else ''}<split>-00000-of-00001.parquet, as on the hub, and {name + '/' if name else ''}<split>.csv, "
            ".json or .jsonl"
        )
    kinds = {BUILDERS[file.suffix] for each in files.values() for file in each}
    if len(kinds) > 1:
        raise DataError(f"benchmark {task}: {folder} has files of {name or 'its splits'} in several formats; keep one")
    paths = {split: [str(file) for file in each] for split, each in files.items()}
    return _read(task, str(folder), lambda: datasets.load_dataset(kinds.pop(), data_files=paths))


def _read(task: str, where: str, read: Any) -> Any:
    """What `read` returns; a split of it that the task names and the copy lacks is a DataError."""
    import datasets

    class Splits(datasets.DatasetDict):
        def __missing__(self, split: str) -> Any:
            raise DataError(
                f"benchmark {task}: {where} has the splits {', '.join(self) or 'none'}, and the task reads {split}; name a file "
                f"{split}.parquet, .json, .jsonl or .csv"
            )

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = read()
        return Splits(found) if isinstance(found, datasets.DatasetDict) else found
    except Exception as error:  # whatever a damaged file raises in one of several readers
        cause = error.__cause__ or error
        reason = " ".join(f"{cause}".split())[:300]
        raise DataError(f"benchmark {task}: {where} cannot be read ({type(cause).__name__}: {reason})") from None
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _declares(folder: Path, name: str | None) -> bool:
    """Whether the README.md of a copy says which files the configuration has, as those of the hub do."""
    import yaml

    readme = folder / "README.md"
    if not readme.is_file():
        return False
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        about = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return False
    configs = about.get("configs") if isinstance(about, dict) else None
    names = {config.get("config_name") for config in configs or () if isinstance(config, dict)}
    return (name or "default") in names


def files_of(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split of a configuration, by the words in their paths; of all files where `name` is None.

    The words are folders and the file's name without its shard's number: `law/val-00000-of-00001.parquet`, `law/val/0000.parquet`,
    `val/law.csv` and `val/law_val.csv` are the split val of law. A file of which other words are left belongs to nothing.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.suffix not in BUILDERS or any(part.startswith(".") for part in parts):
            continue
        stem = SHARD.sub("", file.stem)
        words = [word for word in (*parts[:-1], "" if stem.isdecimal() else stem) if word not in ("", "data")]
        if name is not None:
            prefixes = (f"{name}_", f"{name}-")
            if not any(word == name or word.startswith(prefixes) for word in words):
                continue
            words = [word[len(name) + 1 :] if word.startswith(prefixes) else word for word in words if word != name]
        splits = set(words) or {"train"}
        if len(splits) == 1:
            found.setdefault(splits.pop(), []).append(file)
    return found
