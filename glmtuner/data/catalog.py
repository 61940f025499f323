"""From a dataset's name to its entry: the source of its records, their format, and the names of their columns.

A name is looked up in `<dataset_dir>/dataset_info.json`, in the catalogue folders (a YAML file for each dataset), and last
as the path of a file or a folder. An entry may have every key of `DatasetSpec` except `name`, `kind` and `origin`, and those
of `FOREIGN`. A file that exists takes precedence over `url`, and `url` over `hf_hub_url`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from glmtuner.data.files import NOT_RECORDS, LocalFiles, data_files
from glmtuner.data.formats import ALIASES, default_columns
from glmtuner.data.raw import listed
from glmtuner.data.readers import READERS
from glmtuner.data.records import BadRecord, shown
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import DataError, UnknownName, did_you_mean

COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "chosen", "rejected", "kto_tag"),
    *("tools", "images", "videos", "audios"),
)
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")
NOT_TEXT = {"tools": "tool calls", "images": "images", "videos": "videos", "audios": "sounds"}
FOREIGN = {  # keys of LLaMA-Factory's format that are ignored beside a file or a Hugging Face id
    "script_url": "a dataset script is code and is not run",
    "ms_hub_url": "ModelScope is not read",
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
}  # of an entry's keys; all others are text
TYPE_NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def find(name: str, dataset_dir: str | Path, catalogue: Iterable[Path]) -> DatasetSpec:
    """The entry of a dataset; `catalogue` are folders of YAML files, earlier ones first. Raises UnknownName, DataError."""
    info = Path(dataset_dir) / "dataset_info.json"
    folders = list(catalogue)
    entries = info_entries(info)
    presets = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    if name in entries:
        hint = f"; or remove the entry: {presets[name]} has one that works" if name in presets else ""
        return spec_of(name, entries[name], kind="dataset_info", origin=str(info), hint=hint)
    if name in presets:
        return spec_of(name, preset_entry(presets[name]), kind="catalogue", origin=str(presets[name]))
    if path := existing_path(name, Path(dataset_dir)):
        return spec_of_path(name, path)
    raise UnknownName(
        "dataset",
        name,
        known={*entries, *presets, *neighbours(name, Path(dataset_dir))},
        add_one=f"conf/dataset/<name>.yaml, an entry in {info}, or a path to a json, jsonl, csv or parquet file",
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
    known |= {"kind": kind, "origin": origin}
    return DatasetSpec(name=name, formatting=formatting, ranking=ranking, columns=columns, tags=tags, **known)


def key_errors(entry: dict[str, Any]) -> Iterator[str]:
    """Errors of an entry's keys and of the types of its values."""
    legal = [spec_field.name for spec_field in fields(DatasetSpec) if spec_field.name not in ("name", "kind", "origin")]
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


def source_errors(entry: dict[str, Any]) -> Iterator[str]:
    """Errors of an entry that does not tell where its records are."""
    if not any(entry.get(key) for key in ("file_name", "url", "hf_hub_url")):
        foreign = [f"{key}={entry[key]}: {why}" for key, why in FOREIGN.items() if key in entry]
        yield "; ".join([*foreign, "add file_name (a file in data.dataset_dir) or hf_hub_url (a Hugging Face id)"])
    if "url" in entry and "sha256" not in entry:
        yield "url needs sha256, the checksum that `sha256sum` prints for the file"


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
    if ranking and formatting in ("text", "turns"):
        raise ValueError(
            f"formatting={formatting} does not support ranked pairs; use alpaca, sharegpt, messages or transcript"
        )
    pair = {"chosen": "chosen", "rejected": "rejected"} if ranking and formatting != "alpaca" else {}
    if not named.keys() & {*default, "chosen"}:
        return formatting, {**({} if pair and formatting == "transcript" else default), **pair, **named}
    if formatting in ("messages", "transcript") and "chosen" in named:
        return formatting, named  # without `main` the two columns are whole dialogues
    return formatting, {main: default[main], **pair, **named}


PROMPTS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "response", "answer", "completion")
DIALOGUES = ("conversations", "conversation", "messages", "turns")


