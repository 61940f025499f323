"""From a dataset's name to its entry: where its records are, what shape they have, what their columns are called.

A name is looked up in `<dataset_dir>/dataset_info.json`, in the catalogue folders (one YAML file a dataset), and last
as a path to a file or a folder. An entry of either kind may have every key of `DatasetSpec` but `name`, `kind` and
`origin`, and those of `FOREIGN`. A file that exists wins over `url`, and `url` over `hf_hub_url`.
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
FOREIGN = {  # keys of the other tools; harmless beside a file or a Hugging Face id, not enough without
    "script_url": "a dataset script is code and is not run",
    "ms_hub_url": "ModelScope is not read",
    "om_hub_url": "Modelers is not read",
    "cloud_file_name": "cloud storage is not read",
}
TYPES: dict[str, tuple[Any, ...]] = {
    "num_samples": (int,),
    "num_records": (int,),
    "ranking": (bool,),
    "gated": (bool,),
    "columns": (dict,),
    "tags": (dict,),
    "data_files": (str, list),
}  # of an entry's keys; the others are text
IN_WORDS = {str: "text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}


def find(name: str, dataset_dir: str | Path, catalogue: Iterable[Path]) -> DatasetSpec:
    """The entry of a dataset; `catalogue` are folders of YAML files, the first that has one wins."""
    info = Path(dataset_dir) / "dataset_info.json"
    folders = list(catalogue)
    entries = info_entries(info)
    presets = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    if name in entries:
        instead = f"; or remove the entry: {presets[name]} has one that can" if name in presets else ""
        return spec_of(name, entries[name], kind="dataset_info", origin=str(info), instead=instead)
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
    """The entries of a dataset_info.json; none when there is no such file."""
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
    """The entry in a catalogue file."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def spec_of(name: str, entry: Any, *, kind: str, origin: str, instead: str = "") -> DatasetSpec:
    """The checked entry; everything that is wrong with it is told at once. `instead` ends the error."""
    whose = f"dataset {name!r} ({origin})"
    if not isinstance(entry, dict):
        raise DataError(f"{whose}: an object of keys is expected, got {shown(entry)}")
    given = {key: value for key, value in entry.items() if value is not None and value != ""}
    if troubles := [*wrong_keys(given), *wrong_sources(given)]:
        raise DataError(f"{whose}: {'; '.join(troubles)}{instead}")
    known: dict[str, Any] = {key: value for key, value in given.items() if key not in FOREIGN}
    named = {key: column for key, column in known.pop("columns", {}).items() if column}
    tags = {key: word for key, word in known.pop("tags", {}).items() if word}
    ranking = known.pop("ranking", False) or "chosen" in named
    try:
        formatting, columns = shape_of(known.pop("formatting", "alpaca"), named, ranking)
    except (UnknownName, ValueError) as error:
        raise DataError(f"{whose}: {error}{instead}") from None
    known |= {"kind": kind, "origin": origin}
    return DatasetSpec(name=name, formatting=formatting, ranking=ranking, columns=columns, tags=tags, **known)


