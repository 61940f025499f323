"""From an entry to raw records: every kind of file, whole and broken, folders, downloads and the hub."""

import csv
import hashlib
import json
from types import SimpleNamespace

import pyarrow
import pytest

from glmtuner.data import json_stream
from glmtuner.data.read import read
from glmtuner.data.records import BadRecord
from glmtuner.data.spec import DatasetSpec
from glmtuner.errors import DataError

RECORDS = [{"instruction": f"q{number}", "output": f"a{number}\u2028\U0001f600"} for number in range(3)]


def spec_of(**keys):
    return DatasetSpec(**{"name": "x", "kind": "dataset_info", "origin": "data/dataset_info.json", **keys})


def source_of(dataset_dir, split="train", package_data=None, cache_dir=None, **keys):
    return read(
        spec_of(**keys),
        dataset_dir=dataset_dir,
        package_data=package_data or dataset_dir / "shipped",
        split=split,
        cache_dir=cache_dir,
    )


def rows_of(folder, content, name="a.json"):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return [(row.source, row.number, row.raw) for row in source_of(folder, file_name=name)]


def refused(folder, content, name="a.json"):
    with pytest.raises(DataError) as caught:
        rows_of(folder, content, name)
    assert str(caught.value).startswith(f"dataset 'x': {name} ")
    return str(caught.value)


def bad(row):
    assert isinstance(row[2], BadRecord)
    return row[1], row[2].reason


# Kinds of files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS, ensure_ascii=False),
        json.dumps(RECORDS, indent=2),
        json.dumps({"data": RECORDS}),
        json.dumps({"version": 1, "data": RECORDS}, indent=1),
        "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
        "\r\n".join(json.dumps(record) for record in RECORDS) + "\r\n",
    ],
    ids=["array", "indented", "data", "data indented", "lines", "windows lines"],
)
def test_json_in_every_layout(tmp_path, content, mark):
    rows = rows_of(tmp_path, mark + content.encode())
    assert rows == [("a.json", number, record) for number, record in enumerate(RECORDS, start=1)]


LAYOUTS = {
    "records": json.dumps(RECORDS, ensure_ascii=False),
    "indented": json.dumps(RECORDS, indent=2),
    "values": "[12, 345.5e10 , true,null, -1]",
    "escapes": '[{"a": "\\ud83d\\ude00 \\u4e2d \\n"}, {"b": {"c": [1, 2, {}]}}]',
    "text behind": '[{"a": 1}\n,\n {"b": 22}] \n\n x',
    "cut": '[{"a": 1},\n\n {"a": "中文',
    "no comma": '[{"a": 1}\n\n {"a": 2}]',
    "a word": '[{"a": 1},\n\n\n {"a": nul}, {"a": 3}]',
    "an escape": '[{"a": 1},\n {"a": "\\x"}, {"a": "a long text behind it"}]',
    "a line break": '[{"a": "1\n2"}, {"a": "a long text behind it"}]',
    "open": '[{"a": 1}, ',
    "empty": " [ ] ",
}


def records_and_error(folder):
    """The records of a.json, the reasons of broken ones, and the error that ends them."""
    rows = []
    try:
        for row in source_of(folder, file_name="a.json"):
            rows.append(row.raw.reason if isinstance(row.raw, BadRecord) else row.raw)
    except DataError as error:
        rows.append(str(error))
    return rows


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, layout, piece):
    (tmp_path / "a.json").write_text(LAYOUTS[layout], encoding="utf-8")
    whole = records_and_error(tmp_path)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", piece)
    assert records_and_error(tmp_path) == whole


def test_an_array_is_read_no_further_than_asked_for(tmp_path):
    record = json.dumps(RECORDS[0]).encode()
    content = b"[" + b",\n".join([record] * 100_000) + b",\n\xff]"
    (tmp_path / "a.json").write_bytes(content)
    rows = iter(source_of(tmp_path, file_name="a.json"))
    assert next(rows).raw == RECORDS[0]
    with pytest.raises(DataError, match=f"not UTF-8: byte 0xff at offset {len(content) - 2};"):
        list(rows)


def test_a_broken_record_is_placed_far_into_an_array(tmp_path):
    record = json.dumps(RECORDS[0])
    (tmp_path / "a.json").write_text(f"[{record},\n" + f"{record},\n" * 49_998 + '  {"a" 1}]')
    with pytest.raises(DataError, match=r"at line 50000, column 8, record 50000: Expecting ':' delimiter$"):
        list(source_of(tmp_path, file_name="a.json"))


