"""Files as other programs write them: everything that `datasets` saves, spreadsheets, compressions, encodings; and what is no file."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import zipfile
from datetime import date
from decimal import Decimal

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from pyarrow import ipc, parquet

from glmtuner.data import find, load
from glmtuner.errors import DataError

RECORDS = [{"instruction": f"q{number}\u2028", "output": f"答{number}"} for number in range(5)]
CHATS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"答{n}"}]} for n in range(5)]
TEXT = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def answers(path, split="train"):
    """The answers that a run would learn of a file or folder; no record is broken."""
    spec = find(str(path), path.parent, [], split=split)
    loaded = load(spec, dataset_dir=path.parent, package_data=path.parent, split=split)
    found = [example.messages[-1].content for example in loaded.examples]
    assert loaded.bad == []
    return found


ALL = [record["output"] for record in RECORDS]
WRITERS = {
    "saved": lambda data, path: data.save_to_disk(path),
    "saved in shards": lambda data, path: data.save_to_disk(path, num_shards=min(3, len(data))),
    "a.jsonl": lambda data, path: data.to_json(path),
    "a.json": lambda data, path: data.to_json(path, lines=False),
    "lines.json": lambda data, path: data.to_json(path),
    "a.jsonl.gz": lambda data, path: data.to_json(path, compression="gzip"),
    "a.csv": lambda data, path: data.to_csv(path),
    "a.tsv": lambda data, path: data.to_csv(path, sep="\t"),
    "index.csv": lambda data, path: data.to_csv(path, index=True),
    "a.parquet": lambda data, path: data.to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("num_records", [5, 1])
def test_whatever_datasets_writes_is_read(tmp_path, name, num_records):
    path = tmp_path / name
    WRITERS[name](Dataset.from_list(RECORDS[:num_records]), path)
    assert answers(path) == ALL[:num_records]
    if "csv" not in name and "tsv" not in name:  # these cannot hold lists
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        WRITERS[name](Dataset.from_list(CHATS[:num_records]), path)
        assert answers(path) == ALL[:num_records]


def test_a_saved_dict_of_splits_and_what_lies_beside_it(tmp_path):
    splits = {
        "train": Dataset.from_list(RECORDS),
        "test": Dataset.from_list(RECORDS[:2]),
        "extra_sft": Dataset.from_list(RECORDS[:1]),
    }
    path = tmp_path / "saved"
    DatasetDict(splits).save_to_disk(path)
    Dataset.from_list(RECORDS).map(lambda record: record, cache_file_name=str(path / "train" / "cache-0.arrow"))
    assert (path / "train" / "cache-0.arrow").is_file()
    assert [len(answers(path, split)) for split in ("train", "test", "extra_sft")] == [5, 2, 1]


def test_lists_in_cells_of_csv_are_read_if_they_are_json(tmp_path):
    path = tmp_path / "a.csv"
    Dataset.from_list([{"messages": json.dumps(chat["messages"])} for chat in CHATS]).to_csv(path)
    assert answers(path) == ALL
    Dataset.from_list([{"instruction": "q", "output": "a", "history": '[["x", "y"]]'}]).to_csv(path)
    assert answers(path) == ["a"]
    Dataset.from_list(CHATS).to_csv(path)  # as Python writes lists
    with pytest.raises(DataError, match=r"not a known format|CSV cannot hold lists"):
        answers(path)


def test_turns_that_datasets_stores_as_a_list_for_each_key(tmp_path):
    turn = {"role": Value("string"), "content": Value("string")}
    columns = [{"messages": {key: [each[key] for each in chat["messages"]] for key in turn}} for chat in CHATS]
    data = Dataset.from_list(columns, features=Features({"messages": Sequence(turn)}))
    assert isinstance(data[0]["messages"], dict)
    data.to_parquet(tmp_path / "a.parquet")
    data.to_json(tmp_path / "a.jsonl")
    assert answers(tmp_path / "a.parquet") == answers(tmp_path / "a.jsonl") == ALL


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.jsonl", data)
    return file.getvalue()


def zstandard(data):
    file = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(file, "zstd") as stream:
        stream.write(data)
    return file.getvalue().to_pybytes()


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard, "zip": zipped}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](TEXT.encode()))
    assert answers(path) == ALL
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"is not a readable|a\.jsonl\.{suffix} cannot be read"):
        answers(path)
    other = tmp_path / f"b.parquet.{suffix}"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "b.parquet")
    other.write_bytes(COMPRESSIONS[suffix]((tmp_path / "b.parquet").read_bytes()))
    assert answers(other) == ALL


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "array.jsonl", "a.csv", "a.txt"])
def test_unicode_encodings(tmp_path, name, encoding):
    if name in ("a.csv", "a.txt") and encoding.endswith("e"):
        return  # without a byte order mark only JSON tells
    texts = {"a.csv": "instruction,output\nq,答0\n", "a.txt": "答0\n"}
    text = texts.get(name, f"[{TEXT.replace(chr(10), ',').rstrip(',')}]" if name.startswith("array") else TEXT)
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    if name == "a.txt":
        spec = find(str(path), tmp_path, [])
        assert [each.text for each in load(spec, dataset_dir=tmp_path, package_data=tmp_path).examples] == ["答0"]
    else:
        assert answers(path) == (ALL[:1] if name == "a.csv" else ALL)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "instruction;output\na, b;c;\n".replace("c;", "c"), ["c"]),
        ("a.csv", "sep=;\ninstruction;output\na;b\n", ["b"]),
        ("a.csv", "instruction\toutput\na\tb\n", ["b"]),
        ("a.tsv", "instruction,output\na,b\n", ["b"]),
        ("a.csv", "instruction, output ,,\na,b,,\n,,,\n\nc,d,,\n", ["b", "d"]),
        ("a.csv", ",instruction,output\n0,a,b\n", ["b"]),
        ("a.csv", 'instruction,output\r\n"a\r\nb","c ""d"""\r\n', ['c "d"']),
        ("a.jsonl", '[{"instruction": "a", "output": "b"},\n {"instruction": "c", "output": "d"}]', ["b", "d"]),
        ("a.jsonl", '{\n "instruction": "a",\n "output": "b"\n}\n', ["b"]),
        ("a.jsonl", '{"version": 1,\n "data": [{"instruction": "a", "output": "b"}]}', ["b"]),
        ("a.ndjson", '{"instruction": "a", "output": "b"}', ["b"]),
        ("a.json", '{"instruction": "a", "output": "b"}', ["b"]),
        ("a.jsonl", '{"instruction": "a", "output": "b", "output": "c"}', ["c"]),  # the last one counts, as in Python
    ],
)
def test_what_spreadsheets_and_other_tools_write(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert answers(path) == expected


def test_a_cell_under_no_name_is_not_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,\nq,a,\nq,a,more\n")
    spec = find(str(path), tmp_path, [])
    loaded = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
    assert len(list(loaded.examples)) == 1
    assert "'more' is in a column without a name" in loaded.bad[0].reason


# Values that cannot be represented

ODD_JSON = ["1" * 5000, "-Infinity", "NaN", '"\\ud83d"', "1e999", "[" * 40 + "]" * 40, '{"\\ud83d\\n": 1}']


@pytest.mark.parametrize("value", ODD_JSON)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json"])
def test_a_value_that_nobody_needs_is_harmless_and_one_that_is_needed_is_a_bad_record(tmp_path, name, value):
    for column, num_bad in (("note", 0), ("output", 1)):
        lines = ['{"instruction": "q", "output": "a"}', f'{{"instruction": "q", "output": "a", "{column}": {value}}}']
        path = tmp_path / f"{column}-{name}"
        path.write_text(f"[{','.join(lines)}]" if name.startswith("array") else "\n".join(lines))
        spec = find(str(path), tmp_path, [])
        loaded = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
        assert len(list(loaded.examples)) == 2 - num_bad
        assert [record.number for record in loaded.bad] == [2] * num_bad
        assert "\n" not in "".join(map(str, loaded.bad))


def test_json_that_is_nested_too_deeply_is_a_bad_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        TEXT
        + '{"instruction": '
        + "[" * 100_000
        + "\n"
        + '{"instruction": "q", "output": "a", "x": '
        + "[" * 100_000
        + "]" * 100_000
        + "}\n"
    )
    spec = find(str(path), tmp_path, [])
    loaded = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
    assert len(list(loaded.examples)) == 5
    assert [(record.number, record.reason) for record in loaded.bad] == [
        (6, "nested too deeply"),
        (7, "nested too deeply"),
    ]


