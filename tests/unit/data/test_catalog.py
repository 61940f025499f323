"""From a name to an entry: the order of the places, the keys of both formats, and each error's words."""

import json
from pathlib import Path

import pytest

from glmtuner.data.catalog import find
from glmtuner.errors import DataError, UnknownName


def write_info(folder, entries):
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")


def entry_of(folder, entry):
    write_info(folder, {"x": entry})
    return find("x", folder, [])


def refused(folder, entry):
    with pytest.raises(DataError) as caught:
        entry_of(folder, entry)
    assert str(caught.value).startswith(f"dataset 'x' ({folder}/dataset_info.json): ")
    return str(caught.value)


def write_records(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


# Places


def test_dataset_info_wins_over_the_catalogue_and_that_over_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, "ab"), (second, "abc")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.yaml").write_text(f"hf_hub_url: {folder.name}/{name}\nlicense: mit\n")
    write_info(tmp_path, {"a": {"hf_hub_url": "info/a"}})
    write_records(tmp_path / "c" / "c.json", {"text": "x"})
    specs = {name: find(name, tmp_path, [first, second]) for name in "abc"}
    assert [spec.hf_hub_url for spec in specs.values()] == ["info/a", "first/b", "second/c"]
    assert [spec.kind for spec in specs.values()] == ["dataset_info", "catalogue", "catalogue"]
    assert specs["b"].origin == str(first / "b.yaml")


def test_an_unknown_name_offers_the_nearest_and_the_places(tmp_path):
    write_info(tmp_path, {"alpaca_zh": {"file_name": "x.json"}})
    catalogue = tmp_path / "catalogue"
    catalogue.mkdir()
    (catalogue / "belle.yaml").write_text("hf_hub_url: a/b\n")
    with pytest.raises(UnknownName) as caught:
        find("alpaca_hz", tmp_path, [catalogue])
    assert str(caught.value).startswith("no dataset named 'alpaca_hz'; did you mean 'alpaca_zh'?")
    assert str(caught.value).endswith(
        "known: alpaca_zh, belle; add one: "
        f"conf/dataset/<name>.yaml, an entry in {tmp_path}/dataset_info.json, or a path to a json, jsonl, csv, "
        "parquet or arrow file"
    )


@pytest.mark.parametrize("name", ["", " ", "nothing", "no/such.json"])
def test_names_of_nothing_are_unknown(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match="no dataset named"):
        find(name, tmp_path / "data", [])


def test_a_misspelt_path_offers_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "data" / "alpaca.json", {"text": "x"})
    with pytest.raises(UnknownName, match=r"did you mean 'data/alpaca\.json'"):
        find("data/alpcaa.json", "elsewhere", [])
    with pytest.raises(UnknownName, match=r"did you mean 'alpaca\.json'"):
        find("alpcaa.json", "data", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"x": {"file_name": "a.json"},\n "y": }',
            "dataset_info.json is not JSON at line 2, column 7: Expecting value",
        ),
        ("[1]", "an object of entries by dataset name is expected, got [1] (list)"),
    ],
)
def test_a_broken_dataset_info_is_reported_with_its_place(tmp_path, text, message):
    write_info(tmp_path, text)
    with pytest.raises(DataError) as caught:
        find("x", tmp_path, [])
    assert message in str(caught.value)


def test_a_broken_catalogue_file_is_reported(tmp_path):
    (tmp_path / "x.yaml").write_text("hf_hub_url: [a\n")
    with pytest.raises(DataError, match=r"x\.yaml is not YAML: .*line 2"):
        find("x", tmp_path, [tmp_path])


# Entries

ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
BESIDE = {"system": "system", "tools": "tools"}  # the turns, read by these names if the entry names no columns


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, ("alpaca", {**ALPACA, "history": "history", "system": "system"})),
        ({"columns": {"prompt": "a", "query": "", "response": "b"}}, ("alpaca", {"prompt": "a", "response": "b"})),
        ({"columns": {"history": "h"}}, ("alpaca", {**ALPACA, "history": "h"})),
        ({"columns": {"response": "b"}}, ("alpaca", {"prompt": "instruction", "response": "b"})),
        ({"columns": {"prompt": "text"}}, ("text", {"prompt": "text"})),
        ({"formatting": "sharegpt"}, ("sharegpt", {**SHAREGPT, **BESIDE})),
        ({"formatting": "sharegpt", "columns": {"system": "s"}}, ("sharegpt", {**SHAREGPT, "system": "s"})),
        ({"formatting": "openai"}, ("messages", {"messages": "messages", **BESIDE})),
        ({"formatting": "sharegpt", "ranking": True}, ("sharegpt", {**SHAREGPT, **PAIR, **BESIDE})),
        ({"formatting": "transcript", "ranking": True}, ("transcript", PAIR)),
        ({"formatting": "transcript", "columns": {"messages": "text"}}, ("transcript", {"prompt": "text"})),
        ({"ranking": True}, ("alpaca", {**ALPACA, "history": "history", "system": "system"})),
    ],
)  # fmt: skip
def test_columns_that_an_entry_leaves_out(tmp_path, entry, expected):
    spec = entry_of(tmp_path, {"file_name": "a.json", **entry})
    assert (spec.formatting, spec.columns) == expected


