"""Tokenizers: the ids of the published ones to the last one, and nothing that a user writes as a control token."""

import base64
import json
import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from transformers import AutoTokenizer
from transformers.tokenization_python import PythonBackend

import glmtuner.models  # noqa: F401, makes chatglm known
from glmtuner.models.tokenization_chatglm import GLM4_SPECIAL, GLM4_SPLIT, ChatGLM4Tokenizer, ChatGLMTokenizer, as_fast

MODELS = {"v1": ("tokenizer_v1", "ice_text.model", "chatglm_v1"),
          "v2": ("chatglm2_realvocab", "tokenizer.model", "chatglm2"),
          "v3": ("tokenizer_v3", "tokenizer.model", "chatglm2")}  # fmt: skip
AUTO_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
every = pytest.mark.parametrize("version", MODELS)


@pytest.fixture(scope="module")
def folders(upstream_files: Path, golden_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a version as its hub repository has it, with the published tokenizer or a stand-in."""
    found = {}
    for version, (source, file, config) in MODELS.items():
        folder = found[version] = tmp_path_factory.mktemp(version)
        holder = source if (upstream_files / source / file).is_file() else "chatglm2_realvocab"
        shutil.copyfile(upstream_files / holder / file, folder / file)
        shutil.copyfile(golden_folder / config / "config.json", folder / "config.json")
        settings = json.loads((upstream_files / source / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": AUTO_MAP}))
    return found


@pytest.fixture(scope="module")
def loaded(folders):
    return {version: AutoTokenizer.from_pretrained(folder) for version, folder in folders.items()}


@pytest.fixture(scope="module")
def values(golden_folder: Path):
    """What the published code made of each version's texts; only `text` and `prompt` hold for a stand-in."""
    return {
        version: json.loads((golden_folder / f"tokenizers/{version}.json").read_text(encoding="utf-8"))
        for version in MODELS
    }


@pytest.fixture
def published(published_file, version) -> None:
    """The version's tokenizer is the published one; the test is skipped without it."""
    published_file(MODELS[version][1])


@every
def test_ids_and_tokens_of_every_text(published, loaded, values, version):
    tokenizer, texts = loaded[version], values[version]["texts"]
    assert type(tokenizer) is ChatGLMTokenizer
    assert len(texts) == 44
    for case in texts:
        text = case["text"]
        assert tokenizer(text, add_special_tokens=False).input_ids == case["ids"], text
        assert tokenizer(text).input_ids == case["ids_special"], text
        assert tokenizer.tokenize(text) == case["tokens"], text
        assert tokenizer.convert_tokens_to_ids(case["tokens"]) == case["ids"], text
        assert tokenizer([text], add_special_tokens=False, split_special_tokens=True).input_ids == [case["sp_ids"]], (
            text
        )
    together = [case["text"] for case in texts]
    assert tokenizer(together).input_ids == [case["ids_special"] for case in texts]


@every
def test_decoding(published, loaded, values, version):
    """As published, with what differs between them said: ChatGLM-6B's tokenizer also removed spaces before punctuation."""
    tokenizer = loaded[version]
    clean = {"clean_up_tokenization_spaces": version == "v1"}
    for case in values[version]["texts"]:
        assert tokenizer.decode(case["ids"], **clean) == case["decode_ids"], case["text"]
        shown = tokenizer.decode(case["ids_special"], **clean)
        hidden = tokenizer.decode(case["ids_special"], skip_special_tokens=True, **clean)
        if version != "v2":  # its code left control tokens out in either case
            assert shown == case["decode_special_noskip"], case["text"]
        if version != "v3":  # its code kept them in either case
            assert hidden == case["decode_special_skip"], case["text"]


@every
def test_pairs_batches_and_vocabulary(published, loaded, values, version):
    tokenizer, values = loaded[version], values[version]
    for case in values["build_inputs"]:
        assert tokenizer.build_inputs_with_special_tokens(case["a"], case["b"]) == case["out"]
    for case in values["sft_pairs"]:
        assert tokenizer(case["prompt"], case["answer"]).input_ids == case["input_ids"]
        assert tokenizer(case["prompt"], add_special_tokens=False).input_ids == case["source_ids"]
    batch = values["padded_batch"]
    padded = tokenizer(batch["texts"], padding=True, return_tensors="pt")
    assert padded.input_ids.tolist() == batch["input_ids"]
    if version == "v1":  # a mask of four dimensions, True = blocked: its last row tells the padding
        assert padded.attention_mask.tolist() == [
            [1 - int(cell) for cell in mask[0][-1]] for mask in batch["attention_mask"]
        ]
    else:
        assert padded.attention_mask.tolist() == batch["attention_mask"]
    for token, token_id in values["token_ids"].items():
        if token_id or token == "<unk>":  # v2 has no roles; one tokenizer serves v2 and v3
            assert tokenizer.convert_tokens_to_ids(token) == token_id
    props = values["props"]
    assert len(tokenizer) == tokenizer.vocab_size == (props["len"] if version != "v2" else 64798)
    for name in ("padding_side", "pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token", "bos_token_id"):
        assert getattr(tokenizer, name) == props[name], name


def test_prompts_of_the_published_chats(loaded, values):
    for case in values["v2"]["build_prompt"]:
        assert loaded["v2"].build_prompt(case["query"], case["history"]) == case["out"]
    first = loaded["v1"]
    assert first.build_prompt("q") == "q"
    assert first.build_prompt("q", [("a", "b")]) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：q\n答："


@pytest.mark.parametrize("version", ["v3"])
def test_ids_of_the_published_chats(published, folders, loaded, values, version):
    tokenizer, values = loaded[version], values[version]
    for case in values["build_single_message"]:
        assert tokenizer.build_single_message(case["role"], case["metadata"], case["message"]) == case["out"]
    for case in values["build_chat_input"]:
        found = tokenizer.build_chat_input(case["query"], case["history"], case["role"])
        assert found.input_ids.tolist() == case["input_ids"]
        assert tokenizer.decode(found.input_ids[0]) == case["decoded"]
    parses = AutoTokenizer.from_pretrained(folders[version], encode_special_tokens=True)
    for case in values["encode_special_tokens_true"]:
        assert parses(case["text"], add_special_tokens=False).input_ids == case["ids"]


@every
def test_control_tokens_stand_at_the_published_ids(loaded, values, version):
    """Of a stand-in as well."""
    for token, token_id in values[version]["token_ids"].items():
        if token_id or token == "<unk>":  # v2 has no roles; one tokenizer serves v2 and v3
            assert loaded[version].convert_tokens_to_ids(token) == token_id, token
    assert len(loaded[version]) == (values[version]["props"]["len"] if version != "v2" else 64798)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_text_of_the_records_is_sentencepiece_s_own(folders, loaded, values, record_texts, version):
    texts = record_texts + [case["text"] for case in values[version]["texts"]]
    assert len(texts) > 400
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folders[version] / MODELS[version][1]))

    def laid_out(text: str) -> str:
        if version == "v1":  # the published preprocessing: line breaks, tabs, runs of spaces from the longest down
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            for count in range(80, 1, -1):
                text = text.replace(" " * count, f"<|blank_{count}|>")
        return text

    wanted = [plain.encode(laid_out(text)) for text in texts]
    assert loaded[version](texts, add_special_tokens=False, split_special_tokens=True).input_ids == wanted


