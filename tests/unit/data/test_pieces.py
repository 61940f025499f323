"""Pieces of files: the same records as the whole file has, made by processes, kept after a kill, shared by nodes, found when damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from glmtuner.config.groups import Data
from glmtuner.config.paths import ASSETS, cache_root
from glmtuner.data import find, piecewise
from glmtuner.data.blocks import BlockEncoder
from glmtuner.data.claims import Claims
from glmtuner.data.encode import Encoder
from glmtuner.data.files import LocalFiles
from glmtuner.data.hub_sets import HubSet
from glmtuner.data.pieces import Count, PieceRows
from glmtuner.data.prepare import Prepared, prepare
from glmtuner.data.tokenized import COUNTS
from glmtuner.errors import DataError
from glmtuner.templates.glm import TEMPLATES

SIZE = 3000  # of a piece, in bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalFiles.pieces, "__defaults__", (SIZE,))


def records(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"问题 {n}\n" + "长" * (n % 40), "output": f"答案 {n} answer"} for n in range(count)]


def lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def written(folder: Path, kind: str) -> dict[str, Path]:
    """Files of a kind, with about 300 records."""
    rows = records(300)
    if kind == "blank lines":
        rows = [row for n, row in enumerate(rows) if n % 7]
        (folder / "a.jsonl").write_bytes(lines(rows).replace(b"\n", b"\n\n \n") + b"\n\n")
    elif kind == "crlf":
        (folder / "a.jsonl").write_bytes(lines(rows).replace(b"\n", b"\r\n"))
    elif kind == "bad lines":
        text = lines(rows).split(b"\n")
        text[150] = b"{"
        text[299] = b'"text"'
        (folder / "a.jsonl").write_bytes(b"\n".join(text))
    elif kind == "utf-16":
        (folder / "a.jsonl").write_bytes(lines(rows).decode().encode("utf-16"))
    elif kind == "array":
        (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "text":
        (folder / "a.txt").write_text("\n".join(row["instruction"] for row in rows), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=37)
    elif kind == "several":
        for name, part in (("a.jsonl", rows[:200]), ("b.jsonl", rows[200:203]), ("c.jsonl", rows[203:])):
            (folder / name).write_bytes(lines(part))
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize(
    "kind", ["plain", "blank lines", "crlf", "bad lines", "utf-16", "array", "text", "parquet", "several"]
)
def test_pieces_have_the_rows_of_the_whole_file_and_their_numbers(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    if kind == "plain":
        (folder / "a.jsonl").write_bytes(lines(records(300)))
    source = LocalFiles("set", written(folder, kind))
    whole = list(source)
    parts = source.pieces(SIZE)
    assert len(parts) == 1 if kind in ("utf-16", "array") else len(parts) > 4  # those are read from their beginning
    taken: dict[str, int] = {}
    found = []
    for part in parts:
        assert source.numbers_before(part) == {label: taken.get(label, 0) for label in source.numbers_before(part)}
        rows = PieceRows(source.rows_of, part, source.numbers_before(part))
        found += list(rows)
        for label, count in rows.counts.items():
            taken[label] = taken.get(label, 0) + count
    assert [(row.source, row.number, str(row.raw)) for row in found] == [
        (row.source, row.number, str(row.raw)) for row in whole
    ]


def test_pieces_of_a_hub_set(tmp_path: Path) -> None:
    from datasets import Dataset

    source = HubSet("set", "org/set", Dataset.from_list(records(2500)), "1" * 40)
    parts = source.pieces(1)
    assert len(parts) == 3
    found = [row for part in parts for row in source.rows_of(part[0], source.numbers_before(part)["org/set"], Count())]
    assert found == list(source)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


def prepared(
    folder: Path, tokenizer: Any, rows: bytes | None = None, encoder: Any = Encoder, **options: Any
) -> Prepared:
    if rows is not None:
        (folder / "a.jsonl").write_bytes(rows)
    data = Data(dataset=["a.jsonl"], dataset_dir=str(folder), max_source_length=64, max_target_length=64, **options)
    made = encoder(template=TEMPLATES["glm4"], tokenizer=tokenizer, **data.lengths())
    return prepare(find("a.jsonl", folder, []), data, made, hub_cache=None, token=False)


def entry() -> Path:
    (folder,) = (cache_root() / "tokenized").iterdir()
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_rows_are_those_of_the_whole_file_by_processes_and_by_one(tmp_path, tokenizer, monkeypatch):
    content = lines(records(300)).replace(b'"output"', b'"id": 1, "output"', 1)
    broken = content.replace('"答案 7 answer"'.encode(), b'""').replace('"答案 290 answer"'.encode(), b'""')
    found = []
    for size, workers in ((1 << 30, None), (SIZE, 1), (SIZE, 2)):
        monkeypatch.setattr(LocalFiles.pieces, "__defaults__", (size,))
        shutil.rmtree(cache_root() / "tokenized", ignore_errors=True)
        made = prepared(tmp_path, tokenizer, broken, max_bad_records=2, preprocessing_num_workers=workers)
        about = (made.counts, made.bad, made.columns, made.first, made.hashes)
        found.append((made.rows.to_list(), about, made.rows.features, len(made.rows.cache_files)))
    assert [record.number for record in found[0][1][1]] == [8, 291]
    assert found[0][:3] == found[1][:3] == found[2][:3]
    assert found[0][3] == 1 and found[1][3] == found[2][3] > 5
    with pytest.raises(DataError, match=r"2 broken records and data\.max_bad_records=1: a\.jsonl: record 8"):
        shutil.rmtree(entry())
        prepared(tmp_path, tokenizer, broken, max_bad_records=1)


def test_documents_are_cut_at_the_ends_of_pieces_and_none_is_lost(tmp_path, tokenizer):
    encoder = partial(BlockEncoder, block_length=50)
    rows = [{"text": f"文本 {n} " + "word " * (n % 30)} for n in range(300)]
    made = prepared(tmp_path, tokenizer, lines(rows), encoder, preprocessing_num_workers=1)
    assert len(made.rows.cache_files) > 5 and made.counts.records == 300
    start, documents = TEMPLATES["glm4"].documents(tokenizer, [row["text"] for row in rows])
    learned = [token for row in made.rows["input_ids"] for token in row[len(start) :]]
    assert learned == [token for document in documents for token in document]


def test_an_error_names_the_records_number_in_the_file(tmp_path, tokenizer):
    rows = [{"instruction": f"问题 {n}", "output": f"答案 {n}"} for n in range(300)]
    info = {"a": {"file_name": "a.jsonl"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "a.jsonl").write_bytes(lines([*rows[:250], {**rows[250], "document": "文" * 30}, *rows[251:]]))
    data = Data(dataset=["a"], dataset_dir=str(tmp_path), max_source_length=64, max_target_length=64)
    encoder = Encoder(template=TEMPLATES["glm4"], tokenizer=tokenizer, **data.lengths())
    with pytest.raises(DataError, match=r"record 251\b.*document"):
        prepare(find("a", tmp_path, []), data, encoder, hub_cache=None, token=False)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from glmtuner.data import files, tokenized
from test_pieces import SIZE, LocalFiles, prepared
from glmtuner.config.paths import ASSETS
from transformers import AutoTokenizer
LocalFiles.pieces.__defaults__ = (SIZE,)
finish, finished = tokenized.PieceWriter.finish, []
def finish_and_die(writer, info):
    if len(finished) == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # with a piece that is written and not complete
    finished.append(finish(writer, info))
    return finished[-1]
if {dies}:
    tokenized.PieceWriter.finish = finish_and_die
prepared(Path({folder!r}), AutoTokenizer.from_pretrained(ASSETS / "tiny_glm"), preprocessing_num_workers={workers})
"""


