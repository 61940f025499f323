"""Byte-level BPE by tiktoken, for tokenizers of which it gives the same ids in a quarter of the time.

tiktoken merges any two neighbouring tokens whose concatenation is a token, lowest rank first; a Hugging Face BPE merges
only the pairs of its merge list, in the order of the list. The two agree if

- the merge list is ordered by the ids of the merged tokens, each of which is higher than the ids of its two parts, and
- every token is what its own text is encoded to: no tokens inside it are merged across the seam of its two parts before
  both parts are complete.

Then any two neighbours that can ever occur side by side and together spell a token are that token's two parts: other parts
would have been merged in the same way in the token's own text. `Engine.from_tokenizer_json` proves both conditions for a
vocabulary. As a check of the proof, `Engine.encode` compares the first texts of the data with the tokenizer's own ids.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any, Optional
from unicodedata import is_normalized
from weakref import WeakKeyDictionary, WeakSet

from glmtuner.console import say

if TYPE_CHECKING:
    from numpy import bool_, dtype, int64, ndarray
    from tiktoken import Encoding
    from transformers import PreTrainedTokenizerBase

    Ints = ndarray[tuple[int, ...], dtype[int64]]
    Bools = ndarray[tuple[int, ...], dtype[bool_]]

BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # the tests compare how the two libraries split every character
    BYTE_LEVEL,
    _WORDS + r"\p{N}{1,3}" + _MARKS,  # GLM-4, Llama 3
    _WORDS + r"\p{N}" + _MARKS,  # Qwen
}
MAX_CHARACTERS = 100_000  # tiktoken's regular expression engine fails on a text of a million spaces
COMPARED_TEXTS = 1000  # distinct texts on which an engine is compared with its tokenizer before it is trusted
# Joins texts; a text that contains it is encoded by the tokenizer. Its first and last characters differ: otherwise, after a
# text that ends with part of it, it would match too early.
SEPARATOR = "\0|\1"


def _byte_of_code_point() -> dict[int, int]:
    """The code points by which byte-level BPE writes bytes -> the bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: byte for byte in printable}, **{256 + index: byte for index, byte in enumerate(others)}}


BYTES = _byte_of_code_point()


@dataclass
class Engine:
    """Encodes texts by tiktoken; texts that tiktoken might encode differently go to the tokenizer itself.

    The first `COMPARED_TEXTS` distinct texts are encoded by both. If one differs, `rejected` is set and from then on the
    tokenizer encodes every text; no ids of tiktoken are returned before they, or enough of them, were compared.
    """

    encoding: "Encoding"
    separator: int  # the id of SEPARATOR
    normalizes: bool  # does the tokenizer apply NFC first?
    added_tokens: tuple[str, ...]  # tokens that are matched in any text
    rejected: bool = False
    lock: Lock = field(default_factory=Lock)  # held while the tokenizer encodes: it serves one thread at a time
    compared: set[str] | None = field(
        default_factory=set
    )  # texts; None once there were enough of them, or one differed

    @classmethod
    def from_tokenizer_json(cls, content: bytes) -> Optional["Engine"]:
        """The engine of the tokenizer whose tokenizer.json is given; None where equal ids cannot be proven."""
        description = json.loads(content)
        normalizer, pattern = description["normalizer"], _pattern_of(description["pre_tokenizer"])
        if pattern is None or (normalizer is not None and normalizer["type"] != "NFC"):
            return None
        ranks = _ranks_of(description["model"])
        if ranks is None:
            return None
        import tiktoken

        added_tokens = tuple(token["content"] for token in description["added_tokens"] if not token["special"])
        separator = max(ranks.values()) + 1
        encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: separator}
        )
        return cls(encoding, separator, normalizer is not None, added_tokens)

    def supports(self, text: str) -> bool:
        """Whether tiktoken encodes the text as the tokenizer does."""
        return (
            len(text) < MAX_CHARACTERS
            and SEPARATOR not in text
            and (not self.normalizes or is_normalized("NFC", text))
            and not any(token in text for token in self.added_tokens)
        )

    def encode(
        self, texts: Sequence[str], encode_by_tokenizer: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    ) -> "list[array[int]]":
        """An array of ids for each text, in which no control token is matched.

        `encode_by_tokenizer` is called for texts that the engine does not support, and to compare the first ones.
        """
        if self.compared is not None:
            with self.lock:  # threads wait here until enough texts were compared, so that none returns unchecked ids
                self._compare(texts, encode_by_tokenizer)
        remaining = list(texts) if self.rejected else [text for text in texts if not self.supports(text)]
        if not remaining:
            return self._encode_supported(texts)
        with self.lock:
            ids_of = {
                text: array("i", ids) for text, ids in zip(remaining, encode_by_tokenizer(remaining), strict=True)
            }
        encoded = iter(self._encode_supported([text for text in texts if text not in ids_of]))
        return [ids_of[text] if text in ids_of else next(encoded) for text in texts]

    def _compare(
        self, texts: Sequence[str], encode_by_tokenizer: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    ) -> None:
        """Compare the texts not seen before, up to `COMPARED_TEXTS` in all; reject the engine if one differs."""
        if self.compared is None:  # another thread has compared the last one meanwhile
            return
        new = [text for text in dict.fromkeys(texts) if text not in self.compared and self.supports(text)]
        new = new[: COMPARED_TEXTS - len(self.compared)]
        self.compared.update(new)
        by_tokenizer = encode_by_tokenizer(new) if new else []
        for text, mine, ids in zip(new, self._encode_supported(new), by_tokenizer, strict=True):
            if mine != array("i", ids):
                self.rejected = True
                say(
                    f"preprocessing: tiktoken and the tokenizer encode {text[:40]!r} differently, so the tokenizer encodes "
                    "all texts; data.tiktoken_engine=false does without tiktoken from the start"
                )
                break
        if self.rejected or len(self.compared) == COMPARED_TEXTS:
            self.compared = None

    def _encode_supported(self, texts: Sequence[str]) -> "list[array[int]]":
        """All texts in one call, which releases and acquires the GIL once instead of once a text."""
        import numpy

        if not texts:
            return []
        joined = SEPARATOR.join(texts)
        all_ids = self.encoding.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=())
        ends = [*numpy.flatnonzero(all_ids == self.separator).tolist(), len(all_ids)]
        ids = array("i", all_ids.astype(numpy.int32).tobytes())
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


