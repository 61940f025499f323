"""From a dataset's name to its entry: the source of its records, their format, and the names of their columns.

A name is looked up in `<dataset_dir>/dataset_info.json`, in the catalogue folders (a YAML file for each dataset), and last
as the URL of a file, or as the path of a file or a folder. An entry may have every key of `DatasetSpec` except those of `INTERNAL`, and those
of `FOREIGN`. A file that exists takes precedence over `url`, `url` over `hf_hub_url`, and that over `ms_hub_url`, unless
`data.use_modelscope` is set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmtuner.config.offline import offline_folder
from glmtuner.console import say
from glmtuner.data.fetch import SUFFIX_RULE, download_typed, is_sha256, readable_suffix
from glmtuner.data.formats import ALIASES, default_columns
from glmtuner.data.inferred import existing_path, neighbours, spec_of_path
from glmtuner.data.records import shown
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import DataError, UnknownName, did_you_mean
from glmtuner.families.addresses import AddressRefused, check_literal_host, trusted_origins, url_problem
from glmtuner.families.download import refused_address
from glmtuner.families.modelscope import REPOSITORY as MODELSCOPE_ID

COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "chosen", "rejected", "kto_tag", "weight"),
    *("tools", "images", "videos", "audios"),
)
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")
NOT_TEXT = {"images": "images", "videos": "videos", "audios": "sounds"}
INTERNAL = ("name", "kind", "origin", "input_separator", "default_columns")  # fields that no entry has
FOREIGN = {  # keys of LLaMA-Factory's format that are ignored beside a file or a Hugging Face id
    "script_url": "a dataset script is code and is not run",
    "om_hub_url": "Modelers is not read",
    "cloud_file_name": "cloud storage is not read",
}
TYPES: dict[str, tuple[type, ...]] = {
    "num_samples": (int,),
    "num_records": (int,),
    "ranking": (bool,),
    "gated": (bool,),
    "columns": (dict,),
    "tags": (dict,),
    "data_files": (str, list),
    "ignore_columns": (list,),
}  # of an entry's keys; all others are text
TYPE_NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def find(
    name: str,
    dataset_dir: str | Path,
    catalogue: Iterable[Path],
    cache_dir: str | Path | None = None,
    *,
    split: str = "train",
    ignore_columns: Sequence[str] = (),
) -> DatasetSpec:
    """The entry of a dataset; `catalogue` are folders of YAML files, earlier ones first. Raises UnknownName, DataError.

    A path without an entry gets one by the records of its `split`; see `spec_of_path` for `ignore_columns`.

    A URL as the name is downloaded to `cache_dir`, the hub's by default, since the format is inferred from its records.
    """
    info = Path(dataset_dir) / "dataset_info.json"
    folders = list(catalogue)
    entries = info_entries(info)
    presets = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    if name in entries:
        hint = f"; or remove the entry: {presets[name]} has one that works" if name in presets else ""
        spec = spec_of(name, entries[name], kind="dataset_info", origin=str(info), hint=hint)
        return check_places(spec, Path(dataset_dir))
    if name in presets:
        spec = spec_of(name, preset_entry(presets[name]), kind="catalogue", origin=str(presets[name]))
        return check_places(spec, Path(dataset_dir))
    if name.lower().startswith(("http://", "https://")):
        return spec_of_path(name, download_typed(name, cache_dir), split, ignore_columns)
    if path := existing_path(name, Path(dataset_dir)):
        return spec_of_path(name, path, split, ignore_columns)
    raise UnknownName(
        "dataset",
        name,
        known={*entries, *presets, *neighbours(name, Path(dataset_dir))},
        add_one=f"conf/dataset/<name>.yaml, an entry in {info}, or a path to a json, jsonl, csv, parquet or arrow file",
    )


def info_entries(info: Path) -> dict[str, Any]:
    """The entries of a dataset_info.json; {} if the file does not exist. Raises DataError."""
    if not info.is_file():
        return {}
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{info} is not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{info} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None
    if not isinstance(entries, dict):
        raise DataError(f"{info}: an object of entries by dataset name is expected, got {shown(entries)}")
    return entries


def preset_entry(path: Path) -> Any:
    """The entry in a catalogue file; raises DataError."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def spec_of(name: str, entry: Any, *, kind: str, origin: str, hint: str = "") -> DatasetSpec:
    """The validated entry. Raises one DataError for everything that is wrong with it, which ends with `hint`."""
    label = f"dataset {name!r} ({origin})"
    if not isinstance(entry, dict):
        raise DataError(f"{label}: an object of keys is expected, got {shown(entry)}")
    given = {key: value for key, value in entry.items() if value is not None and value != ""}
    if errors := [*key_errors(given), *source_errors(given)]:
        raise DataError(f"{label}: {'; '.join(errors)}{hint}")
    known: dict[str, Any] = {key: value for key, value in given.items() if key not in FOREIGN}
    named = {key: column for key, column in known.pop("columns", {}).items() if column}
    tags = {key: word for key, word in known.pop("tags", {}).items() if word}
    ranking = known.pop("ranking", False) or "chosen" in named
    try:
        formatting, columns = format_and_columns(known.pop("formatting", "alpaca"), named, ranking)
    except (UnknownName, ValueError) as error:
        raise DataError(f"{label}: {error}{hint}") from None
    known |= {"kind": kind, "origin": origin, "default_columns": not named}
    return DatasetSpec(name=name, formatting=formatting, ranking=ranking, columns=columns, tags=tags, **known)