def child(folder: Path, *, dies: bool = False, workers: int = 1) -> subprocess.Popen[str]:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), dies=dies, workers=workers)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_after_a_kill_only_the_rest_is_tokenized_and_a_damaged_piece_again(tmp_path, tokenizer, capsys, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(records(300)))
    killed = child(tmp_path, dies=True)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, output
    assert not (entry() / COUNTS).exists()
    kept = {name: content for name, content in files_of(entry()).items() if not name.startswith(".")}
    assert {name for name in kept if name.startswith("piece")} == {f"piece-0000{n}.json" for n in range(3)}
    assert any(name.endswith(".partial") for name in files_of(entry()))
    damaged = entry() / "rows-00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")  # of the same size
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, examples: encoded.append(examples) or encode(self, examples))
    made = prepared(tmp_path, tokenizer, preprocessing_num_workers=1)
    said = capsys.readouterr().out
    total = len(made.rows.cache_files)
    assert f"3 of {total} pieces are there already and are checked" in said
    assert "piece-00001.json: its rows are damaged" in said
    assert (
        300
        > sum(map(len, encoded))
        == 300 - sum(json.loads(kept[f"piece-0000{n}.json"])["counts"]["records"] for n in (0, 2))
    )
    after = files_of(entry())
    assert not any(name.startswith(".") for name in after)
    assert {name: after[name] for name in kept} == kept  # piece 1 is mended
    shutil.rmtree(entry())
    again = prepared(tmp_path, tokenizer, preprocessing_num_workers=1)
    assert files_of(entry()) == after and again.counts == made.counts  # as if nobody had been killed

    # a file of the complete entry is cut
    cut = entry() / "rows-00002.arrow"
    cut.write_bytes(cut.read_bytes()[:100])
    encoded.clear()
    prepared(tmp_path, tokenizer, preprocessing_num_workers=1)
    assert "rows-00002.arrow is damaged" in capsys.readouterr().out
    assert files_of(entry()) == after
    assert 0 < sum(map(len, encoded)) < 60


