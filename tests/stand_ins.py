"""Stand-ins of the published files that are no part of this repository: tokenizers with the published layout, and a checkpoint.

The tokenizers are sentencepiece models trained on a few lines, whose pieces stand at the published ids: as many ids, the
same control tokens, bytes and words for layout, the same kind of model and the same normalization. What they lack is the
published vocabulary, in whose place are characters of Unicode's private planes.
"""

import io
import json
import lzma
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load, save_file
from sentencepiece import sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, OF_USER, BYTE = 1, 2, 3, 4, 6
PRIVATE = 0xF0000
SIZES = {"ice_text.model": 130344, "tokenizer.model": 64789}
FIRST_SPACE = 30910  # "▁" in tokenizer.model: the pairs stand before it, single characters from it on
CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")  # of ice_text.model
LAYOUT = ("<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81)))
SETTINGS = {
    "tokenizer_v1": {
        "name_or_path": "THUDM/chatglm-6b", "bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>",
        "gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>",
    },
    "chatglm2_realvocab": {"name_or_path": "THUDM/chatglm2-6b"},
    "tokenizer_v3": {"name_or_path": "THUDM/chatglm3-6b"},
}  # fmt: skip
COMMON = {"remove_space": False, "do_lower_case": False, "tokenizer_class": "ChatGLMTokenizer"}


def write_upstream(folder: Path, golden: Path) -> Path:
    """Folders of files as the hub has them, by the names that they have in `../shared/goldens`; returns `folder`."""
    for name, settings in SETTINGS.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "tokenizer_config.json", {**settings, **COMMON})
    (folder / "tokenizer_v1/ice_text.model").write_bytes(ice_text_model())
    (folder / "chatglm2_realvocab/tokenizer.model").write_bytes(tokenizer_model())
    write_checkpoint_of_parity(folder / "chatglm2_realvocab", golden)
    for name in ("chatglm_v1", "chatglm2"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes((golden / name / "config.json").read_bytes())
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# -- tokenizers ----------------------------------------------------------------------------------------------------------


def sample_texts() -> list[str]:
    """Every text of the sample data that ships."""
    found = []
    for path in sorted((files("glmtuner.assets") / "data").iterdir(), key=lambda path: path.name):
        if path.name.endswith("_sample.json"):
            found += texts_in(json.loads(path.read_text(encoding="utf-8")))
    return found


def texts_in(value: Any) -> list[str]:
    """Every text anywhere in a record."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in texts_in(part)]


def trained(**options: Any) -> Any:
    """What sentencepiece trains on the sample data, as a message whose pieces can be moved."""
    lines = [line for text in sample_texts() for line in text.splitlines() if line.strip()]
    lines += [chr(code) * 3 for code in range(0x21, 0x7F)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, byte_fallback=True, split_digits=True, character_coverage=0.998,
        num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(file.getvalue())
    return message


def with_pieces(message: Any, pieces: dict[int, tuple[str, float, int]], size: int, score: float | None) -> bytes:
    """The model with these pieces at these ids, and private characters at the others; None: their score is their place."""
    del message.pieces[:]
    for place in range(size):
        filler = (chr(PRIVATE + place), score if score is not None else float(259 - place), NORMAL)
        piece, value, kind = pieces.get(place, filler)
        message.pieces.add(piece=piece, score=value, type=kind)
    message.trainer_spec.vocab_size = size
    return message.SerializeToString()


def ice_text_model() -> bytes:
    """In the layout of ChatGLM-6B: likelihoods of pieces, control tokens from 130000 on, bytes at the end."""
    message = trained(
        model_type="unigram",
        vocab_size=2600,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<n>"],
        pad_id=3,
    )
    found = [(piece.piece, piece.score, piece.type) for piece in message.pieces]
    words = [piece for piece in found if piece[2] == NORMAL]
    pieces = dict(enumerate([*found[:4], ("<n>", 0.0, OF_USER), *words]))
    pieces |= {130000 + place: (token, 0.0, CONTROL) for place, token in enumerate(CONTROLS)}
    pieces |= {130008 + place: (word, 0.0, OF_USER) for place, word in enumerate(LAYOUT)}
    pieces |= {130088 + byte: (f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)}
    return with_pieces(message, pieces, SIZES["ice_text.model"], -30.0)


def tokenizer_model() -> bytes:
    """In the layout of ChatGLM2 and ChatGLM3: bytes, byte pairs from 259 on, single characters from 30910 on."""
    message = trained(
        model_type="bpe", vocab_size=2600, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    found = [(piece.piece, piece.score, piece.type) for piece in message.pieces]
    pieces = dict(enumerate(found[:259]))
    assert [pieces[0][2], pieces[3][0], pieces[258][0]] == [UNKNOWN, "<0x00>", "<0xFF>"]
    pairs, characters = ([piece[0] for piece in found[259:] if (len(piece[0]) > 1) is long] for long in (True, False))
    characters.sort(key=lambda character: character != "▁")
    for start, group in ((259, pairs), (FIRST_SPACE, characters)):
        pieces |= {start + place: (piece, -float(start + place - 259), NORMAL) for place, piece in enumerate(group)}
    return with_pieces(message, pieces, SIZES["tokenizer.model"], None)


# -- twenty steps of ChatGLM-Efficient-Tuning -----------------------------------------------------------------------------


def write_checkpoint_of_parity(folder: Path, golden: Path) -> None:
    """The checkpoint that it trained; embeddings of tokens that no row has are not part of the values, and are random."""
    weights = load(lzma.decompress((golden / "parity_v2/weights.safetensors.xz").read_bytes()))
    ids, rows = (weights.pop(f"embedding/{name}") for name in ("ids", "rows"))
    size = weights["transformer.output_layer.weight"].shape
    embeddings = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.4).half()
    embeddings[ids.long()] = rows
    weights["transformer.embedding.word_embeddings.weight"] = embeddings
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((golden / "parity_v2/config.json").read_bytes())


def write_parity(folder: Path, golden: Path) -> Path:
    """In `folder` the checkpoint, a tokenizer, and records that become the rows which it trained on; returns the records.

    The tokenizer knows the pieces of the prompt's fixed words at their published ids. Each other id of the rows is a
    private character, so that the records are the rows, spelled in these.
    """
    content = json.loads((golden / "parity_v2/rows.json").read_text(encoding="utf-8"))
    prompts, answers = [], []
    for ids, labels in zip(content["input_ids"], content["labels"], strict=True):
        prompts.append([token for token, label in zip(ids, labels, strict=True) if label == -100])
        answers.append([label for label in labels if label != -100])
    words = {
        790: "▁[",
        30951: "R",
        517: "ound",
        30910: "▁",
        30939: "1",
        30996: "]",
        54761: "问",
        31211: "：",
        55437: "答",
    }
    before, after = [64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211], [13, 13, 55437, 31211]
    assert all((ids[:12], ids[-4:]) == (before, after) for ids in prompts)
    starts = {ids[0] for ids in answers} - {30910}  # an answer's first piece begins with the space before it
    used = {token for ids in (*prompts, *answers) for token in ids if 258 < token < SIZES["tokenizer.model"]}
    spelled = {
        token: f"▁{chr(PRIVATE + token)}" if token in starts else chr(PRIVATE + token) for token in used
    } | words  # fmt: skip

    def text(ids: list[int]) -> str:
        return "".join("\n" if token == 13 else spelled[token] for token in ids).replace("▁", " ")

    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(tokenizer_model())
    message.trainer_spec.model_type = message.trainer_spec.UNIGRAM
    pieces = {place: (it.piece, it.score, it.type) for place, it in enumerate(message.pieces) if place < 259}
    pieces |= {token: (piece, -1.0, NORMAL) for token, piece in spelled.items()}
    rest = iter(range(PRIVATE + SIZES["tokenizer.model"], PRIVATE + 2 * SIZES["tokenizer.model"]))
    pieces |= {
        place: (chr(next(rest)), -1.0, NORMAL) for place in range(259, SIZES["tokenizer.model"]) if place not in pieces
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(with_pieces(message, pieces, SIZES["tokenizer.model"], None))
    write_json(folder / "tokenizer_config.json", {**SETTINGS["chatglm2_realvocab"], **COMMON})
    write_checkpoint_of_parity(folder, golden)
    records = [
        {"instruction": text(prompt[len(before) : -len(after)]), "input": "", "output": text(answer[:-1]).removeprefix(" ")}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]  # fmt: skip
    write_json(folder / "records.json", records)
    return folder / "records.json"