@every
def test_text_never_becomes_a_control_token(loaded, version):
    tokenizer = loaded[version]
    pieces = range(tokenizer.sp.get_piece_size())
    assert {token for token in pieces if tokenizer.sp.is_control(token)} <= tokenizer.control_names.keys()
    assert len(tokenizer.control) == 12
    wide = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})  # NFKC makes them ASCII again
    texts = [
        form.format(written)
        for token in tokenizer.control
        for written in (token, token.translate(wide), f"{token[:2]}\u200b{token[2:]}", f"{token[:2]}\0{token[2:]}")
        for form in ("{}", "a {} b", "a{}b", "\n{}\n", "{0}{0}", "▁{}")
    ]
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts += ["".join(characters[start : start + 64]) for start in range(0, len(characters), 64)]
    for text, ids in zip(
        texts, tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids, strict=True
    ):
        assert not set(ids) & set(tokenizer.control_names), text
    parsed = tokenizer("x [MASK] y", add_special_tokens=False).input_ids
    assert (130000 in parsed) is (version == "v1")


@every
def test_odd_text(loaded, version):
    tokenizer = loaded[version]
    empty, half, null = tokenizer(["", "a\ud800b", "a\x00b"], add_special_tokens=False).input_ids
    assert empty == []
    assert half == tokenizer("a?b", add_special_tokens=False).input_ids
    assert tokenizer("\ud83d\ude00").input_ids == tokenizer("😀").input_ids
    assert null
    assert tokenizer([]).input_ids == []
    beyond = {"v1": 130527, "v2": 65023, "v3": 65023}[version]  # the models have rows that no token has
    assert tokenizer.decode([*half, beyond], skip_special_tokens=True) == tokenizer.decode(half)
    long = "<|blank_99999999999|>"  # an answer that says so does not become that many spaces
    assert tokenizer.decode(tokenizer(long, add_special_tokens=False).input_ids) == long
    assert tokenizer("\n" * 300_000, add_special_tokens=False).input_ids  # takes minutes where time is quadratic


