"""Rendered text to token ids and offsets, with control tokens that somebody wrote as text encoded as text."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from glmtuner.templates.encoding import encode_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
_PLAIN: "WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer]" = WeakKeyDictionary()
ANCHORS = ("\n", "a")  # text that nothing behind it is merged with


def encode_rendered(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], marks: Sequence[Mapping[str, str]]
) -> list[tuple[list[int], Offsets]]:
    """The ids of each text and their offsets in it; a mark's control token is encoded as the text that it is."""
    if not texts:
        return []
    tokens = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        _replaced(tokenizer, text, list(ids), list(offsets), marked) if marked else (list(ids), list(offsets))
        for text, marked, ids, offsets in zip(texts, marks, tokens.input_ids, tokens.offset_mapping, strict=True)
    ]


def encode_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], marks: Sequence[Mapping[str, str]]
) -> list[list[int]]:
    """The ids of each text, as of `encode_rendered`; without the offsets it takes a third of the time."""
    plain = [text for text, marked in zip(texts, marks, strict=True) if not marked]
    others = [(text, marked) for text, marked in zip(texts, marks, strict=True) if marked]
    ids = iter(encode_text(tokenizer, plain, reads_controls=True))
    replaced = iter(encode_rendered(tokenizer, [text for text, _ in others], [marked for _, marked in others]))
    return [next(replaced)[0] if marked else list(next(ids)) for marked in marks]


def encode_continued(tokenizer: "PreTrainedTokenizerBase", text: str, marks: Mapping[str, str]) -> list[int]:
    """The ids of text that continues other text: without the space that some tokenizers put before a text's first word."""
    ((ids, _),) = encode_rendered(tokenizer, [text], [marks])
    if not begins_with_space(tokenizer):
        return ids
    for anchor in ANCHORS:
        (before, _), (whole, _) = encode_rendered(tokenizer, [anchor, anchor + text], [{}, marks])
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return ids


def begins_with_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a space before a text's first word, as sentencepiece does."""
    first = tokenizer("a", add_special_tokens=False).input_ids[0]
    return str(tokenizer.convert_ids_to_tokens(first)).startswith(("▁", "Ġ"))


def _replaced(
    tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int], offsets: Offsets, marks: Mapping[str, str]
) -> tuple[list[int], Offsets]:
    """Ids and offsets with each stretch of text between two control tokens encoded anew where marks are in it."""
    added = tokenizer.added_tokens_decoder
    has_mark = [any(mark in text[start:end] for mark in marks) for start, end in offsets]
    controls = [
        index for index, token in enumerate(ids) if token in added and not has_mark[index] and _spans(offsets[index])
    ]
    new_ids: list[int] = []
    new_offsets: Offsets = []
    first, left = 0, 0
    for index in [*controls, len(ids)]:
        right = offsets[index][0] if index < len(ids) else len(text)
        stretch = text[left:right]
        if any(mark in stretch for mark in marks):
            part_ids, part_offsets = _as_text(tokenizer, stretch, marks, begins=left == 0)
            new_ids += part_ids
            new_offsets += [(start + left, end + left) for start, end in part_offsets]
        else:
            new_ids += ids[first:index]
            new_offsets += offsets[first:index]
        if index < len(ids):
            new_ids.append(ids[index])
            new_offsets.append(offsets[index])
            first, left = index + 1, offsets[index][1]
    return new_ids, new_offsets


def _spans(offset: tuple[int, int]) -> bool:
    return offset[0] < offset[1]


def _as_text(
    tokenizer: "PreTrainedTokenizerBase", text: str, marks: Mapping[str, str], *, begins: bool
) -> tuple[list[int], Offsets]:
    """Ids of text without control tokens, and their offsets in the text with its marks."""
    written, places = "", []  # the text with the control tokens written out, and each character's place in `text`
    for place, character in enumerate(text):
        literal = marks.get(character, character)
        written += literal
        places += [place] * len(literal)
    places.append(len(text))
    plain = plain_backend(tokenizer)
    encoding = plain.encode(written, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    if not begins and begins_with_space(tokenizer):
        for anchor in ANCHORS:
            before = plain.encode(anchor, add_special_tokens=False).ids
            longer = plain.encode(anchor + written, add_special_tokens=False)
            if longer.ids[: len(before)] == before:
                ids = longer.ids[len(before) :]
                offsets = [(start - len(anchor), end - len(anchor)) for start, end in longer.offsets[len(before) :]]
                break
    spans = [
        (places[max(start, 0)], places[end - 1] + 1 if end > max(start, 0) else places[max(end, 0)])
        for start, end in offsets
    ]
    return list(ids), spans


def plain_backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """The tokenizer's backend without its added tokens: nothing that it encodes becomes one of them."""
    from tokenizers import Tokenizer

    if tokenizer not in _PLAIN:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        _PLAIN[tokenizer] = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    return _PLAIN[tokenizer]
