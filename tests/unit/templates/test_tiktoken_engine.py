"""An engine gives the ids of the tokenizer itself, or there is none."""

import random
import sys
import unicodedata
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from glmtuner.templates import tiktoken_engine as bpe
from glmtuner.templates.encoding import encode_text

TEXTS = [
    "保持健康的三个提示。\n\n1. 保持身体活动。每天做适当的身体运动，如散步、跑步或游泳。",
    "The quick brown fox doesn't jump over 12345 lazy dogs; she'd rather sleep, wouldn't she?",
    "def main(argv: list[str]) -> int:\n    return 0  # 完成\n\n\n",
    "机器学习是人工智能的一个分支，它使用数据和算法来模仿人类的学习方式。",
] * 8


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == bpe.BYTE_LEVEL:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def trained(pattern: str = bpe.BYTE_LEVEL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_by(pattern)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    controls = [AddedToken("<|user|>", special=True, normalized=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=controls, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def of_pairs(pairs: list[tuple[str, str]], order: Sequence[str] = (), **options: float) -> Tokenizer:
    """A tokenizer of the bytes and of what the pairs make, numbered in their order or in another."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(order or dict.fromkeys(map("".join, pairs)))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, pairs, **options))
    tokenizer.pre_tokenizer = split_by(bpe.BYTE_LEVEL)
    return tokenizer


def with_every_split(tokenizer: Tokenizer, **options: bool) -> Tokenizer:
    """The same tokens, each made by any two tokens that have its text: as transformers converts tiktoken's files."""
    vocabulary = {name: number for name, number in tokenizer.get_vocab().items() if name != "<|user|>"}
    pairs = [
        (name[:place], name[place:])
        for name in sorted(vocabulary, key=vocabulary.get)
        for place in range(1, len(name))
        if name[:place] in vocabulary and name[place:] in vocabulary
    ]
    other = Tokenizer(models.BPE(vocabulary, pairs, **options))
    other.pre_tokenizer = tokenizer.pre_tokenizer
    return other


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def odd_texts(count: int = 3000) -> list[str]:
    drawn = random.Random(0)
    pieces = [
        *"abcdefgh,.!?'\n\r\t 0189", "  ", "   ", "'s", "'LL", "保持", "学习", "的", "。", "é", "e\u0301", "ſ", "\u00a0",
        "\u3000", "\x85", "\u200b", "😀", "👩‍👩‍👧", "<|user|>", "<tool>", "\0", "|", "\1", bpe.SEPARATOR, "क्षि", "ﬁ", "①", "\U0001d7d8", "\ufeff",
    ]  # fmt: skip
    return ["", *("".join(drawn.choices(pieces, k=drawn.randrange(1, 40))) for _ in range(count)), *TEXTS]


def in_use(tokenizer: PreTrainedTokenizerFast) -> bpe.Engine | None:
    return bpe.use_engine(tokenizer, tokenizer.backend_tokenizer.to_str().encode())


def same(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> bool:
    """Whether the engine, which must exist and stay in use, gives the tokenizer's own ids."""
    expected = encode_text(tokenizer, texts)
    engine = in_use(tokenizer)
    assert engine is not None
    encoded = encode_text(tokenizer, texts)
    bpe.leave_engine(tokenizer)
    return not engine.rejected and [list(ids) for ids in encoded] == expected


def differing_engine(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, text: str) -> bpe.Engine:
    """The tokenizer's engine, in use, with other ids for one text."""
    engine = in_use(tokenizer)
    assert engine is not None
    encode = engine._encode_supported

    def encode_wrongly(texts: Sequence[str]) -> list[array]:
        return [array("i", [0]) if each == text else ids for each, ids in zip(texts, encode(texts), strict=True)]

    monkeypatch.setattr(engine, "_encode_supported", encode_wrongly)
    return engine


@pytest.mark.parametrize("pattern", sorted(bpe.SPLITS))
def test_an_engine_gives_the_tokenizers_ids(pattern: str) -> None:
    assert same(fast(trained(pattern)), odd_texts())


@pytest.mark.parametrize("ignores", [False, True])
def test_tokens_that_many_pairs_make(ignores: bool) -> None:
    assert same(fast(with_every_split(trained(), ignore_merges=ignores)), odd_texts())


def test_composed_characters_and_tokens_that_are_read_in_any_text() -> None:
    tokenizer = trained()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["<tool>"])
    wrapped = fast(tokenizer)
    engine = in_use(wrapped)
    bpe.leave_engine(wrapped)
    assert not engine.supports("e\u0301") and not engine.supports("a <tool>") and engine.supports("é <|user|>")
    assert same(wrapped, odd_texts())


def test_a_text_that_would_be_too_long_to_search() -> None:
    assert same(fast(trained()), [" " * 1_200_000, "a", "\n" * 99_999, "好" * 20_000])


@pytest.mark.parametrize("pattern", sorted(bpe.SPLITS))
def test_both_libraries_cut_every_character_alike(pattern: str) -> None:
    """With a token for any two bytes, a text's ids tell where it was cut; of the largest classes one in 20 is tried."""
    pairs = list(product(sorted(pre_tokenizers.ByteLevel.alphabet()), repeat=2))
    pairs.sort(key=lambda pair: [bpe.BYTES[ord(letter)] for letter in pair])
    tokenizer = of_pairs(pairs)
    tokenizer.pre_tokenizer = split_by(pattern)
    characters = [
        chr(point)
        for point in range(sys.maxunicode + 1)
        if not 0xD800 <= point < 0xE000
        and (unicodedata.category(chr(point)) not in ("Cn", "Co", "Lo") or not point % 20)
    ]
    assert same(fast(tokenizer), [f"a{it}b 1{it}2 {it} !{it}!\n{it}\n{it}{it} '{it}" for it in characters])


def test_an_engine_exists_exactly_where_every_token_is_what_its_text_is_encoded_to() -> None:
    drawn, engines = random.Random(1), 0
    for _ in range(400):
        names, pairs = ["a", "b", "c"], []
        for _ in range(drawn.randrange(2, 9)):
            pair = drawn.choice(names), drawn.choice(names)
            if "".join(pair) not in names:
                names.append("".join(pair))
                pairs.append(pair)
        tokenizer = fast(of_pairs(pairs))
        proven = all(len(tokenizer.encode(name)) == 1 for name in names)
        engine = in_use(tokenizer)
        bpe.leave_engine(tokenizer)
        assert (engine is not None) == proven, pairs
        if engine is not None:
            engines += 1
            assert same(tokenizer, ["".join(drawn.choices("abc", k=drawn.randrange(1, 30))) for _ in range(200)])
    assert 100 < engines < 390


def without_a_byte() -> Tokenizer:
    vocabulary = {name: number for number, name in enumerate([*"abcd", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = split_by(bpe.BYTE_LEVEL)
    return tokenizer


def changed(**parts: object) -> Tokenizer:
    tokenizer = trained()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


NUMBERED = [f"{number} 保持健康 the fox" for number in range(1500)]


@pytest.mark.parametrize("batch", [1, 60, 1500])
def test_an_engine_that_differs_on_the_700th_text_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    tokenizer = fast(trained())
    expected = encode_text(tokenizer, NUMBERED)
    engine = differing_engine(tokenizer, monkeypatch, NUMBERED[699])
    encoded = []
    for start in range(0, len(NUMBERED), batch):
        encoded += encode_text(tokenizer, NUMBERED[start : start + batch])
    assert engine.rejected and [list(ids) for ids in encoded] == expected
    assert {type(ids) for ids in encoded} == {array}  # the rows of a dataset are of one type
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and repr(NUMBERED[699]) in printed and "data.tiktoken_engine=false" in printed
    bpe.leave_engine(tokenizer)
    assert in_use(tokenizer) is None  # the next dataset of the run is the tokenizer's from its first text
    assert encode_text(tokenizer, NUMBERED) == expected


def test_threads_return_no_ids_before_enough_texts_were_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = fast(trained())
    texts = NUMBERED[:950]  # whichever thread comes first, all of them are compared
    expected = encode_text(tokenizer, texts)
    differing_engine(tokenizer, monkeypatch, NUMBERED[699])
    batches = [texts[start : start + 25] for start in range(0, len(texts), 25)]
    with ThreadPoolExecutor(8) as pool:
        encoded = [list(ids) for part in pool.map(lambda texts: encode_text(tokenizer, texts), batches) for ids in part]
    assert encoded == expected
    assert capsys.readouterr().out.count("\n") == 1


def test_a_thousand_distinct_texts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fast(trained())
    engine = in_use(tokenizer)
    by_tokenizer: list[str] = []

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        by_tokenizer.extend(texts)
        return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(texts))]

    for start in range(0, len(NUMBERED), 30):
        engine.encode([*NUMBERED[start : start + 30], *NUMBERED[:5]], encode)
    assert by_tokenizer == NUMBERED[: bpe.COMPARED_TEXTS] and bpe.COMPARED_TEXTS == 1000
    assert not engine.rejected


UNPROVEN = {
    "a token of other parts than its text is encoded to": lambda: of_pairs([("a", "b"), ("b", "c"), ("a", "bc")]),
    "another order of numbers": lambda: of_pairs([("a", "b"), ("b", "c")], order=("bc", "ab")),
    "dropout": lambda: of_pairs([("a", "b")], dropout=0.1),
    "bytes without a token": without_a_byte,
    "a blank before every text": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pieces": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "an unknown pattern": lambda: changed(pre_tokenizer=split_by(r"\s+|\S+")),
    "several patterns": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    ),
    "lower case": lambda: changed(normalizer=normalizers.Lowercase()),
    "word pieces": lambda: Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})),
}


@pytest.mark.parametrize("why", UNPROVEN)
def test_no_engine_where_equal_ids_are_not_proven(why: str) -> None:
    tokenizer = fast(UNPROVEN[why]())
    assert in_use(tokenizer) is None
    assert bpe.engine_of(tokenizer) is None