@every
def test_every_option_is_transformers_own(folders, loaded, version):
    """The batches of ours give what transformers' own loop gives, whatever is asked for."""

    class RowByRow(ChatGLMTokenizer):
        _encode_plus = PythonBackend._encode_plus

    own, texts = RowByRow.from_pretrained(folders[version]), ["a b c d e f g h", "", "你好 [MASK]  x\n"]
    inputs = [(texts,), (texts, texts[::-1]), ([(text, "b c") for text in texts],), (texts[0],), (texts[0], texts[2]),
              ([[5, 6, 7], [8]],), ([["a", "b"], ["c", "d"]],), ([["a"], ["b"]],), ([("a", "b"), "c"],)]  # fmt: skip
    padded = {"padding": True, "return_tensors": "pt"}
    cut = {"truncation": True, "max_length": 6}
    for options in (
        {}, padded, cut, {**padded, **cut}, {**padded, "padding_side": "right", "pad_to_multiple_of": 8},
        {"return_token_type_ids": True}, {"return_special_tokens_mask": True, **cut}, {"return_attention_mask": False},
        {"truncation": "only_first", "max_length": 9, "padding": "max_length"}, {"split_special_tokens": True},
        {"return_length": True}, {"return_overflowing_tokens": True, "stride": 1, "truncation": "only_first", "max_length": 5},
        {"is_split_into_words": True}, {"return_offsets_mapping": True},
    ):  # fmt: skip
        for given in inputs:
            for added in (True, False):
                found, wanted = (
                    _outcome(each, given, {**options, "add_special_tokens": added}) for each in (loaded[version], own)
                )
                assert found == wanted, (given, options)
    for pairs in (["b"], ["b", "c", "d", "e"], "b"):
        with pytest.raises(ValueError):
            loaded[version](texts, pairs)


def _outcome(tokenizer: ChatGLMTokenizer, given: tuple, options: dict[str, Any]) -> Any:
    try:
        encoding = tokenizer(*given, **options)
    except (ValueError, AssertionError) as error:
        return type(error)
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in encoding.items()}


