"""Everything that runs need from the network, in one folder: models, tokenizers, datasets, and the rows that are made of them."""

import glob
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from glmtuner.config.compose import Composed
from glmtuner.config.groups import Model
from glmtuner.config.offline import PLACES
from glmtuner.config.paths import model_source
from glmtuner.console import say
from glmtuner.data import DatasetSpec
from glmtuner.data.fetch import download
from glmtuner.data.hub_sets import failure_message
from glmtuner.data.modelscope_sets import modelscope_copy
from glmtuner.data.splits import dataset_entries
from glmtuner.data.tokenized import files_of_entry
from glmtuner.errors import CheckpointError, ConfigError, DataError
from glmtuner.families.hub import from_hub, read_config, source_of, with_retries
from glmtuner.families.hub_files import model_files, small_files
from glmtuner.families.modelscope import LISTING
from glmtuner.families.modelscope import endpoint as modelscope_endpoint
from glmtuner.launch.build import resolve_family, resolve_template
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.manifest import Entry, Manifest, entry_of, read_manifest, write_manifest
from glmtuner.launch.places import catalogue_dirs
from glmtuner.run_folder.locks import try_lock
from glmtuner.run_folder.redaction import redact_text
from glmtuner.stages.stage import learning_stage

HUB, DOWNLOADS, MODELSCOPE = PLACES["HF_HUB_CACHE"], "glmtuner", "modelscope"
LOCK = ".prefetch.lock"


@dataclass
class Expected:
    """What the hub says about the files: their sha256 by the path in the folder, where it says one."""

    digests: dict[str, str] = field(default_factory=dict)


def download_all(jobs: Iterable[Composed], folder: Path) -> Manifest:
    """Download what the jobs need to the folder, which is the cache of every library here; returns its new manifest.

    Raises GlmtunerError for what cannot be found or downloaded, and for a file that is not what the server says.
    """
    from glmtuner.launch.manifest import remove_damaged

    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / LOCK)
    if lock is None:
        raise ConfigError(
            f"--folder {folder}: another prefetch is filling it; wait until it ends, or type another --folder"
        )
    with lock:
        before = read_manifest(folder) if (folder / "manifest.json").exists() else {}
        remove_damaged(folder, before)
        expected, seen = Expected(), set[str]()
        for composed in jobs:
            for key, fetch in _needs(composed, folder, expected):
                if key not in seen:
                    seen.add(key)
                    fetch()
        files = collect(folder)
        check_digests(folder, files, before, expected)
        kept = {path: entry for path, entry in before.items() if path not in files and (folder / path).is_file()}
        write_manifest(folder, {**kept, **files})
    return files


