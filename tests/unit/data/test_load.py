"""From a name to examples: the real sets, how broken records are reported, and what `max_samples` saves."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from glmtuner.data import SkippedRecord, check_bad_record_limit, find, load
from glmtuner.errors import DataError

GOOD = {"instruction": "q", "output": "a"}
BROKEN = {"instruction": "q", "output": ""}


def load_lines(folder, *records, **options):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = folder / "x.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.jsonl", **options.pop("entry", {})}}))
    loaded = load(find("x", folder, []), dataset_dir=folder, package_data=folder, **options)
    return replace(loaded, examples=list(loaded.examples))


KINDS = {
    "answer": lambda e: e.messages[-1].role == "assistant" and e.chosen is None and e.desirable is None,
    "pair": lambda e: e.messages[-1].role == "user" and e.chosen and e.rejected,
    "feedback": lambda e: e.messages[-1].role == "assistant" and e.desirable in (True, False),
}


@pytest.mark.parametrize(
    ("name", "records", "kind", "most_turns"),
    [
        ("alpaca_zh_demo", 1000, "answer", 2),
        ("identity", 91, "answer", 2),
        ("self_cognition", 80, "answer", 2),
        ("oaast_sft_zh", 689, "answer", 6),
        ("oaast_rm_zh", 775, "pair", 5),
        ("dpo_zh_demo", 300, "pair", 2),
        ("kto_en_demo", 300, "feedback", 12),
    ],
)
def test_real_sets_parse_whole(real_records, name, records, kind, most_turns):
    path = real_records(name)
    for asked in (name, str(path)):
        loaded = load(find(asked, path.parent, []), dataset_dir=path.parent, package_data=path.parent)
        examples = list(loaded.examples)
        assert (len(examples), loaded.bad) == (records, []), asked
        assert all(KINDS[kind](example) for example in examples), asked
        assert max(len(example.messages) for example in examples) == most_turns, asked
        assert [len(sha256) for sha256 in loaded.files.values()] == [64], asked


def test_bad_records_are_counted_and_placed(tmp_path):
    loaded = load_lines(tmp_path, GOOD, BROKEN, '{"instruction": "q", "out', GOOD)
    assert len(loaded.examples) == 2
    assert [str(line) for line in loaded.bad] == [
        "x.jsonl: record 2: field output: empty answer",
        "x.jsonl: record 3: not JSON: Unterminated string starting at column 22",
    ]


def test_the_limit_names_three_records_and_the_knob(tmp_path):
    bad = load_lines(tmp_path, GOOD, BROKEN, BROKEN, BROKEN, BROKEN, GOOD).bad
    check_bad_record_limit(bad, 4)
    with pytest.raises(DataError) as caught:
        check_bad_record_limit(bad, 3)
    message = str(caught.value)
    assert message.startswith("dataset 'x': 4 broken records and data.max_bad_records=3: ")
    places = [f"x.jsonl: record {number}: field output: empty answer" for number in (2, 3, 4)]
    assert "; ".join([*places, "and 1 more; "]) in message and "record 5" not in message
    assert message.endswith("data.max_bad_records=4")


def test_the_limit_counts_over_all_datasets():
    bad = [SkippedRecord(name, f"{name}.json", 1, "", "not JSON") for name in ("a", "b")]
    check_bad_record_limit([], 0)
    check_bad_record_limit(bad, 2)
    with pytest.raises(
        DataError,
        match=r"datasets 'a', 'b': 2 broken records and data\.max_bad_records=1: a\.json: record 1: not JSON; b",
    ):
        check_bad_record_limit(bad, 1)
    with pytest.raises(DataError, match="dataset 'a': 1 broken record and"):
        check_bad_record_limit(bad[:1], 0)


def test_a_dataset_without_a_good_record_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"dataset 'x': 2 broken records and no good one: .*formatting=alpaca"):
        load_lines(tmp_path, BROKEN, {"question": "q"})


@pytest.mark.parametrize(("max_samples", "num_samples", "kept"), [(2, None, 2), (None, 2, 2), (1, 2, 1), (9, 9, 3)])
def test_samples_are_the_first_good_ones(tmp_path, max_samples, num_samples, kept):
    records = [{**GOOD, "output": str(number)} for number in range(3)]
    entry = {"num_samples": num_samples}
    loaded = load_lines(tmp_path, BROKEN, *records, BROKEN, max_samples=max_samples, entry=entry)
    assert [example.messages[-1].content for example in loaded.examples] == [str(number) for number in range(kept)]
    assert len(loaded.bad) == (2 if kept == 3 else 1)


def test_nothing_heavy_is_imported(tmp_path):
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'huggingface_hub'}"
    code = f"import sys, glmtuner.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