def test_chats_that_transformers_sanitizes(folders):
    """A control token that a user wrote is text in transformers' own chats too, and its marks are not seen."""
    tokenizer = AutoTokenizer.from_pretrained(folders["v1"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}<eop>"
    turns = [{"role": "user", "content": "a [MASK] b"}]
    found = tokenizer.apply_chat_template(turns, sanitize_control_tokens=True).input_ids
    plain = tokenizer("a [MASK] b", add_special_tokens=False, split_special_tokens=True).input_ids
    assert sorted(set(found) & set(tokenizer.control_names)) == [130005]
    shown = tokenizer.decode(found, skip_special_tokens=True)
    assert shown.replace(" ", "") == tokenizer.decode(plain).replace(" ", "")  # it loses the space between its pieces


@every
def test_calls_as_transformers_users_make_them(loaded, version):
    tokenizer = loaded[version]
    one, batch = tokenizer("你好 世界"), tokenizer(["你好 世界", "a"])
    assert one.input_ids == batch.input_ids[0]
    assert one.attention_mask == [1] * len(one.input_ids)
    assert tokenizer("你好 世界", return_tensors="pt").input_ids.tolist() == [one.input_ids]
    assert tokenizer(["a b", "c"], ["d", "e"]).input_ids == [
        tokenizer("a b", "d").input_ids,
        tokenizer("c", "e").input_ids,
    ]
    assert tokenizer([("a b", "d"), ("c", "e")]).input_ids == tokenizer(["a b", "c"], ["d", "e"]).input_ids
    cut = tokenizer(["a b c d e f g", "h"], truncation=True, max_length=5, padding="max_length", return_tensors="pt")
    assert cut.input_ids.shape == (2, 5)
    assert set(tokenizer.build_inputs_with_special_tokens([])) <= set(cut.input_ids[0].tolist())
    assert cut.attention_mask[1, 0] == 0
    right = tokenizer(["a b c d", "h"], padding=True, padding_side="right", return_tensors="pt")
    assert right.attention_mask[1, -1] == 0
    mask = tokenizer("a", return_special_tokens_mask=True).special_tokens_mask
    assert sum(mask) == 2
    assert tokenizer.encode("你好") == tokenizer("你好").input_ids
    assert tokenizer("a", add_special_tokens=False, return_attention_mask=False).keys() == {"input_ids"}
    assert tokenizer.batch_decode([tokenizer("你好").input_ids], skip_special_tokens=True) == ["你好"]


@every
def test_the_vocabulary_cannot_grow_silently(loaded, version):
    with pytest.raises(ValueError, match=r"'<new>' .* ChatGLM tokenizer"):
        loaded[version].add_tokens(["<new>"])
    assert loaded[version].add_special_tokens({"pad_token": "<unk>"}) == 0
    loaded[version].pad_token = {"v1": "<pad>"}.get(version, "<unk>")


@every
def test_saved_and_pickled(folders, loaded, values, tmp_path, version):
    tokenizer, folder = loaded[version], folders[version]
    texts = [case["text"] for case in values[version]["texts"]]
    tokenizer.save_pretrained(tmp_path)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    for again in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(again) is ChatGLMTokenizer
        assert again(texts, padding=True).input_ids == tokenizer(texts, padding=True).input_ids
        assert again.special_tokens_map == tokenizer.special_tokens_map
    assert len(pickle.dumps(tokenizer)) < 1_000_000  # not the whole file


def test_settings_are_kept(folders, loaded, values, tmp_path):
    """Of later revisions of the published settings, which list some control tokens, and of a user."""
    folder = folders["v3"]
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    names = {"64790": "[gMASK]", "64792": "sop", "64795": "<|user|>", "64797": "<|observation|>"}
    settings = {
        "added_tokens_decoder": {token_id: {"content": name, **token} for token_id, name in names.items()},
        "additional_special_tokens": ["<|user|>", "<|observation|>"], "tokenizer_class": "ChatGLMTokenizer",
        "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>", "padding_side": "left", "use_fast": False,
    }  # fmt: skip
    shutil.copytree(folder, tmp_path / "later")
    (tmp_path / "later/tokenizer_config.json").write_text(json.dumps(settings))
    later = AutoTokenizer.from_pretrained(tmp_path / "later")
    texts = [case["text"] for case in values["v3"]["texts"]]
    assert later(texts).input_ids == loaded["v3"](texts).input_ids
    assert len(later) == 64798
    mine = ChatGLMTokenizer.from_pretrained(
        folder, encode_special_tokens=True, padding_side="right", model_max_length=77
    )
    mine.save_pretrained(tmp_path / "mine")
    again = ChatGLMTokenizer.from_pretrained(pretrained_model_name_or_path=tmp_path / "mine")
    assert (again.padding_side, again.model_max_length) == ("right", 77)
    text = values["v3"]["encode_special_tokens_true"][0]["text"]
    assert again(text).input_ids == mine(text).input_ids != loaded["v3"](text).input_ids
    assert 64795 in again("<|user|>").input_ids


def test_the_fast_version_gives_the_same_ids(loaded, values, record_texts, tmp_path):
    as_fast(loaded["v2"]).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)  # as a tool without glmtuner would
    assert fast.is_fast and fast.padding_side == "left" and fast.pad_token_id == 0 and fast.eos_token_id == 2
    texts = [case["text"] for case in values["v2"]["texts"]] + record_texts
    wanted = loaded["v2"](texts, add_special_tokens=False, split_special_tokens=True).input_ids
    controls = [token for token in fast.get_added_vocab() if token != "<unk>"]
    assert len(controls) == 10
    for text, ids, slow in zip(texts, fast(texts, add_special_tokens=False).input_ids, wanted, strict=True):
        if not any(token in text for token in controls):
            assert ids == slow, text
    assert fast(texts, add_special_tokens=False, split_special_tokens=True).input_ids == wanted
    for case in values["v2"]["sft_pairs"]:
        if case["answer"]:  # an empty one is no pair to `tokenizers`
            pair = (case["prompt"], case["answer"])
            assert fast(*pair).input_ids == loaded["v2"](*pair).input_ids
    for text, ids in zip(texts, wanted, strict=True):
        assert fast.decode(ids) == loaded["v2"].decode(ids), text
    with pytest.raises(ValueError, match="no fast version"):
        as_fast(loaded["v1"])