def test_every_documented_key_is_accepted(tmp_path):
    entry = {
        "hf_hub_url": "org/name", "ms_hub_url": "ms/name", "om_hub_url": "om/name", "script_url": "script",
        "cloud_file_name": "s3://x", "file_name": "a.json", "file_sha1": "0" * 40, "formatting": "sharegpt",
        "ranking": False, "subset": "en", "split": "train", "folder": "f", "num_samples": 5,
        "columns": {"messages": "m", "system": "s", "kto_tag": "k", "tools": "", "images": None},
        "tags": {"role_tag": "r", "content_tag": "c", "user_tag": "u", "assistant_tag": "a", "observation_tag": "o",
                 "function_tag": "f", "system_tag": "s"},
    }  # fmt: skip
    spec = entry_of(tmp_path, entry)
    assert (spec.subset, spec.split, spec.folder, spec.num_samples, spec.file_name) == ("en", "train", "f", 5, "a.json")
    assert spec.columns == {"messages": "m", "system": "s", "kto_tag": "k"}
    assert spec.tags["observation_tag"] == "o"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_nme": "a.json", "file_name": "a.json"}, "unknown key 'file_nme'; did you mean 'file_name'?"),
        ({"file_name": "a.json", "zzzzzzzzz": 1}, "unknown key 'zzzzzzzzz'; known: file_name, "),
        ({"file_name": "a.json", "columns": {"promt": "a"}}, "unknown key of columns 'promt'; did you mean 'prompt'?"),
        ({"file_name": "a.json", "tags": {"user": "a"}}, "unknown key of tags 'user'"),
        ({"file_name": 3}, "file_name: text is expected, got 3 (int)"),
        ({"file_name": "a.json", "ranking": "yes"}, "ranking: true or false is expected, got 'yes' (str)"),
        ({"file_name": "a.json", "num_samples": True}, "num_samples: a whole number is expected, got True (bool)"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples=0: at least 1 is expected"),
        ({"file_name": "a.json", "columns": ["a"]}, "columns: an object is expected, got ['a'] (list)"),
        ({"file_name": "a.json", "columns": {"prompt": 1}}, "columns.prompt: text is expected, got 1 (int)"),
        (
            {"file_name": "a.json", "formatting": "text", "columns": {"tools": "t"}},
            "columns.tools: plain text calls no tools",
        ),
        ({"file_name": "a.json", "columns": {"prompt": "p", "tools": "t"}}, "prompt is named and the answer is not"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "columns.images=i: images "),
        ({"script_url": "belle"}, "script_url=belle: a dataset script is code and is not run; add file_name"),
        ({"om_hub_url": "a/b"}, "om_hub_url=a/b: Modelers is not read; add file_name"),
        ({"cloud_file_name": "s3://a"}, "cloud_file_name=s3://a: cloud storage is not read; add file_name"),
        (
            {},
            "add file_name (a file in data.dataset_dir), hf_hub_url (a Hugging Face id) or ms_hub_url (a ModelScope id)",
        ),
        ({"url": "https://a/b.json"}, "url needs sha256"),
        ({"file_name": "a.json", "formatting": "alpcaa"}, "no formatting named 'alpcaa'; did you mean 'alpaca'?"),
        ({"file_name": "a.json", "columns": {"prompt": "a", "chosen": "b"}}, "columns: chosen and rejected "),
        ({"file_name": "a.json", "columns": {"prompt": "a", "query": "b"}}, "prompt is named and the answer is not"),
        ({"file_name": "a.json", "ranking": True, "columns": {"kto_tag": "b"}}, "either ranked answers or feedback"),
        (
            {"file_name": "a.json", "ranking": True, "formatting": "turns"},
            "formatting=turns does not support ranked pairs; use alpaca, sharegpt, messages or transcript",
        ),
        ("a.json", "an object of keys is expected, got 'a.json' (str)"),
    ],
)
def test_an_entry_says_what_is_wrong_with_it(tmp_path, entry, message):
    assert message in refused(tmp_path, entry)


def test_everything_wrong_with_an_entry_is_reported_at_once(tmp_path):
    message = refused(tmp_path, {"file": "a", "subset": 1, "columns": {"audios": "a"}})
    assert all(part in message for part in ("unknown key 'file'", "subset: text", "columns.audios=a", "add file_name"))