def test_two_nodes_share_the_pieces_of_an_entry(tmp_path, tokenizer, monkeypatch):
    """The second process is of another host, so that no lock keeps it from taking part."""
    (tmp_path / "a.jsonl").write_bytes(lines(records(300)))
    other = child(tmp_path)  # its output stays in the pipe
    deadline = time.monotonic() + 300
    while not list(cache_root().glob("tokenized/*/.*.alive")) and other.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(other.pid, signal.SIGSTOP)  # in the middle of its work, or before it
    took = []
    take = Claims.take
    monkeypatch.setattr("socket.gethostname", lambda: "another.node")
    monkeypatch.setattr("glmtuner.data.claims.DEAD_SECONDS", 2.0)
    monkeypatch.setattr(Claims, "take", lambda self, name: take(self, name) and (took.append(name) or True))
    made = prepared(tmp_path, tokenizer, preprocessing_num_workers=1)  # what the stopped one has claimed is taken over
    assert took and made.counts.records == 300
    os.kill(other.pid, signal.SIGCONT)
    output, _ = other.communicate(timeout=300)
    assert other.returncode == 0, output  # it finds what is made
    after = files_of(entry())
    shutil.rmtree(entry())
    prepared(tmp_path, tokenizer, preprocessing_num_workers=1)
    assert {name: content for name, content in after.items() if not name.startswith(".")} == files_of(entry())


def test_claims_of_the_living_are_kept_and_those_of_the_dead_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr("glmtuner.data.claims.BEAT_SECONDS", 0.05)
    monkeypatch.setattr("glmtuner.data.claims.DEAD_SECONDS", 0.6)
    hosts = iter(["one", "two"])
    monkeypatch.setattr("socket.gethostname", lambda: next(hosts, "two"))
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("piece") and not first.take("piece") and not second.take("piece")
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:  # it beats: its clock is not asked
            assert not second.take("piece")
        first.ended.set()  # as if it had been killed: neither beats nor releases
        deadline = time.monotonic() + 60
        while not second.take("piece"):
            assert time.monotonic() < deadline
        assert not first.take("piece")
        second.release("piece")
        assert first.take("piece")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / ".piece.claim").write_text(f"two.{gone.stdout.strip()}.12345678")
    with Claims(tmp_path) as third:  # of the same host, where the process can be asked for
        assert third.take("piece")
    assert [*tmp_path.iterdir()] == []


def test_a_stream_is_resumed_from_its_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(piecewise, "STREAMED_RECORDS", 500)
    rows = lines(records(1200))
    encode, encoded = Encoder.encode, []

    def counted(self, examples):
        encoded.append(len(examples))
        if len(encoded) == 5 and fails:
            raise OSError("No space left on device")
        return encode(self, examples)

    fails = True
    monkeypatch.setattr(Encoder, "encode", counted)
    with pytest.raises(OSError, match="No space"):
        prepared(tmp_path, tokenizer, rows, max_samples=1100)
    kept = {name for name in files_of(entry()) if name.startswith("piece")}
    assert kept and not any(name.startswith(".") for name in files_of(entry()))
    fails, before = False, sum(encoded)
    encoded.clear()
    made = prepared(tmp_path, tokenizer, max_samples=1100)
    assert sum(encoded) == 1100 - 500 * len(kept) < before + 600
    assert made.rows["answer"][:] == [f"答案 {n} answer" for n in range(1100)]
    assert len(made.hashes) == 1100 * 8 and made.first[0].messages[0].content == "问题 0\n"