_engines: "WeakKeyDictionary[PreTrainedTokenizerBase, Engine]" = WeakKeyDictionary()
_rejected: "WeakSet[PreTrainedTokenizerBase]" = WeakSet()  # their engines differed once; they get none again


def engine_of(tokenizer: "PreTrainedTokenizerBase") -> Engine | None:
    """The engine in use for the tokenizer."""
    return _engines.get(tokenizer)


def use_engine(tokenizer: "PreTrainedTokenizerBase", content: bytes) -> Engine | None:
    """Encode by the tokenizer's engine until `leave_engine`; returns the engine, None where the tokenizer has none.

    Reading and proving a vocabulary takes longer than encoding a small dataset. `content` is the tokenizer's tokenizer.json.
    """
    if tokenizer in _rejected or not encodes_by_backend(tokenizer):
        return None
    engine = Engine.from_tokenizer_json(content)
    if engine is not None:
        _engines[tokenizer] = engine
    return engine


def leave_engine(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Encode by the tokenizer itself again."""
    engine = _engines.pop(tokenizer, None)
    if engine is not None and engine.rejected:
        _rejected.add(tokenizer)


def encodes_by_backend(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's ids are those of its backend (tokenizers library), with nothing of its own in between.

    transformers has no public way to ask whether a tokenizer's class overrides how the backend is called.
    """
    from transformers import PreTrainedTokenizerFast

    return getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus


def _pattern_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern by which texts are split before BPE, if it is one that both libraries match alike."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return BYTE_LEVEL if last["use_regex"] else None
    splits = len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]
    if not splits or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    pattern = before[0]["pattern"].get("Regex")
    return pattern if pattern in SPLITS else None