def _needs(composed: Composed, folder: Path, expected: Expected) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a job needs: a key that is equal for equal things, and the function that downloads it."""
    run = composed.run
    if run.model.cache_dir is not None:
        raise ConfigError(
            f"model.cache_dir={run.model.cache_dir}: prefetch puts everything into --folder; leave it out"
        )
    model = run.model
    names = {model.model_name_or_path: True}
    for name in (model.config_name, model.tokenizer_name):
        if name is not None:
            names.setdefault(name, False)
    for name, weights in names.items():
        key = f"model {name} {model.model_revision} {model.use_modelscope} {weights}"
        yield key, partial(fetch_model, model, name, weights, folder, expected)
    for spec in dataset_entries(run, catalogue_dirs(composed)).values():
        yield f"dataset {spec}", partial(fetch_dataset, spec, composed, folder, expected)


def fetch_model(model: Model, name: str, weights: bool, folder: Path, expected: Expected) -> None:
    """Download the files of a model, or with `weights` false those of its configuration and tokenizer."""
    source = model_source(name)
    if Path(source).exists():
        say(f"model {name}: a folder of this machine, which is not copied")
        return
    if model.use_modelscope:
        source_of(model, name, weights=weights)
        say(f"model {name}: from {modelscope_endpoint()}")
        return
    from huggingface_hub import HfApi, snapshot_download

    token = model.use_auth_token or None
    api = HfApi(token=token)
    commit = from_hub(model, lambda: api.model_info(source, revision=model.model_revision)).sha
    listed = from_hub(model, lambda: [*api.list_repo_tree(source, revision=commit, recursive=True)])
    files = {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}
    chosen = (model_files if weights else small_files)(files)
    if not any(Path(path).name == "config.json" or not weights for path in chosen):
        raise CheckpointError(
            f"model.model_name_or_path={name}: the repository has no config.json, so it holds no model"
        )
    cached = f"{HUB}/models--{source.replace('/', '--')}/snapshots/{commit}"
    _announce(f"model {name}", str(commit), [files[path] for path in chosen], folder, cached, expected)
    from_hub(
        model,
        lambda: snapshot_download(
            source, revision=model.model_revision, token=token, allow_patterns=[glob.escape(path) for path in chosen]
        ),
    )


def fetch_dataset(spec: DatasetSpec, composed: Composed, folder: Path, expected: Expected) -> None:
    """Download the files of a dataset's entry; raises DataError."""
    from glmtuner.config.paths import PACKAGE_DATA
    from glmtuner.data.files import local_path

    run = composed.run
    path = local_path(spec, Path(run.data.dataset_dir), PACKAGE_DATA)
    if path is not None:
        downloaded = path.resolve().is_relative_to(folder.resolve())
        say(f"dataset {spec.name}: {'downloaded' if downloaded else 'a file of this machine, which is not copied'}")
    elif spec.url:
        download(spec, None)
        say(f"dataset {spec.name}: {redact_text(spec.url)}")
    elif spec.hf_hub_url:
        fetch_hub_set(spec, run.data.split, run.model.use_auth_token, folder, expected)
    else:
        modelscope_copy(spec, None)
        say(f"dataset {spec.name}: {spec.ms_hub_url} from {modelscope_endpoint()}")


def fetch_hub_set(spec: DatasetSpec, split: str, token: bool, folder: Path, expected: Expected) -> None:
    """Download those files of a dataset of the Hugging Face hub that `datasets` would read for the entry; raises DataError."""
    import datasets
    from huggingface_hub import HfApi, snapshot_download

    name = str(spec.hf_hub_url)

    def fetch() -> None:
        builder = datasets.load_dataset_builder(
            name,
            spec.subset,
            data_dir=spec.folder,
            data_files=spec.data_files,
            revision=spec.revision,
            token=token or None,
        )
        urls = [url for urls in (builder.config.data_files or {}).values() for url in urls]
        paths = sorted({str(url).partition("@")[2].partition("/")[2] for url in urls})
        if not paths:
            raise DataError(f"dataset {spec.name!r} ({spec.origin}): {name} has no files that could be downloaded")
        api = HfApi(token=token or None)
        commit = api.dataset_info(name, revision=spec.revision).sha
        files = api.get_paths_info(name, [*paths, "README.md"], repo_type="dataset", revision=commit)
        cached = f"{HUB}/datasets--{name.replace('/', '--')}/snapshots/{commit}"
        _announce(f"dataset {spec.name}: {name}", str(commit), files, folder, cached, expected)
        snapshot_download(
            name, repo_type="dataset", revision=spec.revision, token=token or None,
            allow_patterns=[glob.escape(path) for path in (*paths, "README.md")],
        )  # fmt: skip

    try:
        with_retries(f"dataset {spec.name!r}", fetch)
    except DataError:
        raise
    except Exception as error:  # the network, the hub and third-party files can raise anything
        raise DataError(f"dataset {spec.name!r} ({spec.origin}): {failure_message(spec, split, error)}") from error


def _announce(label: str, commit: str, files: Sequence[Any], folder: Path, cached: str, expected: Expected) -> None:
    """Say how much is downloaded; raises DataError if the disk has no space for it."""
    missing = [file for file in files if not (folder / cached / file.path).is_file()]
    needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{label}: {len(missing)} files of {needed:,} bytes are to be downloaded, and --folder {folder} has {free:,} bytes of free "
            "space; free some, or type another --folder"
        )
    rest = f"{len(missing)} of them to download, {needed / 2**20:,.1f} MiB" if missing else "all of them are here"
    say(f"{label} (commit {commit[:8]}): {len(files)} files, {rest}")
    for file in files:
        if getattr(file, "lfs", None) is not None and file.lfs.sha256:
            expected.digests[f"{cached}/{file.path}"] = file.lfs.sha256