def test_jsonl_numbers_lines_and_skips_blank_ones(tmp_path):
    lines = ["", json.dumps(RECORDS[0]), '{"instruction": "q"', "[1]", '{"instruction": "q']
    rows = rows_of(tmp_path, "\n".join(lines), "a.jsonl")
    assert rows[0] == ("a.jsonl", 2, RECORDS[0])
    assert bad(rows[1]) == (3, "not JSON: Expecting ',' delimiter at column 20")
    assert bad(rows[2]) == (4, "an object is expected, got [1] (list)")
    assert bad(rows[3]) == (5, "not JSON: Unterminated string starting at column 17")


def test_jsonl_is_read_no_further_than_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" + b"\n" * 100_000 + b"\xff")
    assert next(iter(source_of(tmp_path, file_name="a.jsonl"))).raw == RECORDS[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path, encoding):
    long = "long\n" * 50_000
    with (tmp_path / "a.csv").open("w", encoding=encoding, newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["instruction", "output"], ["q, 1", 'say "a"'], ["q2", long]])
    rows = [row.raw for row in source_of(tmp_path, file_name="a.csv")]
    assert rows == [{"instruction": "q, 1", "output": 'say "a"'}, {"instruction": "q2", "output": long}]


def test_csv_rows_of_another_length_are_bad_records(tmp_path):
    rows = rows_of(tmp_path, "instruction,output\nq,a,extra\nq\nq,a\n", "a.csv")
    assert [bad(row) for row in rows[:2]] == [
        (1, "the row does not have the 2 cells of the header"),
        (2, "the row does not have the 2 cells of the header"),
    ]
    assert rows[2][2] == {"instruction": "q", "output": "a"}


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"instruction": "q", "history": [["x", "y"]]}, {"instruction": None, "history": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert [row.raw for row in source_of(tmp_path, file_name="a.parquet")] == records


def test_text_has_a_record_a_line(tmp_path):
    assert [row[2] for row in rows_of(tmp_path, "one\r\n\ntwo", "a.txt")] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[{"a": 1},\n {"a": ',
            "is not JSON at line 2, column 8, record 2: Expecting value; the file is truncated",
        ),
        ("a.json", '[{"a": 1},', "line 1, column 11, record 2: Expecting value; the file is truncated"),
        ("a.json", '[{"a": 1}', "line 1, column 10, record 1: Expecting ',' delimiter"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', "line 2, column 2, record 1: Expecting ',' delimiter"),
        ("a.json", '[{"a": 1}] x', "line 1, column 12, record 1: text after the array"),
        ("a.json", "3", "holds 3 (int) where an array of objects is expected"),
        ("a.json", '{"a"\n: 1', "is not JSON at line 2, column 4: Expecting ',' delimiter; the file is truncated"),
        ("a.json", "", "is empty"),
        ("a.json", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.json", '[{"a": "\u4e2d"}]'.encode("gb18030"), "is not UTF-8: byte 0xd6 at offset 8; convert it"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xd6\xd0"}', "is not UTF-8: byte 0xd6 at offset 7 of line 2; convert it"),
        ("a.csv", b"a,b\n\xd6\xd0,1", "is not UTF-8: byte 0xd6; convert it"),
        ("a.csv", 'a,b\n"x,1\ny,2\n', "is not CSV at line 3: unexpected end of data"),
        ("a.csv", "a,a\n1,2", "names a column twice in its header: a, a"),
        ("a.parquet", b"PAR1 not really", "is not a readable parquet file: Arrow"),
    ],
)
def test_a_broken_file_says_where(tmp_path, name, content, message):
    assert message in refused(tmp_path, content, name)


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "a,b\n")])
def test_a_file_without_records_is_an_error(tmp_path, name, content):
    with pytest.raises(DataError, match=f"dataset 'x': no records in {name}"):
        rows_of(tmp_path, content, name)


def test_another_kind_of_file_names_the_legal_ones(tmp_path):
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(
        DataError, match=r"a\.xml .*\.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet, \.arrow, \.feather, \.txt"
    ):
        source_of(tmp_path, file_name="a.xml")


# Which file