def wrong_keys(entry: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an entry's keys and the types of its values."""
    legal = [spec_field.name for spec_field in fields(DatasetSpec) if spec_field.name not in ("name", "kind", "origin")]
    yield from unknown("key", entry, [*legal, *FOREIGN])
    for key, value in entry.items():
        types = TYPES.get(key, (str,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield f"{key}: {' or '.join(IN_WORDS[kind] for kind in types)} is expected, got {shown(value)}"
        elif types == (int,) and value < 1:
            yield f"{key}={value}: at least 1 is expected"
    for group, names in (("columns", COLUMNS), ("tags", TAGS)):
        if isinstance(inner := entry.get(group), dict):
            yield from unknown(f"key of {group}", inner, names)
            for key, value in inner.items():
                if value is not None and not isinstance(value, str):
                    yield f"{group}.{key}: text is expected, got {shown(value)}"
                elif value and key in NOT_TEXT:
                    yield f"columns.{key}={value}: {NOT_TEXT[key]} cannot be learned here; use a set of text only"


def unknown(what: str, given: Iterable[str], legal: Iterable[str]) -> Iterator[str]:
    """One phrase for each given word that is not legal, with the nearest ones, or all when none is near."""
    for key in given:
        if key not in legal:
            yield f"unknown {what} {key!r}{did_you_mean(str(key), legal) or '; known: ' + ', '.join(legal)}"


def wrong_sources(entry: dict[str, Any]) -> Iterator[str]:
    """What keeps an entry from saying where its records are."""
    if not any(entry.get(key) for key in ("file_name", "url", "hf_hub_url")):
        foreign = [f"{key}={entry[key]}: {why}" for key, why in FOREIGN.items() if key in entry]
        yield "; ".join([*foreign, "add file_name (a file in data.dataset_dir) or hf_hub_url (a Hugging Face id)"])
    if "url" in entry and "sha256" not in entry:
        yield "url needs sha256, the checksum that `sha256sum` prints for the file"


def shape_of(formatting: str, named: dict[str, str], ranking: bool) -> tuple[str, dict[str, str]]:
    """The record shape and the columns that its records are read by.

    As in the other tools, an entry that names columns of its own has no others: one that names a prompt and no answer
    is plain text. Raises ValueError for columns that cannot go together.
    """
    formatting = ALIASES.get(formatting, formatting)
    default = default_columns(formatting)
    main = next(iter(default))
    other = {"prompt": "messages", "messages": "prompt"}[main]  # two words for the column that holds the conversation
    if formatting != "alpaca" and other in named and main not in named:
        named = {main: named[other], **{key: column for key, column in named.items() if key != other}}
    if ("chosen" in named) != ("rejected" in named):
        raise ValueError("columns: chosen and rejected go together; name both")
    if ranking and "kto_tag" in named:
        raise ValueError("columns.kto_tag: a record has either ranked answers or feedback on one answer")
    if formatting == "alpaca" and named.keys() == {"prompt"} and not ranking:
        return "text", named
    if formatting == "alpaca" and "prompt" in named and not named.keys() & {"response", "chosen"}:
        raise ValueError("columns: prompt is named and the answer is not; add response, or chosen and rejected")
    if ranking and formatting in ("text", "turns"):
        raise ValueError(f"formatting={formatting} has no ranked pairs; use alpaca, sharegpt, messages or transcript")
    pair = {"chosen": "chosen", "rejected": "rejected"} if ranking and formatting != "alpaca" else {}
    if not named.keys() & {*default, "chosen"}:
        return formatting, {**({} if pair and formatting == "transcript" else default), **pair, **named}
    if formatting in ("messages", "transcript") and "chosen" in named:
        return formatting, named  # without `main` the two columns hold whole dialogues
    return formatting, {main: default[main], **pair, **named}


PROMPTS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "response", "answer", "completion")
DIALOGUES = ("conversations", "conversation", "messages", "turns")


def existing_path(name: str, dataset_dir: Path) -> Path | None:
    """The data file or folder that a name is the path of, from the working directory, else from `dataset_dir`."""
    typed = Path(name).expanduser()
    for path in (typed, dataset_dir / typed) if name.strip() else ():
        if path.is_file() or (path.is_dir() and ("/" in name or data_files(path))):
            return path.absolute()
    return None


def neighbours(name: str, dataset_dir: Path) -> list[str]:
    """The data files beside the one that a name might be the misspelt path of, as they would be typed."""
    typed = Path(name).expanduser()
    if "/" not in name and typed.suffix not in READERS:
        return []
    folders = [folder for folder in (typed.parent, dataset_dir / typed.parent) if folder.is_dir()]
    files = [file for folder in folders for file in folder.iterdir()]
    return [str(typed.parent / file.name) for file in files if file.suffix in READERS and file.name not in NOT_RECORDS]


def spec_of_path(name: str, path: Path) -> DatasetSpec:
    """The entry of a file or folder that has none, told from its first record."""
    files = data_files(path) if path.is_dir() else [""]
    suffixes = [(path / file).suffix.lower() for file in files]
    if not suffixes or suffixes[0] not in READERS:
        found = f"ends in {suffixes[0] or 'nothing'}" if suffixes else "holds no data file"
        raise DataError(f"dataset {name!r} {found}; {', '.join(READERS)} files can be read, convert it to one of them")
    label = f"{name.rstrip('/')}/{files[0]}" if files[0] else name
    first = next(iter(LocalFiles(name, {label: path / files[0]})))
    if isinstance(first.raw, BadRecord):
        raise DataError(f"dataset {name!r}: {label}: record {first.number}: {first.raw.reason}")
    formatting, columns = recognised(first.raw)
    if not formatting:
        raise DataError(
            f"dataset {name!r}: {label}: the first record has {listed(list(first.raw)) or 'no keys'}, which is no "
            "known shape; legal: instruction and output (alpaca; also input, history, system), conversations "
            "(sharegpt), messages (OpenAI), instruction with chosen and rejected, or text; name other columns in an "
            "entry of dataset_info.json in data.dataset_dir"
        )
    ranking = "chosen" in columns or isinstance(first.raw.get(columns.get("response", "")), list)
    return DatasetSpec(
        name=name, file_name=str(path), formatting=formatting, ranking=ranking, columns=columns, origin=name
    )


def recognised(raw: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The shape and the columns that a record's keys speak for; ("", {}) when they speak for none."""
    extras = {key: key for key in ("system",) if key in raw}
    tag = next((key for key in ("kto_tag", "label") if isinstance(raw.get(key), bool)), None)
    extras |= {"kto_tag": tag} if tag else {}
    pair = {key: key for key in ("chosen", "rejected") if "chosen" in raw and "rejected" in raw}
    for column in DIALOGUES:
        if isinstance(turns := raw.get(column), list) and turns:
            return dialogue_shape(turns[0]), {"messages": column, **pair, **extras}
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


def dialogue_shape(turn: Any) -> str:
    """The shape of a conversation, told from its first turn."""
    if isinstance(turn, str):
        return "turns"
    return "messages" if isinstance(turn, dict) and "role" in turn and "content" in turn else "sharegpt"