def collect(folder: Path) -> Manifest:
    """The entries of all files that were downloaded to the folder."""
    from huggingface_hub import constants

    files: Manifest = {}
    for repository in sorted((folder / HUB).glob("*--*")):
        kind, _, name = repository.name.partition("--")
        source = f"{constants.ENDPOINT}/{'datasets/' if kind == 'datasets' else ''}{name.replace('--', '/')}"
        for path in _files_below(repository / "snapshots"):
            files[_key(folder, path)] = entry_of(path, source, path.relative_to(repository / "snapshots").parts[0])
        for path in (*_files_below(repository / "refs"), *_files_below(repository / "trees")):
            files[_key(folder, path)] = entry_of(path, source, path.stem)
    for path in _files_below(folder / DOWNLOADS):
        files[_key(folder, path)] = entry_of(path, "the URL of a dataset", "")
    for path in _files_below(folder / MODELSCOPE):
        parts = path.relative_to(folder / MODELSCOPE).parts
        if len(parts) > 4:
            source = f"{modelscope_endpoint()}/{'/'.join(parts[:3])}"
            files[_key(folder, path)] = entry_of(path, source, parts[3])
    return files


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, without locks and interrupted downloads."""
    found = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return sorted(
        path for path in found if not path.name.startswith(".") or path.name == LISTING or "snapshots" in path.parts
    )


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def check_digests(folder: Path, files: Manifest, before: Manifest, expected: Expected) -> None:
    """Raise CheckpointError, and remove the file, if one is not what the hub says, or what the same commit was before."""
    for path, entry in files.items():
        known = before.get(path)
        is_fixed = "/snapshots/" in path  # a commit's files never change
        wanted = expected.digests.get(path) or (known.sha256 if known is not None and is_fixed else None)
        if wanted is None or wanted == entry.sha256:
            continue
        whose = "the hub lists" if path in expected.digests else "the same commit had before"
        (folder / path).resolve().unlink(missing_ok=True)
        (folder / path).unlink(missing_ok=True)
        raise CheckpointError(
            f"{folder / path}, from {entry.source}, has sha256 {entry.sha256}, and {whose} {wanted}; it is removed: type the same command "
            "again, or set HF_ENDPOINT to another mirror"
        )


def encode_all(jobs: Iterable[Composed], folder: Path) -> None:
    """Encode the rows of the jobs' datasets, as the jobs would, from what the folder has; they are added to its manifest."""
    made: Manifest = {}
    seen = set[str]()
    for composed in jobs:
        key = str([composed.config[group] for group in ("model", "data", "stage")]) + str(composed.run.trainer.do_train)
        if key in seen:
            continue
        seen.add(key)
        for name, rows in _encode(composed):
            say(f"dataset {name}: rows in {rows}")
            for path in files_of_entry(rows):
                made[_key(folder, path)] = entry_of(path, "made of the files in this folder", rows.name)
    for path in _files_below(folder / PLACES["HF_DATASETS_CACHE"]):
        if path.suffix == ".arrow" or path.name == "dataset_info.json":
            made[_key(folder, path)] = entry_of(path, "made of the files in this folder", "")
    write_manifest(folder, {**read_manifest(folder), **made})


def _encode(composed: Composed) -> Iterator[tuple[str, Path]]:
    """The name of each of the job's datasets, and the folder with its rows."""
    run, stage = composed.run, learning_stage(composed.run)
    specs = dataset_entries(run, catalogue_dirs(composed))
    family, _ = resolve_family(run, read_config(run.model))
    load_libraries(compiles=False, trains=False)
    from glmtuner.models.load import load_tokenizer

    tokenizer = load_tokenizer(run.model, run.data.new_tokens)
    _, template = resolve_template(run, family, tokenizer, None)
    for part in stage.datasets(run, specs, template, tokenizer).prepared:
        yield part.spec.name, part.folder


def total_size(files: Iterable[Entry]) -> int:
    """The size of the files in bytes."""
    return sum(entry.size for entry in files)