def test_a_missing_file_names_its_neighbours(tmp_path):
    for name in ("alpaca_zh_demo.json", "belle.json", "notes.md"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError) as caught:
        source_of(tmp_path, file_name="alpaca_zh_demmo.json")
    message = str(caught.value)
    assert message.startswith(
        f"dataset 'x' (data/dataset_info.json): no file {tmp_path}/alpaca_zh_demmo.json; did you mean "
    )
    assert f"'alpaca_zh_demo.json'? {tmp_path} holds alpaca_zh_demo.json, belle.json; " in message
    assert "file_name in data/dataset_info.json" in message and message.endswith(
        "data.dataset_dir=<the folder it is in>"
    )
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'no'}"):
        source_of(tmp_path / "no", file_name="a.json")


def test_only_the_catalogue_looks_into_the_package(tmp_path):
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    for folder, text in ((shipped, "shipped"), (own, "own")):
        folder.mkdir()
        (folder / "a.json").write_text(json.dumps([{"text": text}]))
    both = {"file_name": "a.json", "package_data": shipped}
    assert next(iter(source_of(own, kind="catalogue", **both))).raw == {"text": "shipped"}
    assert next(iter(source_of(own, **both))).raw == {"text": "own"}
    with pytest.raises(DataError, match="no file"):
        source_of(tmp_path / "elsewhere", **both)


def test_fingerprint_is_the_sha256_of_each_file(tmp_path):
    (tmp_path / "a.json").write_text("[{}]")
    sha256 = hashlib.sha256(b"[{}]").hexdigest()
    assert source_of(tmp_path, file_name="a.json").fingerprint() == {"a.json": sha256}


def test_a_wrong_sha1_is_warned_about_and_a_wrong_sha256_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[{}]")
    source_of(tmp_path, file_name="a.json", file_sha1=hashlib.sha1(b"[{}]").hexdigest())
    assert capsys.readouterr().out == ""
    source_of(tmp_path, file_name="a.json", file_sha1="0" * 40)
    assert "dataset 'x': a.json has sha1" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"a.json has sha256 .*data/dataset_info.json .*{'0' * 64}"):
        source_of(tmp_path, file_name="a.json", sha256="0" * 64)


def test_one_file_has_only_the_training_split(tmp_path):
    (tmp_path / "a.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"a\.json is one file and has no split 'test'; type data\.split=train"):
        source_of(tmp_path, split="test", file_name="a.json")


def test_an_entry_may_say_which_split_its_file_is(tmp_path):
    (tmp_path / "a.json").write_text("[{}]")
    spec = spec_of(file_name="a.json", split="validation")
    assert list(read(spec, dataset_dir=tmp_path, package_data=tmp_path, split="test"))


# Folders


def folder_of(root, *names):
    for name in names:
        path = root / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"text": name}]))
    return root


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["b.json", "a.json", "sub/c.json"], "train", ["a.json", "b.json", "sub/c.json"]),
        (["a.json", ".hidden/b.json", "dataset_info.json", "c.md", "d.txt"], "train", ["a.json"]),
        (["train-0.json", "train-1.json", "test.json"], "train", ["train-0.json", "train-1.json"]),
        (["train.json", "test.json"], "test", ["test.json"]),
        (["train/a.json", "dev/a.json"], "validation", ["dev/a.json"]),
        (["a.json", "my_test.json"], "train", ["a.json"]),
        (["zh.json", "en.json"], "en", ["en.json"]),
    ],
)
def test_a_folder_is_read_by_split(tmp_path, names, split, expected):
    folder_of(tmp_path, *names)
    rows = list(source_of(tmp_path, split=split, file_name="set"))
    assert [(row.source, row.number) for row in rows] == [(f"set/{name}", 1) for name in expected]


def test_a_folder_tells_what_it_leaves_out_and_what_it_lacks(tmp_path, capsys):
    folder_of(tmp_path, "train.json", "test.json")
    source_of(tmp_path, file_name="set")
    assert "the split train leaves out test.json" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no file .*split 'validation'; it holds test\.json, train"):
        source_of(tmp_path, split="validation", file_name="set")


def test_a_folder_inside_the_folder(tmp_path):
    folder_of(tmp_path, "en/a.json", "zh/a.json")
    assert [row.source for row in source_of(tmp_path, file_name="set", folder="zh")] == ["set/zh/a.json"]


# The hub

COMMIT = "0123456789" * 4


class FakeHub(list):
    """What `datasets.load_dataset` gives back, as far as it is looked at."""

    _fingerprint = "abc"

    def __init__(self, records, commit=COMMIT):
        super().__init__(records)
        self.cache_files = [{"filename": f"cache/org___name/default/0.0.0/{commit}/name-train.arrow"}]

    def with_format(self, name):
        assert name == "arrow"
        return self

    def iter(self, size):
        return iter([pyarrow.Table.from_pylist(list(self))])


