"""A hash of each record, by which records that changed are named when the file that they were read from is gone."""

import hashlib
from collections.abc import Sequence

from glmtuner.data.records import Example

HASH_BYTES = 8  # that two of a billion records have the same hash has a probability of 3 %


def record_hash(example: Example) -> bytes:
    """HASH_BYTES that differ for other content: the record as it was read, whatever the tokenizer and the template are."""
    text = repr(example).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def split_hashes(content: bytes) -> list[bytes]:
    """The hashes of the records, in their order."""
    return [content[start : start + HASH_BYTES] for start in range(0, len(content), HASH_BYTES)]


def changed_records(before: Sequence[bytes], after: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """The numbers, from 0, of the records before that are not among those after, and of those after that were not among them before.

    Both are empty where the records are the same in another order. A record that occurs more often than in the other list
    counts from there on.
    """

    def left_over(own: Sequence[bytes], other: Sequence[bytes]) -> list[int]:
        remaining: dict[bytes, int] = {}
        for each in other:
            remaining[each] = remaining.get(each, 0) + 1
        found = []
        for index, each in enumerate(own):
            if remaining.get(each, 0):
                remaining[each] -= 1
            else:
                found.append(index)
        return found

    return left_over(before, after), left_over(after, before)