def test_the_other_entries_of_a_file_stay_usable(tmp_path):
    write_info(tmp_path, {"bad": {"script_url": "x"}, "good": {"file_name": "a.json"}})
    assert find("good", tmp_path, []).file_name == "a.json"


def test_an_entry_that_cannot_be_served_points_to_the_catalogues(tmp_path):
    write_info(tmp_path, {"belle": {"script_url": "belle"}})
    (tmp_path / "belle.yaml").write_text("hf_hub_url: a/b\n")
    with pytest.raises(DataError, match=r"or remove the entry: .*belle\.yaml has one that works"):
        find("belle", tmp_path, [tmp_path])


# Paths

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PLAIN = {"prompt": "instruction", "response": "output"}
JUDGED = {"response": "answer", "kto_tag": "label"}
TRL = {"messages": "prompt", "response": "completion"}
DIALOGUE = "Human: q\nAssistant: a"
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "formatting", "columns"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", ALPACA),
        ({"instruction": "q", "output": "a", "history": []}, "alpaca", {**PLAIN, "history": "history"}),
        ({"instruction": "q", "output": "a", "system": ""}, "alpaca", {**PLAIN, "system": "system"}),
        ({"prompt": "q", "response": "a"}, "alpaca", {"prompt": "prompt", "response": "response"}),
        ({"query": "q", "response": "a"}, "alpaca", {"prompt": "query", "response": "response"}),
        ({"question": "q", "answer": "a", "id": 1}, "alpaca", {"prompt": "question", "response": "answer"}),
        ({"input": "q", "output": "a"}, "alpaca", {"prompt": "input", "response": "output"}),
        ({"prompt": "q", "answer": "a", "label": True}, "alpaca", {"prompt": "prompt", **JUDGED}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "alpaca", {"prompt": "prompt", **PAIR}),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE}, "transcript", PAIR),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "messages", PAIR),
        ({"conversations": TURNS}, "sharegpt", {"messages": "conversations"}),
        ({"conversations": TURNS[:1], "chosen": "a", "rejected": "b"}, "sharegpt", {**SHAREGPT, **PAIR}),
        ({"messages": MESSAGES, "label": False}, "messages", {"messages": "messages", "kto_tag": "label"}),
        ({"messages": TURNS}, "sharegpt", {"messages": "messages"}),
        ({"conversations": ["q", "a"]}, "turns", {"messages": "conversations"}),
        ({"text": "x", "url": "y"}, "text", {"prompt": "text"}),
        ({"prompt": "q", "completion": "a"}, "alpaca", {"prompt": "prompt", "response": "completion"}),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "messages", TRL),
        ({"prompt": MESSAGES[:1], "completion": "a"}, "messages", TRL),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "label": True}, "messages", {**TRL, "kto_tag": "label"}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "sharegpt", TRL),
    ],
)  # fmt: skip
def test_a_path_is_read_by_its_first_record(tmp_path, monkeypatch, record, formatting, columns):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "here.json", record)
    spec = find("here.json", "nowhere", [])
    assert (spec.formatting, spec.columns, spec.kind) == (formatting, columns, "path")
    assert spec.ranking is ("chosen" in columns)


def test_a_path_of_answer_lists_is_ranked(tmp_path):
    path = write_records(tmp_path / "x.json", {"instruction": "q", "output": ["a", "b"]})
    assert find(str(path), tmp_path, []).ranking


def test_a_path_is_looked_for_here_and_then_in_the_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "data" / "a.json", {"text": "x"})
    assert find("a.json", "data", []).file_name == str(tmp_path / "data" / "a.json")
    write_records(tmp_path / "a.json", {"instruction": "q", "output": "a"})
    assert find("a.json", "data", []).formatting == "alpaca"


def test_a_folder_is_read_by_its_first_file(tmp_path):
    write_records(tmp_path / "set" / "part-2.json", {"text": "x"})
    write_records(tmp_path / "set" / "part-1.json", {"instruction": "q", "output": "a"})
    assert find(str(tmp_path / "set"), tmp_path, []).formatting == "alpaca"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[{"foo": 1, "bar": 2}]',
            "the records have foo, bar, which is not a known format; legal: instruction and",
        ),
        (
            "a.json",
            '[{"chosen": "a", "rejected": "b"}]',
            "the records have chosen, rejected, which is not a known format",
        ),
        ("a.json", "[3]", "a.json: record 1: an object is expected, got 3 (int)"),
        (
            "a.xlsx",
            "x",
            "ends in .xlsx; .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather, .txt files can",
        ),
        ("a.json", "", "a.json is empty"),
    ],
)
def test_a_path_that_cannot_be_read_says_why(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(DataError) as caught:
        find(name, "data", [])
    assert message in str(caught.value)


def test_a_typed_folder_without_data_says_so_and_a_bare_word_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset '\./empty' holds no data file"):
        find("./empty", "data", [])
    with pytest.raises(UnknownName):
        find("empty", "data", [])
