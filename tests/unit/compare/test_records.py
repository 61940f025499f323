"""Records by their hashes: which changed, were added, removed or moved."""

import pytest

from glmtuner.compare.records import Reader, record_changes
from glmtuner.data.record_hashes import HASH_BYTES, changed_records, record_hash, split_hashes
from glmtuner.data.records import Example, Message

NOWHERE = [Reader(None, [], {}, None)] * 2


def hashes(text):
    return [letter.encode() * HASH_BYTES for letter in text]


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("abcd", "abcd", [], []), ("abcd", "abxd", [2], [2]), ("abcd", "abd", [2], []), ("abcd", "xabcd", [], [0]),
        ("abcd", "dcba", [], []), ("aab", "ab", [1], []), ("", "a", [], [0]), ("abcd", "xyzw", [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_changed_records(before, after, gone, new):
    assert changed_records(hashes(before), hashes(after)) == (gone, new)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("abcd", "abcd", []),
        ("abcd", "abxd", ["set: record 3 of 4 changed"]),
        ("abcd", "xbyd", ["set: records 1 and 3 of 4 changed"]),
        ("abcd", "badc", ["set: the same 4 records in another order, from record 1 on"]),
        ("abcd", "abd", ["set: record 3 of then is not in now (4 records then 3)"]),
        ("abcd", "xyabcd", ["set: records 1 and 2 of now are not in then (4 records then 6)"]),
    ],
)  # fmt: skip
def test_changes_in_words(before, after, said):
    sentences = record_changes(hashes(before), hashes(after), "set", ("then", "now"), NOWHERE)
    assert [sentence for sentence in sentences if "no longer there" not in sentence] == said


def test_a_hash_is_of_all_that_a_record_says():
    examples = [
        Example([Message("user", "a"), Message("assistant", "b")]), Example([Message("user", "ab"), Message("assistant", "")]),
        Example([Message("user", "a"), Message("assistant", "b", weight=2.0)]), Example([Message("user", "a"), Message("assistant", "b")], weight=2.0),
        Example([Message("user", "a")], chosen="b", rejected="c"), Example([Message("user", "a")], chosen="c", rejected="b"),
        Example(text="a"), Example([Message("user", "a"), Message("assistant", "b")], desirable=True),
    ]  # fmt: skip
    found = [record_hash(example) for example in examples]
    assert len({*found}) == len(examples) and {*map(len, found)} == {HASH_BYTES}
    assert split_hashes(b"".join(found)) == found
    assert record_hash(Example([Message("user", "a"), Message("assistant", "b")])) == found[0]
