"""Byte-level BPE by tiktoken, for tokenizers of which it gives the same ids in a quarter of the time.

tiktoken joins two neighbours whenever their text together is a token, the token with the lowest number first; a Hugging
Face BPE joins the pairs of its list, the first of the list first. Both come to the same where

- a pair earlier in the list makes a token with a lower number, made of tokens with lower numbers, and
- every token comes out of its own text: no neighbours inside it are joined across its two parts before it is whole.

Then any two neighbours that can ever stand side by side and make a token together are its two parts: had other parts of it
stood there, the same joins would have been made in its text alone. `Engine.of` proves both of the vocabulary at hand.
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any
from unicodedata import is_normalized
from weakref import WeakKeyDictionary

BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tests compare the two libraries' pieces for every character there is
    BYTE_LEVEL,
    _WORDS + r"\p{N}{1,3}" + _MARKS,  # GLM-4, Llama 3
    _WORDS + r"\p{N}" + _MARKS,  # Qwen
}
LONGEST = 100_000  # characters; tiktoken's search for pieces fails in a million blanks
# Between texts; one in which it stands is encoded by its tokenizer. It does not end as it begins: behind a text that ends
# with a part of it, it would else be found too early.
SEPARATOR = "\0|\1"


def _characters_of_bytes() -> dict[int, int]:
    """The code points by which byte-level BPE writes bytes -> the bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: byte for byte in printable}, **{256 + place: byte for place, byte in enumerate(others)}}


BYTES = _characters_of_bytes()


@dataclass
class Engine:
    """Encodes texts, those that tiktoken might read otherwise by the tokenizer itself."""

    encoding: Any  # of tiktoken
    separator: int  # the number of what stands between texts
    composed: bool  # does the tokenizer compose characters (NFC) first?
    added: tuple[str, ...]  # tokens that are read in any text
    lock: Lock = field(default_factory=Lock)  # of the tokenizer itself, which encodes for one thread at a time

    @classmethod
    def of(cls, description: bytes) -> "Engine | None":
        """The engine of the tokenizer that tokenizer.json describes; None where equal ids are not proven."""
        told = json.loads(description)
        normalizer, pattern = told["normalizer"], _pattern_of(told["pre_tokenizer"])
        if pattern is None or (normalizer is not None and normalizer["type"] != "NFC"):
            return None
        ranks = _ranks_of(told["model"])
        if ranks is None:
            return None
        import tiktoken

        added = tuple(token["content"] for token in told["added_tokens"] if not token["special"])
        separator = max(ranks.values()) + 1
        encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: separator}
        )
        return cls(encoding, separator, normalizer is not None, added)

    def takes(self, text: str) -> bool:
        """Whether tiktoken reads the text as the tokenizer does."""
        return (
            len(text) < LONGEST
            and SEPARATOR not in text
            and (not self.composed or is_normalized("NFC", text))
            and not any(token in text for token in self.added)
        )

    def encode(self, texts: Sequence[str], otherwise: Any) -> list[array]:
        """Arrays of the ids of each text, in which no control token is read; `otherwise` encodes those that it cannot."""
        left = [text for text in texts if not self.takes(text)]
        if not left:
            return self._encoded(texts)
        with self.lock:
            found = {text: array("i", ids) for text, ids in zip(left, otherwise(left), strict=True)}
        taken = iter(self._encoded([text for text in texts if text not in found]))
        return [found[text] if text in found else next(taken) for text in texts]

    def _encoded(self, texts: Sequence[str]) -> list[array]:
        """All in one call: Python's lock is then given up and taken back once, and not for each text."""
        import numpy

        if not texts:
            return []
        text = SEPARATOR.join(texts)
        found = self.encoding.encode_to_numpy(text, allowed_special={SEPARATOR}, disallowed_special=())
        ends = [*numpy.flatnonzero(found == self.separator).tolist(), len(found)]
        ids = array("i", found.astype(numpy.int32).tobytes())
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


_engines: "WeakKeyDictionary[Any, Engine]" = WeakKeyDictionary()


def engine_of(tokenizer: Any) -> Engine | None:
    """The engine that is in use for the tokenizer."""
    return _engines.get(tokenizer)


def use_engine(tokenizer: Any, description: bytes) -> Engine | None:
    """Encode by the tokenizer's engine until `leave_engine`, if it has one: worth it where there is much to encode.

    `description` is what its backend writes to tokenizer.json.
    """
    engine = Engine.of(description) if encodes_by_backend(tokenizer) else None
    if engine is not None:
        _engines[tokenizer] = engine
    return engine


def leave_engine(tokenizer: Any) -> None:
    _engines.pop(tokenizer, None)


def encodes_by_backend(tokenizer: Any) -> bool:
    """Whether its ids are those of a backend of the tokenizers library, with no way of its own between."""
    from transformers import PreTrainedTokenizerFast

    return getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus


def _pattern_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of the pieces that are encoded by themselves, where it is one that both libraries read alike."""
    parts = [pre_tokenizer]
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    *before, last = parts
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return BYTE_LEVEL if last["use_regex"] else None
    splits = len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]
    if not splits or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    pattern = before[0]["pattern"].get("Regex")
    return pattern if pattern in SPLITS else None


def _ranks_of(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The tokens' bytes and numbers, where joining by number is what the list of pairs does."""
    import numpy

    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in unusual):
        return None
    id_of, pairs = model["vocab"].__getitem__, model["merges"]
    wholes = list(map("".join, pairs))
    try:
        single = {bytes([byte]): id_of(chr(character)) for character, byte in BYTES.items()}
        texts = (*zip(*pairs, strict=True), wholes)
        left, right, whole = (numpy.fromiter(map(id_of, column), numpy.int64, len(pairs)) for column in texts)
    except (KeyError, ValueError):  # bytes without a token, or no pairs
        return None
    table = numpy.zeros(max(BYTES) + 1, numpy.uint8)
    table[list(BYTES)] = list(BYTES.values())
    written = table[numpy.frombuffer("".join(wholes).encode("utf-32-le"), numpy.uint32)].tobytes()
    ends = list(accumulate(map(len, wholes), initial=0))
    many = dict(zip((written[start:end] for start, end in pairwise(ends)), whole.tolist(), strict=True))
    if model.get("ignore_merges") and len(single) + len(many) < len(model["vocab"]):
        return None  # a token that no pair makes would still be found as a whole piece
    bytes_ids = list(single.values())
    made = numpy.zeros(max(*bytes_ids, *(column.max() for column in (left, right, whole))) + 1, dtype=bool)
    made[bytes_ids] = made[whole] = True
    ordered = (whole[1:] >= whole[:-1]).all() and (numpy.maximum(left, right) < whole).all()
    if not ordered or whole[0] <= max(bytes_ids) or not (made[left] & made[right]).all():
        return None
    return single | many if _comes_out(left, right, whole) else None


def _comes_out(left: Any, right: Any, whole: Any) -> bool:
    """Whether each token comes out of its own text, of pairs in the order of the tokens that they make.

    The text of a token is that of its two parts, which come out by themselves unless tokens at their seam are joined
    before. Those that ever stand at the seam are the left part's last and the right part's first ones, down to the bytes:
    going back in time, the newer of the two falls into its own parts.
    """
    import numpy

    parts = numpy.full((int(whole[-1]) + 1, 2), -1)  # of each token; none of bytes
    one_a_token = (whole[1:] > whole[:-1]).all()
    if one_a_token:  # all at once, since the first that does not come out is found either way
        parts[whole] = numpy.stack((left, right), axis=1)
        return not _crossed(left, right, whole, parts, _Joins(left, right, whole)).any()
    # of several pairs a token one comes out; a longer token's seam is told by the parts of shorter ones
    joins = _Joins(left, right, whole)
    lengths = [1] * len(parts)
    for first, second, token in zip(left.tolist(), right.tolist(), whole.tolist(), strict=True):
        lengths[token] = lengths[first] + lengths[second]
    lengths = numpy.array(lengths)[whole]
    order = numpy.argsort(lengths, kind="stable")
    for group in numpy.split(order, numpy.flatnonzero(numpy.diff(lengths[order])) + 1):
        good = group[~_crossed(left[group], right[group], whole[group], parts, joins)]
        parts[whole[good]] = numpy.stack((left[good], right[good]), axis=1)
    return bool((parts[whole, 0] >= 0).all())


class _Joins:
    """The token that each pair makes, for many pairs at once."""

    def __init__(self, left: Any, right: Any, whole: Any) -> None:
        self.size = int(whole[-1]) + 1
        order = (left * self.size + right).argsort()
        self.pairs, self.made = (left * self.size + right)[order], whole[order]

    def __call__(self, left: Any, right: Any) -> Any:
        """Each pair's token, and a number above all tokens where they make none."""
        wanted = left * self.size + right
        place = self.pairs.searchsorted(wanted).clip(max=len(self.pairs) - 1)
        found = self.made[place]
        found[self.pairs[place] != wanted] = self.size
        return found


def _crossed(left: Any, right: Any, whole: Any, parts: Any, joins: _Joins) -> Any:
    """For each pair, whether neighbours at its seam are joined before both of its tokens are there."""
    import numpy

    crossed = numpy.zeros(len(whole), dtype=bool)
    going, left_until, right_until = numpy.arange(len(whole)), whole, whole
    while len(going):
        token = joins(left, right)
        # of joins with the same number the one further left comes first
        crosses = (token < left_until) & (token <= right_until)
        crossed[going[crosses]] = True
        left_born = numpy.where(parts[left, 0] < 0, -1, left)  # when each was joined itself; bytes were always there
        right_born = numpy.where(parts[right, 0] < 0, -1, right)
        back_left = left_born > right_born
        left_until, right_until = numpy.where(back_left, left, left_until), numpy.where(back_left, right_until, right)
        left, right = numpy.where(back_left, parts[left, 1], left), numpy.where(back_left, right, parts[right, 0])
        keep = ~crosses & ((left_born >= 0) | (right_born >= 0))
        going, left, right = going[keep], left[keep], right[keep]
        left_until, right_until = left_until[keep], right_until[keep]
    return crossed