def key_errors(entry: dict[str, Any]) -> Iterator[str]:
    """Errors of an entry's keys and of the types of its values."""
    legal = [spec_field.name for spec_field in fields(DatasetSpec) if spec_field.name not in INTERNAL]
    yield from unknown_keys("key", entry, [*legal, *FOREIGN])
    for key, value in entry.items():
        types = TYPES.get(key, (str,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield f"{key}: {' or '.join(TYPE_NAMES[kind] for kind in types)} is expected, got {shown(value)}"
        elif types == (int,) and isinstance(value, int) and value < 1:
            yield f"{key}={value}: at least 1 is expected"
    for group, names in (("columns", COLUMNS), ("tags", TAGS)):
        if isinstance(mapping := entry.get(group), dict):
            yield from unknown_keys(f"key of {group}", mapping, names)
            for key, value in mapping.items():
                if value is not None and not isinstance(value, str):
                    yield f"{group}.{key}: text is expected, got {shown(value)}"
                elif value and key in NOT_TEXT:
                    yield f"columns.{key}={value}: {NOT_TEXT[key]} are not supported; use a dataset of text only"


def unknown_keys(what: str, given: Iterable[str], legal: Iterable[str]) -> Iterator[str]:
    """An error for each given key that is not legal, with the nearest legal ones, or all if none is near."""
    for key in given:
        if key not in legal:
            yield f"unknown {what} {key!r}{did_you_mean(str(key), legal) or '; known: ' + ', '.join(legal)}"


def check_places(spec: DatasetSpec, dataset_dir: Path) -> DatasetSpec:
    """The entry itself, after its file and its URL were checked; raises DataError. A file outside of `dataset_dir` is printed."""
    label = f"dataset {spec.name!r} ({spec.origin})"
    if spec.file_name:
        file = Path(spec.file_name).expanduser()
        if file.is_absolute():
            say(f"{label}: its file_name is not in data.dataset_dir={dataset_dir}: {file}")
        if file.exists() or (dataset_dir / file).exists():
            return spec
    if spec.url and offline_folder() is None:  # else it is not opened
        try:
            check_literal_host(spec.url, trusted_origins())
        except AddressRefused as error:
            raise refused_address(label, spec.url, error) from None
    return spec


def source_errors(entry: dict[str, Any]) -> Iterator[str]:
    """Errors of an entry that does not tell where its records are, or names a place that an entry may not name."""
    if not any(entry.get(key) for key in ("file_name", "url", "hf_hub_url", "ms_hub_url")):
        foreign = [f"{key}={entry[key]}: {why}" for key, why in FOREIGN.items() if key in entry]
        yield "; ".join(
            [
                *foreign,
                "add file_name (a file in data.dataset_dir), hf_hub_url (a Hugging Face id) or ms_hub_url (a ModelScope id)",
            ]
        )
    text = {key: value for key, value in entry.items() if isinstance(value, str)}
    if "url" in entry and "sha256" not in entry:
        yield "url needs sha256, the checksum that `sha256sum` prints for the file"
    if "sha256" in text and not is_sha256(text["sha256"]):
        yield f"sha256={shown(text['sha256'])}: 64 hexadecimal digits are expected"
    if "url" in text:
        if problem := url_problem(text["url"]):
            yield f"url={text['url'][:200]!r}: {problem}"
        elif not readable_suffix(text["url"], text.get("file_name")):
            yield f"url={text['url'][:200]}: {SUFFIX_RULE}"
    hub_id = text.get("hf_hub_url", "")
    if "hf_hub_url" in text and (not HUB_ID.fullmatch(hub_id) or is_loader(hub_id)):
        yield f"hf_hub_url={hub_id[:200]!r}: the id of a dataset of the hub is expected, organisation/name"
    modelscope_id = text.get("ms_hub_url")
    if modelscope_id is not None and not MODELSCOPE_ID.fullmatch(modelscope_id):
        yield f"ms_hub_url={modelscope_id[:200]!r}: the id of a dataset of ModelScope is expected, organisation/name"
    files = entry.get("data_files")
    inside = [*(files if isinstance(files, list) else [files]), *(entry.get(key) for key in ("folder", "revision"))]
    for key, value in [
        ("file_name", entry.get("file_name")),
        *(("data_files, folder, revision", each) for each in inside),
    ]:
        if isinstance(value, str) and (problem := path_problem(value, may_be_absolute=key == "file_name")):
            yield f"{key}: {value[:200]!r} {problem}"


HUB_ID = re.compile(r"(?:[\w.-]*\w[\w.-]*/)?[\w.-]*\w[\w.-]*", re.ASCII)


def at_modelscope(spec: DatasetSpec) -> DatasetSpec:
    """The entry as `data.use_modelscope` reads it: from ModelScope instead of the Hugging Face hub, where it names both.

    Its revision is one of the Hugging Face hub then, and left out.
    """
    if spec.hf_hub_url and not spec.ms_hub_url:
        say(
            f"dataset {spec.name!r}: its entry ({spec.origin}) has no ms_hub_url, and is read from the Hugging Face hub"
        )
    return replace(spec, hf_hub_url=None, revision=None) if spec.ms_hub_url and spec.hf_hub_url else spec


def is_loader(name: str) -> bool:
    """Whether `datasets.load_dataset` takes the name for one of its loaders, which read files of any place, not for a hub id."""
    found = find_spec("datasets")  # imports nothing
    return bool(found and found.origin and (Path(found.origin).parent / "packaged_modules" / name).is_dir())


def path_problem(path: str, *, may_be_absolute: bool) -> str:
    """Why an entry may not name this path: it leads out of its folder, or is an address. Empty for a legal one."""
    parts = re.split(r"[/\\]", path)
    if "\0" in path:
        return "holds a NUL character"
    if ".." in parts:
        return "leads out of its folder by `..`; put the file there, or type its path instead of the name"
    if "://" in path or path.startswith(("\\\\", "//")):
        return "is an address, and a path is expected"
    if not may_be_absolute and (path.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[/\\]", path)):
        return "is absolute, and a path in the dataset is expected"
    return ""


def format_and_columns(formatting: str, named: dict[str, str], ranking: bool) -> tuple[str, dict[str, str]]:
    """The format of the records and the columns that they are read by.

    As in LLaMA-Factory, an entry that names columns has no others: one that names a prompt and no answer is plain text.
    Raises ValueError for columns that exclude each other.
    """
    formatting = ALIASES.get(formatting, formatting)
    default = default_columns(formatting)
    main = next(iter(default))
    other = {"prompt": "messages", "messages": "prompt"}[main]  # both name the column with the conversation
    if formatting != "alpaca" and other in named and main not in named:
        named = {main: named[other], **{key: column for key, column in named.items() if key != other}}
    if ("chosen" in named) != ("rejected" in named):
        raise ValueError("columns: chosen and rejected belong together; name both")
    if ranking and "kto_tag" in named:
        raise ValueError("columns.kto_tag: a record has either ranked answers or feedback on one answer")
    if formatting == "alpaca" and named.keys() == {"prompt"} and not ranking:
        return "text", named
    if formatting == "alpaca" and "prompt" in named and not named.keys() & {"response", "chosen"}:
        raise ValueError("columns: prompt is named and the answer is not; add response, or chosen and rejected")
    if "tools" in named and formatting == "text":
        raise ValueError("columns.tools: plain text calls no tools; name the format of a conversation, or no tools")
    if ranking and formatting in ("text", "turns"):
        raise ValueError(
            f"formatting={formatting} does not support ranked pairs; use alpaca, sharegpt, messages or transcript"
        )
    pair = {"chosen": "chosen", "rejected": "rejected"} if ranking and formatting != "alpaca" else {}
    if not named:  # these have one name everywhere
        optional = {
            "alpaca": ("history", "system"),
            "sharegpt": ("system", "tools"),
            "messages": ("system", "tools"),
        }.get(formatting, ("system",) if main == "messages" else ())
        named = {name: name for name in optional}
    if not named.keys() & {*default, "chosen"}:
        return formatting, {**({} if pair and formatting == "transcript" else default), **pair, **named}
    if formatting in ("messages", "transcript") and "chosen" in named:
        return formatting, named  # without `main` the two columns are whole dialogues
    return formatting, {main: default[main], **pair, **named}