# -- GLM-4: a file of byte pairs -----------------------------------------------------------------------------------------


def learn_pairs(text: str, count: int) -> dict[bytes, int]:
    """Byte pairs in the order of their frequency, learned the plain way."""
    words = Counter(word.encode() for word in regex.findall(GLM4_SPLIT, text))
    split = {word: [bytes([byte]) for byte in word] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for rank in range(256, 256 + count):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            for pair in pairwise(split[word]):
                pairs[pair] += times
        left, right = pairs.most_common(1)[0][0]
        ranks[left + right] = rank
        split = {word: merged(parts, left, right) for word, parts in split.items()}
    return ranks


def merged(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(parts):
        joins = parts[place : place + 2] == [left, right]
        found.append(left + right if joins else parts[place])
        place += 2 if joins else 1
    return found


def by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Ids by the definition: in each word the pair whose merged bytes have the lowest rank is merged first."""
    ids = []
    for word in regex.findall(GLM4_SPLIT, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [(ranks.get(left + right, 1 << 30), place) for place, (left, right) in enumerate(pairwise(parts))]
            rank, place = min(pairs)
            if rank == 1 << 30:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_glm4_s_byte_pairs(record_texts, golden_folder, tmp_path):
    text = json.dumps(record_texts[:600], ensure_ascii=False, indent=1)
    ranks = learn_pairs(text[:10_000], 200)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    shutil.copyfile(golden_folder / "chatglm2/config.json", tmp_path / "config.json")
    settings = {
        "tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}, "do_lower_case": False,
        "additional_special_tokens": list(GLM4_SPECIAL),
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [text[start : start + 90] for start in range(0, 20_000, 90)] + [
        "",
        "a  b\n\n c",
        "1234567",
        "I'm I'M",
        " \t\r\n ",
    ]
    wanted = [by_ranks(one, ranks) for one in texts]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is ChatGLM4Tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copyfile(tmp_path / "config.json", tmp_path / "saved/config.json")
    for one in (
        tokenizer,
        ChatGLMTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert one(texts, add_special_tokens=False).input_ids == wanted
        special = {token: len(ranks) + place for place, token in enumerate(GLM4_SPECIAL)}
        assert {token: one.convert_tokens_to_ids(token) for token in GLM4_SPECIAL} == special
        assert one("a").input_ids == [special["[gMASK]"], special["<sop>"], ord("a")]
        plain = one(list(GLM4_SPECIAL), add_special_tokens=False, split_special_tokens=True).input_ids
        assert all(max(ids) < len(ranks) for ids in plain)
        assert one(["ab cd", "a"], padding=True).attention_mask[1][0] == 0
        assert one.decode(one(texts[0]).input_ids, skip_special_tokens=True) == texts[0]