def arrow_table(column):
    """Five records, one of which has a value that Python cannot represent in the column."""
    not_utf8 = pyarrow.array([b"a", b"\xff\xfe", b"c", b"d", b"e"]).view(pyarrow.string())
    far_away = pyarrow.array([0, 2**62, 0, 0, 0], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    columns = {"instruction": [f"q{n}" for n in range(5)], "output": ALL}
    if column == "output":
        return pyarrow.table({**columns, "output": not_utf8})
    return pyarrow.table(
        {
            **columns,
            "note": not_utf8,
            "when": far_away,
            "day": [date(2026, 1, 1)] * 5,
            "price": [Decimal("1.5")] * 5,
            "raw": [b"\xff"] * 5,
        }
    )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_values_that_python_cannot_represent(tmp_path, suffix):
    for column in ("note", "output"):
        path, table = tmp_path / f"{column}{suffix}", arrow_table(column)
        if suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            new = ipc.new_stream if suffix == ".arrow" else ipc.new_file
            with path.open("wb") as file, new(file, table.schema) as writer:
                writer.write_table(table)
        spec = find(str(path), tmp_path, [])
        loaded = load(spec, dataset_dir=tmp_path, package_data=tmp_path)
        assert len(list(loaded.examples)) == (5 if column == "note" else 4)
        assert [(record.number, record.field) for record in loaded.bad] == ([] if column == "note" else [(2, "output")])


# What is no file


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a character device", "empty"])
@pytest.mark.parametrize("by", ["path", "entry", "folder"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind, by):
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / "a.jsonl"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        here = os.getcwd()
        os.chdir(folder)  # the address of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("a.jsonl")
        finally:
            os.chdir(here)
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "set/a.jsonl"}}))
    with pytest.raises(DataError, match=f"a.jsonl is {kind}"):
        spec = find({"path": str(path), "entry": "x", "folder": str(folder)}[by], tmp_path, [])
        list(load(spec, dataset_dir=tmp_path, package_data=tmp_path).examples)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/dev/stdin", "/dev/null"])
def test_names_that_no_file_can_have(tmp_path, name):
    from glmtuner.errors import GlmtunerError

    with pytest.raises(GlmtunerError, match=r"no dataset named|is a|is empty|ends in nothing"):
        find(name, tmp_path, [])