def existing_path(name: str, dataset_dir: Path) -> Path | None:
    """The data file or folder with this path, relative to the working directory or else to `dataset_dir`."""
    relative = Path(name).expanduser()
    for path in (relative, dataset_dir / relative) if name.strip() else ():
        if path.is_file() or (path.is_dir() and ("/" in name or data_files(path))):
            return path.absolute()
    return None


def neighbours(name: str, dataset_dir: Path) -> list[str]:
    """The paths of the data files in the folder of `name`, if it looks like the path of one."""
    path = Path(name).expanduser()
    if "/" not in name and path.suffix not in READERS:
        return []
    folders = [folder for folder in (path.parent, dataset_dir / path.parent) if folder.is_dir()]
    files = [file for folder in folders for file in folder.iterdir()]
    return [str(path.parent / file.name) for file in files if file.suffix in READERS and file.name not in NOT_RECORDS]


def spec_of_path(name: str, path: Path) -> DatasetSpec:
    """An entry for a file or folder without one, inferred from its first record. Raises DataError."""
    files = data_files(path) if path.is_dir() else [""]
    suffixes = [(path / file).suffix.lower() for file in files]
    if not suffixes or suffixes[0] not in READERS:
        problem = f"ends in {suffixes[0] or 'nothing'}" if suffixes else "holds no data file"
        raise DataError(
            f"dataset {name!r} {problem}; {', '.join(READERS)} files can be read, convert it to one of them"
        )
    label = f"{name.rstrip('/')}/{files[0]}" if files[0] else name
    first = next(iter(LocalFiles(name, {label: path / files[0]})))
    if isinstance(first.raw, BadRecord):
        raise DataError(f"dataset {name!r}: {label}: record {first.number}: {first.raw.reason}")
    formatting, columns = infer_format(first.raw)
    if not formatting:
        raise DataError(
            f"dataset {name!r}: {label}: the first record has {listed(list(first.raw)) or 'no keys'}, which is not "
            "a known format; legal: instruction and output (alpaca; also input, history, system), conversations "
            "(sharegpt), messages (OpenAI), instruction with chosen and rejected, or text; name other columns in an "
            "entry of dataset_info.json in data.dataset_dir"
        )
    ranking = "chosen" in columns or isinstance(first.raw.get(columns.get("response", "")), list)
    return DatasetSpec(
        name=name, file_name=str(path), formatting=formatting, ranking=ranking, columns=columns, origin=name
    )


def infer_format(raw: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The format and the columns that a record's keys imply; ("", {}) if they imply none."""
    extras = {key: key for key in ("system",) if key in raw}
    tag = next((key for key in ("kto_tag", "label") if isinstance(raw.get(key), bool)), None)
    extras |= {"kto_tag": tag} if tag else {}
    pair = {key: key for key in ("chosen", "rejected") if "chosen" in raw and "rejected" in raw}
    for column in DIALOGUES:
        if isinstance(turns := raw.get(column), list) and turns:
            return infer_dialogue_format(turns[0]), {"messages": column, **pair, **extras}
    prompt = next((key for key in PROMPTS if key in raw), "")
    if pair and isinstance(raw.get(prompt), list):
        return "messages", {"messages": prompt, **pair, **extras}
    if pair and not prompt and isinstance(raw["chosen"], list):
        return "messages", {**pair, **extras}
    if pair and not prompt and "Human:" in str(raw["chosen"]):
        return "transcript", {**pair, **extras}
    answer = next(({"response": key} for key in ANSWERS if key in raw), {})
    if prompt and (pair or answer):
        query = next(({"query": key} for key in ("input", "query") if key in raw and key != prompt), {})
        history = {"history": "history"} if "history" in raw else {}
        return "alpaca", {"prompt": prompt, **query, **history, **(pair or answer), **extras}
    return ("text", {"prompt": "text"}) if "text" in raw else ("", {})


def infer_dialogue_format(turn: Any) -> str:
    """The format of a conversation, inferred from its first turn."""
    if isinstance(turn, str):
        return "turns"
    return "messages" if isinstance(turn, dict) and "role" in turn and "content" in turn else "sharegpt"
