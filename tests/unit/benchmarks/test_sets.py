"""Local copies of benchmarks' sets: the layouts that they are found in, and what is said of those that are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from glmtuner.benchmarks.sets import copy_of, files_of, load_set
from glmtuner.errors import DataError

LAYOUTS = {
    "as on the hub": "law/{split}-00000-of-00001.jsonl",
    "as the hub converts it": "law/{split}/0000.jsonl",
    "by split": "{split}/law.jsonl",
    "by split, named twice": "{split}/law_{split}.jsonl",
    "below data": "data/law/{split}.jsonl",
}


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_configuration_is_read_from_every_layout(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "ORG/exam"
    for split in ("dev", "val"):  # `datasets` would take both words for one split
        for name in ("law", "lawyers"):
            path = folder / layout.format(split=split).replace("law", name)
            write(path, {"answer": f"{name} {split}"})
    found = load_set("exam", "ORG/exam", "law", [tmp_path], {})
    assert {split: rows["answer"] for split, rows in found.items()} == {"dev": ["law dev"], "val": ["law val"]}


def test_a_readme_of_the_hub_says_which_files_a_configuration_has(tmp_path: Path) -> None:
    write(tmp_path / "exam/a/one.jsonl", {"answer": 1})
    write(tmp_path / "exam/b/two.jsonl", {"answer": 2})
    about = "---\nconfigs:\n- config_name: law\n  data_files:\n  - split: test\n    path: b/two.jsonl\n---\n# exam\n"
    (tmp_path / "exam/README.md").write_text(about, encoding="utf-8")
    found = load_set("exam", "ORG/exam", "law", [tmp_path], {})
    assert {split: rows["answer"] for split, rows in found.items()} == {"test": [2]}


def test_shards_are_one_split_in_their_order_and_main_needs_no_folder(tmp_path: Path) -> None:
    for number in (1, 0):
        write(tmp_path / f"sums/train-{number:05}-of-00002.jsonl", {"n": number})
    assert load_set("sums", "openai/sums", "main", [tmp_path], {})["train"]["n"] == [0, 1]
    assert files_of(tmp_path / "sums", "law") == {}  # the files of all are not those of one


def test_copies_are_found_by_both_names_and_in_the_hubs_cache(tmp_path: Path) -> None:
    assert copy_of("ORG/exam", [tmp_path]) is None
    cached = tmp_path / "datasets--ORG--exam/snapshots/0123abc"
    cached.mkdir(parents=True)
    assert copy_of("ORG/exam", [tmp_path]) == cached
    (tmp_path / "exam").mkdir()
    assert copy_of("ORG/exam", [tmp_path]) == tmp_path / "exam"
    (tmp_path / "ORG/exam").mkdir(parents=True)
    assert copy_of("ORG/exam", [tmp_path]) == tmp_path / "ORG/exam"
    assert copy_of(str(tmp_path), []) == tmp_path


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    command = r"hf download ORG/exam --repo-type dataset --local-dir .*ORG/exam"
    with pytest.raises(DataError, match=rf"benchmark exam: its set ORG/exam has no copy in .*; {command}|{command}"):
        load_set("exam", "ORG/exam", "law", [tmp_path], {})
    with pytest.raises(DataError, match=r"type benchmark.data_dir=<folder>, or set GLMTUNER_BENCHMARKS"):
        load_set("exam", "ORG/exam", "law", [], {})
    write(tmp_path / "exam/chemistry/test.jsonl", {"n": 1})
    with pytest.raises(DataError, match=r"has no .parquet, .json, .jsonl, .csv of law; legal are law/<split>"):
        load_set("exam", "ORG/exam", "law", [tmp_path], {})
    (tmp_path / "exam/law").mkdir()
    (tmp_path / "exam/law/test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"benchmark exam: .*exam cannot be read \(ArrowInvalid"):
        load_set("exam", "ORG/exam", "law", [tmp_path], {})
    write(tmp_path / "exam/law/dev.jsonl", {"n": 1})
    with pytest.raises(DataError, match="in several formats; keep one"):
        load_set("exam", "ORG/exam", "law", [tmp_path], {})