def _ranks_of(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The bytes of each token -> its id, if merging by id is proven to do what the merge list does; else None."""
    import numpy

    unsupported = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in unsupported):
        return None
    id_of, merges = model["vocab"].__getitem__, model["merges"]
    merged_texts = list(map("".join, merges))
    try:
        id_of_byte = {bytes([byte]): id_of(chr(code_point)) for code_point, byte in BYTES.items()}
        columns = (*zip(*merges, strict=True), merged_texts)
        left, right, merged = (numpy.fromiter(map(id_of, column), numpy.int64, len(merges)) for column in columns)
    except (KeyError, ValueError):  # a byte without a token, or no merges
        return None
    table = numpy.zeros(max(BYTES) + 1, numpy.uint8)
    table[list(BYTES)] = list(BYTES.values())
    all_bytes = table[numpy.frombuffer("".join(merged_texts).encode("utf-32-le"), numpy.uint32)].tobytes()
    ends = list(accumulate(map(len, merged_texts), initial=0))
    id_of_merged = dict(zip((all_bytes[start:end] for start, end in pairwise(ends)), merged.tolist(), strict=True))
    if model.get("ignore_merges") and len(id_of_byte) + len(id_of_merged) < len(model["vocab"]):
        return None  # a token that no merge makes would still be matched as a whole piece
    byte_ids = list(id_of_byte.values())
    is_made = numpy.zeros(max(*byte_ids, *(column.max() for column in (left, right, merged))) + 1, dtype=bool)
    is_made[byte_ids] = is_made[merged] = True
    ordered = (merged[1:] >= merged[:-1]).all() and (numpy.maximum(left, right) < merged).all()
    if not ordered or merged[0] <= max(byte_ids) or not (is_made[left] & is_made[right]).all():
        return None
    return id_of_byte | id_of_merged if _encode_to_themselves(left, right, merged) else None


def _encode_to_themselves(left: "Ints", right: "Ints", merged: "Ints") -> bool:
    """Whether each token's own text is encoded to the token; merges are in the order of the tokens that they make.

    A token's text is that of its two parts, each of which is encoded to itself unless tokens at the seam are merged before.
    The tokens that ever stand at the seam are the left part's last and the right part's first ones, down to the bytes:
    going back in time, the newer of the two is split into its own parts.
    """
    import numpy

    parts = numpy.full((int(merged[-1]) + 1, 2), -1)  # of each token; -1 for bytes
    one_merge_per_token = (merged[1:] > merged[:-1]).all()
    if one_merge_per_token:  # all at once, since the first token that fails is detected either way
        parts[merged] = numpy.stack((left, right), axis=1)
        return not _merged_across_seam(left, right, merged, parts, _MergeTable(left, right, merged)).any()
    # of several merges of a token one succeeds; the seam of a longer token depends on the parts of shorter ones
    merge_table = _MergeTable(left, right, merged)
    length_of = [1] * len(parts)
    for first, second, token in zip(left.tolist(), right.tolist(), merged.tolist(), strict=True):
        length_of[token] = length_of[first] + length_of[second]
    lengths = numpy.array(length_of)[merged]
    order = numpy.argsort(lengths, kind="stable")
    for group in numpy.split(order, numpy.flatnonzero(numpy.diff(lengths[order])) + 1):
        good = group[~_merged_across_seam(left[group], right[group], merged[group], parts, merge_table)]
        parts[merged[good]] = numpy.stack((left[good], right[good]), axis=1)
    return bool((parts[merged, 0] >= 0).all())


class _MergeTable:
    """The token that each pair of tokens is merged to, looked up for many pairs at once."""

    def __init__(self, left: "Ints", right: "Ints", merged: "Ints") -> None:
        self.size = int(merged[-1]) + 1
        order = (left * self.size + right).argsort()
        self.keys, self.merged = (left * self.size + right)[order], merged[order]

    def __call__(self, left: "Ints", right: "Ints") -> "Ints":
        """The token of each pair, and an id above all others for a pair that is not merged."""
        keys = left * self.size + right
        index = self.keys.searchsorted(keys).clip(max=len(self.keys) - 1)
        tokens: Ints = self.merged[index]
        tokens[self.keys[index] != keys] = self.size
        return tokens


def _merged_across_seam(
    left: "Ints", right: "Ints", merged: "Ints", parts: "Ints", merge_table: _MergeTable
) -> "Bools":
    """For each merge, whether neighbours at the seam are merged before its two parts are complete."""
    import numpy

    crossed = numpy.zeros(len(merged), dtype=bool)
    open_merges, left_until, right_until = numpy.arange(len(merged)), merged, merged
    while len(open_merges):
        token = merge_table(left, right)
        # of equal tokens the leftmost is merged first
        crosses = (token < left_until) & (token <= right_until)
        crossed[open_merges[crosses]] = True
        left_made = numpy.where(parts[left, 0] < 0, -1, left)  # when each was merged itself; bytes always existed
        right_made = numpy.where(parts[right, 0] < 0, -1, right)
        left_is_newer = left_made > right_made
        left_until = numpy.where(left_is_newer, left, left_until)
        right_until = numpy.where(left_is_newer, right_until, right)
        left, right = (
            numpy.where(left_is_newer, parts[left, 1], left),
            numpy.where(left_is_newer, right, parts[right, 0]),
        )
        keep = ~crosses & ((left_made >= 0) | (right_made >= 0))
        open_merges, left, right = open_merges[keep], left[keep], right[keep]
        left_until, right_until = left_until[keep], right_until[keep]
    return crossed