@pytest.fixture
def hub(monkeypatch):
    """Calls of `load_dataset`, which returns or raises `answer`."""
    datasets = pytest.importorskip("datasets")
    called = SimpleNamespace(calls=[], answer=FakeHub(RECORDS))

    def load_dataset(path, **options):
        called.calls.append((path, options))
        if isinstance(called.answer, Exception):
            raise called.answer
        return called.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return called


def test_a_hub_set_is_asked_for_by_every_key_of_its_entry(tmp_path, hub):
    keys = {"hf_hub_url": "org/name", "subset": "en", "folder": "f", "data_files": ["a.json"], "revision": COMMIT}
    source = source_of(tmp_path, split="test", cache_dir=tmp_path, **keys)
    assert hub.calls == [
        (
            "org/name",
            {
                "name": "en",
                "data_dir": "f",
                "data_files": ["a.json"],
                "split": "test",
                "revision": COMMIT,
                "cache_dir": str(tmp_path),
                "token": None,
            },
        )
    ]
    assert [tuple(row) for row in source][-1] == ("org/name/en", 3, RECORDS[2])
    assert source.fingerprint() == {"org/name/en": f"commit {COMMIT}"}


def test_a_hub_sets_own_split_wins(tmp_path, hub):
    read(spec_of(hf_hub_url="org/name", split="dev"), dataset_dir=tmp_path, package_data=tmp_path, split="test")
    assert hub.calls[0][1]["split"] == "dev"


def test_a_local_file_wins_over_the_hub_if_it_is_there(tmp_path, hub):
    keys = {"hf_hub_url": "org/name", "file_name": "a.json"}
    assert [row.source for row in source_of(tmp_path, **keys)] == ["org/name"] * 3
    (tmp_path / "a.json").write_text("[{}]")
    assert [row.source for row in source_of(tmp_path, **keys)] == ["a.json"]


def test_another_commit_than_the_pinned_one_is_refused(tmp_path, hub):
    hub.answer = FakeHub(RECORDS, commit="f" * 40)
    with pytest.raises(
        DataError, match=f"revision {COMMIT} of org/name could not be reached, and the cache holds ffff"
    ):
        source_of(tmp_path, hf_hub_url="org/name", revision=COMMIT)


def test_without_a_commit_the_fingerprint_is_that_of_datasets(tmp_path, hub):
    hub.answer = FakeHub(RECORDS, commit="somewhere")
    assert source_of(tmp_path, hf_hub_url="org/name").fingerprint() == {"org/name": "fingerprint abc"}


def test_an_empty_hub_set_is_an_error(tmp_path, hub):
    hub.answer = FakeHub([])
    with pytest.raises(DataError, match="no records in org/name"):
        list(source_of(tmp_path, hf_hub_url="org/name"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ValueError("Unknown split \"x\". Should be one of ['train']."),
            "fix data.split=train, or add split to the entry",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['default']"), "name one of them as subset in the entry"),
        (ConnectionError("Couldn't reach\nthe Hub"), "ConnectionError: Couldn't reach the Hub; check the network"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "the dataset is a script, which is not run",
        ),
    ],
)
def test_failures_of_the_hub_are_reported_with_advice(tmp_path, monkeypatch, hub, error, advice):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("glmtuner.families.hub.time.sleep", lambda seconds: None)  # between attempts
    hub.answer = error
    with pytest.raises(DataError) as caught:
        source_of(tmp_path, hf_hub_url="no-such-org/no-such-name-anywhere")
    assert "the hub dataset no-such-org/no-such-name-anywhere could not be loaded" in str(caught.value)
    assert advice in str(caught.value)


def test_a_gated_dataset_says_how_to_log_in(tmp_path, hub):
    from datasets.exceptions import DatasetNotFoundError

    hub.answer = DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub.")
    with pytest.raises(DataError, match=r"run `hf auth login` and type model\.use_auth_token=true"):
        source_of(tmp_path, hf_hub_url="org/name")


def test_datasets_own_reader_serves_a_folder_of_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    (tmp_path / "repository").mkdir()
    table = pyarrow.Table.from_pylist([{**record, "history": [["x", "y"]]} for record in RECORDS])
    parquet.write_table(table, tmp_path / "repository" / "train.parquet")
    source = source_of(tmp_path, hf_hub_url=str(tmp_path / "repository"), cache_dir=tmp_path / "cache")
    assert [row.raw for row in source] == [{**record, "history": [["x", "y"]]} for record in RECORDS]
