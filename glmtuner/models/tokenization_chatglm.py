"""Tokenizers of ChatGLM-6B, of ChatGLM2 and ChatGLM3, and of GLM-4 as first published.

The first three are sentencepiece models, called for whole batches: exactly the ids of the published Python tokenizers, at
more than ten times their speed. GLM-4's file of byte pairs becomes a tokenizer of the `tokenizers` library.
"""

import base64
import binascii
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from glmtuner.errors import CheckpointError
from glmtuner.templates.new_tokens import NEW_TOKENS

ICE_FILE, VOCAB_FILE = "ice_text.model", "tokenizer.model"
MIN_THREADED_TEXTS = 64  # fewer texts are encoded faster without threads

# ChatGLM-6B has words of its vocabulary for line breaks, tabs and runs of spaces
LAYOUT = re.compile(r"\n|\t| {2,80}")
LAYOUT_WORD = re.compile(r"<n>|<\|tab\|>|<\|blank_([2-9]|[1-7]\d|80)\|>")
CONTROL = (
    "<unk>", "<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>",
)  # fmt: skip
PARSED = re.compile(
    r"(\[MASK\]|<sop>|<eop>|<pad>|<unk>)"
)  # control tokens that its published tokenizer recognizes in text

# ChatGLM2 and ChatGLM3 share one file; these tokens follow its pieces
APPENDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ROLES = re.compile(r"(<\|system\|>|<\|user\|>|<\|assistant\|>|<\|observation\|>)")

GLM4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


def layout_word(match: re.Match[str]) -> str:
    """The vocabulary's word for a line break, a tab, or a run of up to 80 spaces."""
    text = match.group()
    return {"\n": "<n>", "\t": "<|tab|>"}.get(text) or f"<|blank_{len(text)}|>"


def layout_text(match: re.Match[str]) -> str:
    """The text that a layout word stands for."""
    return {"<n>": "\n", "<|tab|>": "\t"}.get(match.group()) or " " * int(match.group(1))


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of ChatGLM-6B (the folder has `ice_text.model`), or of ChatGLM2 and ChatGLM3 (it has `tokenizer.model`).

    The class has the name in the published tokenizer_config.json. With special tokens ChatGLM-6B's rows are
    `text [gMASK] <sop>` and `prompt [gMASK] <sop> answer <eop>`, those of the others `[gMASK] sop text` and
    `[gMASK] sop prompt answer </s>`. With `split_special_tokens=True` no control token is recognized in text; without it
    ChatGLM-6B recognizes five, as its published tokenizer does, and the others none, or ChatGLM3's roles with
    `encode_special_tokens=True`.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE, "ice_file": ICE_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        ice_file: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        self.first_generation = ice_file is not None
        model_file = ice_file or vocab_file
        if model_file is None:
            raise CheckpointError(
                f"{kwargs.get('name_or_path', 'the folder')} has neither {ICE_FILE} nor {VOCAB_FILE}, the file of ChatGLM's "
                "tokenizer; download it too, or name its folder with model.tokenizer_name"
            )
        self.vocab_file = model_file
        self.encode_special_tokens = encode_special_tokens
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.vocab_file))
        if self.first_generation:
            self.control = {piece: self.sp.piece_to_id(piece) for piece in CONTROL}
            named = {"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]", "pad_token": "<pad>"}
        else:
            size = self.sp.get_piece_size()
            self.control = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
                token: size + index for index, token in enumerate(APPENDED)
            }
            named = {"eos_token": "</s>", "pad_token": "<unk>"}
        self.control_names = {token_id: token for token, token_id in self.control.items()}
        self.new: dict[str, int] = {}  # tokens that were added to the published ones
        for published in ("gmask_token", "end_token", "bos_token" if not self.first_generation else ""):
            kwargs.pop(published, None)  # keys of tokenizer_config.json whose values are fixed
        if encode_special_tokens:
            kwargs["encode_special_tokens"] = True  # kept in `init_kwargs`, and so saved in tokenizer_config.json
        new = kwargs.pop(NEW_TOKENS, None) or {}
        super().__init__(**{"unk_token": "<unk>", **named, "clean_up_tokenization_spaces": False, **kwargs})
        if new:
            self.add_new(new)

    def add_new(self, pieces: Mapping[str, list[int]]) -> None:
        """Add tokens behind the published vocabulary, each with the ids of its pieces; they are recognized in every text."""
        self.new |= {token: len(self) + index for index, token in enumerate(pieces)}
        self.new_names = {token_id: token for token, token_id in self.new.items()}
        self.new_pattern = re.compile(f"({'|'.join(map(re.escape, sorted(self.new, key=len, reverse=True)))})")
        self.init_kwargs[NEW_TOKENS] = {**self.init_kwargs.get(NEW_TOKENS, {}), **pieces}
        self.__dict__.pop("_vocabulary", None)
        self._update_total_vocab_size()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder or hub id: of this class, or a ChatGLM4Tokenizer if the file has byte pairs."""
        source = pretrained_model_name_or_path
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        # None if the folder has no such file: what is missing is reported by `__init__`
        file = cached_file(source, VOCAB_FILE, _raise_exceptions_for_missing_entries=False, **options)
        if cls is ChatGLMTokenizer and file is not None and is_byte_pair_file(Path(file)):
            return ChatGLM4Tokenizer.from_pretrained(source, *args, **kwargs)
        return super().from_pretrained(source, *args, **kwargs)

    # -- pickling: by the file's path; sentencepiece would put the whole model into the pickle -------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("sp", "_vocabulary")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "sp": sentencepiece.SentencePieceProcessor(model_file=str(state["vocab_file"]))}

    # -- vocabulary ------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of token ids, control tokens included."""
        pieces: int = self.sp.get_piece_size()
        return pieces + (0 if self.first_generation else len(APPENDED))

    def __len__(self) -> int:
        return self.vocab_size + len(self.new)

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = len(self)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return (
            {self.sp.id_to_piece(token): token for token in range(self.sp.get_piece_size())} | self.control | self.new
        )

    def get_vocab(self) -> dict[str, int]:
        """Token to id, control tokens included."""
        return dict(self._vocabulary)

    @property
    def gmask_token_id(self) -> int:
        """The id of [gMASK]."""
        return self.control["[gMASK]"]

    def _convert_token_to_id(self, token: str) -> int:
        if token in self.new:
            return self.new[token]
        token_id: int = self.control[token] if token in self.control else self.sp.piece_to_id(token)
        return token_id

    def _convert_id_to_token(self, index: int) -> str:
        if index in self.control_names:
            return self.control_names[index]
        if self.new and index in self.new_names:
            return self.new_names[index]
        # the published embeddings have more rows than their tokenizers have ids
        piece: str = self.sp.id_to_piece(index) if 0 <= index < self.sp.get_piece_size() else "<unk>"
        return piece

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        """Declare tokens of the vocabulary as added; returns 0. Raises ValueError for others: the vocabulary is fixed."""
        for token in new_tokens:
            token_id = self._convert_token_to_id(str(token))
            if token_id == self.control["<unk>"] and str(token) != "<unk>":
                raise ValueError(f"{str(token)!r} is not a token of this ChatGLM tokenizer, whose vocabulary is fixed")
            added = (
                token if isinstance(token, AddedToken) else AddedToken(token, special=special_tokens, normalized=False)
            )
            self._added_tokens_decoder[token_id] = added
            self._added_tokens_encoder[str(token)] = token_id
        return 0

    # -- text -> ids -----------------------------------------------------------------------------------------------------

    def _parts(self, text: str, plain: bool) -> list[str | int]:
        """The text split at the new tokens, and the control tokens recognized in it, which become ids; `plain`: at new ones alone."""
        if not self.new:
            return self._controls(text, plain)
        parts: list[str | int] = []
        for index, piece in enumerate(self.new_pattern.split(text)):  # text and tokens alternate
            if index % 2:
                parts.append(self.new[piece])
            elif piece:
                parts += self._controls(piece, plain)
        return parts

    def _controls(self, text: str, plain: bool) -> list[str | int]:
        """The text split at the control tokens recognized in it, which become ids; `plain`: none is recognized."""
        if plain or not (self.first_generation or self.encode_special_tokens):
            return [text]
        pieces = (PARSED if self.first_generation else ROLES).split(text)  # text and tokens alternate
        if self.first_generation:  # white space next to a token is dropped
            for index in range(1, len(pieces), 2):
                pieces[index - 1], pieces[index + 1] = pieces[index - 1].rstrip(), pieces[index + 1].lstrip()
        return [self.control[piece] if index % 2 else piece for index, piece in enumerate(pieces) if piece]

    def _prepare(self, text: str) -> str:
        """The text as sentencepiece takes it: valid Unicode, and for ChatGLM-6B with layout words."""
        try:
            text.encode()
        except UnicodeEncodeError:  # joins surrogate pairs; a lone surrogate becomes a question mark
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            text = text.encode("utf-8", "replace").decode("utf-8")
        return LAYOUT.sub(layout_word, text) if self.first_generation else text

    def encode_texts(self, texts: Sequence[str], plain: bool) -> list[list[int]]:
        """Each text's ids without special tokens around it; `plain`: no control token is recognized in it."""
        parts = [self._parts(text, plain) for text in texts]
        flat = [self._prepare(part) for row in parts for part in row if isinstance(part, str)]
        encoded = iter(self.sp.encode(flat, num_threads=-1 if len(flat) >= MIN_THREADED_TEXTS else 1))
        return [
            next(encoded) if len(row) == 1 and isinstance(row[0], str)
            else [token for part in row for token in ([part] if isinstance(part, int) else next(encoded))]
            for row in parts
        ]  # fmt: skip

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The pieces of a text; `pair` and `add_special_tokens` have no effect, as in transformers' Python tokenizers."""
        plain = kwargs.get("split_special_tokens", self.split_special_tokens)
        tokens: list[str] = []
        for part in self._parts(text, plain):
            if isinstance(part, int):
                tokens.append(self._convert_id_to_token(part))
            else:
                tokens += self.sp.encode(self._prepare(part), out_type=str)
        return tokens

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **options: Any) -> BatchEncoding[Any]:
        """The encoding of one text or of a batch, in one call of sentencepiece.

        transformers' own code encodes ids, lists of tokens, and calls with one of UNBATCHED_OPTIONS.
        """
        if args or any(options.get(name) for name in UNBATCHED_OPTIONS):
            return super()._encode_plus(text, text_pair, *args, **options)
        batched = isinstance(text, (list, tuple))
        first = list(text) if batched else [text]
        if text_pair is None and batched and first and all(_is_pair(item) for item in first):
            first, second = [item[0] for item in first], [item[1] for item in first]
        elif text_pair is not None and isinstance(text_pair, (list, tuple)) is not batched:
            raise ValueError("text and text_pair must both be batches, of the same length, or both be one text")
        elif text_pair is None:
            second = []
        else:
            second = list(text_pair) if batched else [text_pair]
        if not all(isinstance(item, str) for item in [*first, *second]):
            return super()._encode_plus(text, text_pair, **options)
        plain = options.pop("split_special_tokens", self.split_special_tokens)
        ids = self.encode_texts([*first, *second], plain)
        rows, pairs = ids[: len(first)], ids[len(first) :]
        return self._assemble(rows, pairs, batched, **options)

    def _assemble(
        self, rows: list[list[int]], pairs: list[list[int]], batched: bool, **options: Any
    ) -> BatchEncoding[Any]:
        """The encoding of rows of ids, truncated and padded as the options say; `pairs` may be empty."""
        padding, truncation = (options[f"{name}_strategy"].value for name in ("padding", "truncation"))
        second: Sequence[list[int] | None] = pairs or [None] * len(rows)
        columns: dict[str, Any]
        if truncation != "do_not_truncate" or any(options.get(name) for name in EXTRA_OUTPUTS):
            passed = {name: options[name] for name in (*EXTRA_OUTPUTS, *LENGTH_OPTIONS) if name in options}
            prepared = [
                self.prepare_for_model(row, pair, truncation=truncation, return_attention_mask=False, **passed)
                for row, pair in zip(rows, second, strict=True)
            ]
            columns = {name: [row[name] for row in prepared] for name in (prepared[0] if prepared else ["input_ids"])}
        elif options.get("add_special_tokens", True):
            ids = [self.build_inputs_with_special_tokens(row, pair) for row, pair in zip(rows, second, strict=True)]
            columns = {"input_ids": ids}
        else:
            columns = {"input_ids": [row + (pair or []) for row, pair in zip(rows, second, strict=True)]}
        if padding != "do_not_pad":
            passed = {name: options[name] for name in PADDING_OPTIONS if name in options}
            columns = dict(self.pad(columns, padding=padding, **passed))
        elif options.get("return_attention_mask") is not False:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        if not batched:
            columns = {name: values[0] for name, values in columns.items()}
        return BatchEncoding(columns, tensor_type=options.get("return_tensors"), prepend_batch_axis=not batched)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids of a text, or of a prompt and its answer, with special tokens, in the order given in the class docstring."""
        gmask, end = self.control["[gMASK]"], [self.eos_token_id]
        if self.first_generation:
            prompt = [*token_ids_0, gmask, self.control["<sop>"]]
        else:
            prompt = [gmask, self.control["sop"], *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, *end]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many ids `build_inputs_with_special_tokens` adds."""
        return 3 if pair else 2

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special tokens, 0 for others, at each position of the ids with special tokens."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(token in self.control_names) for token in ids]

    # -- ids -> text -----------------------------------------------------------------------------------------------------

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The text; unknown ids are left out, and control tokens, too, if `skip_special_tokens`.

        ChatGLM-6B's control tokens have no text; those of its successors are shown by name. Spaces before punctuation are kept
        unless `clean_up_tokenization_spaces` is true: the published tokenizer removed them, even from code.
        """
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        ids = [token for token in ids if token < len(self)]
        if skip_special_tokens:
            ids = [token for token in ids if token not in self.control_names]
        text = self.convert_tokens_to_string([self._convert_id_to_token(token) for token in ids])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of these pieces, control tokens by name."""
        if not self.new:
            return self._text_of(tokens)
        runs: list[list[str]] = [[]]  # of pieces between two new tokens
        names: list[str] = []
        for token in tokens:
            if token in self.new:
                names.append(token)
                runs.append([])
            else:
                runs[-1].append(token)
        texts = [self._text_of(run) for run in runs]
        return texts[0] + "".join(name + text for name, text in zip(names, texts[1:], strict=True))

    def _text_of(self, tokens: Iterable[str]) -> str:
        """The text of pieces and control tokens; the space that sentencepiece puts before a text's first word is left out."""
        if self.first_generation:
            return LAYOUT_WORD.sub(layout_text, self.sp.decode_pieces(list(tokens)))
        text = ""
        pieces: list[str] = []
        for token in tokens:
            if self.control.get(token, 0) > 2:
                text += self._join(pieces, previous=text) + token
                pieces = []
            else:
                pieces.append(token)
        return text + self._join(pieces, previous=text)

    def _join(self, pieces: list[str], previous: str) -> str:
        """The text of pieces; after a control token its leading space is kept, as in ChatGLM3's code."""
        lead = " " if previous and pieces and pieces[0].startswith("▁") else ""
        return lead + self.sp.decode_pieces(pieces) if pieces else ""

    # -- files -----------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the sentencepiece file into the folder; returns its path there."""
        name = ICE_FILE if self.first_generation else VOCAB_FILE
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # -- prompts of the published code -----------------------------------------------------------------------------------

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """The prompt that the published `chat` method of ChatGLM-6B, or of ChatGLM2, builds from (question, answer) pairs."""
        if self.first_generation:
            if not history:
                return query
            rounds = [
                f"[Round {number}]\n问：{question}\n答：{answer}\n" for number, (question, answer) in enumerate(history)
            ]
            return f"{''.join(rounds)}[Round {len(rounds)}]\n问：{query}\n答："
        rounds = [
            f"[Round {number}]\n\n问：{question}\n\n答：{answer}\n\n"
            for number, (question, answer) in enumerate(history or [], 1)
        ]
        return f"{''.join(rounds)}[Round {len(rounds) + 1}]\n\n问：{query}\n\n答："

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of ChatGLM3's conversations."""
        head, body = self.encode_texts([f"{metadata}\n", message], plain=True)
        return [self.control[f"<|{role}|>"], *head, *body]

    def build_chat_input(
        self, query: str, history: Sequence[dict[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding[Any]:
        """ChatGLM3's conversation as tensors of one row, up to where the model's answer starts."""
        ids = [self.control["[gMASK]"], self.control["sop"]]
        for item in history or []:
            content = item["content"]
            if item["role"] == "system" and "tools" in item:
                content = f"{content}\n{json.dumps(item['tools'], indent=4, ensure_ascii=False)}"
            ids += self.build_single_message(item["role"], item.get("metadata", ""), content)
        ids += [*self.build_single_message(role, "", query), self.control["<|assistant|>"]]
        return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")


HUB_OPTIONS = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
UNBATCHED_OPTIONS = (
    "is_split_into_words",
    "sanitize_control_tokens",
    "return_token_type_ids",
    "return_overflowing_tokens",
)
EXTRA_OUTPUTS = ("return_special_tokens_mask", "return_length")
LENGTH_OPTIONS = ("add_special_tokens", "max_length", "stride", "verbose")
PADDING_OPTIONS = ("max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item)


def is_byte_pair_file(path: Path) -> bool:
    """Whether the file has one byte pair per line: base64, a space, its rank."""
    with path.open("rb") as file:
        return _parse_byte_pair(file.readline(1000)) is not None


def _parse_byte_pair(line: bytes) -> tuple[bytes, int] | None:
    """The bytes and the rank of a line; None if it has another form."""
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit():
        return None
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error:
        return None


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """GLM-4's tokenizer in the layout of its first release; the class has the name in its tokenizer_config.json."""

    vocab_files_names = {"vocab_file": VOCAB_FILE, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        tokenizer_object: Any = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer_object is None and tokenizer_file is None and vocab_file is not None:
            tokenizer_object = from_byte_pairs(Path(vocab_file))
        for published in ("encode_special_tokens", "image_size", "additional_special_tokens", "added_tokens_decoder"):
            kwargs.pop(published, None)
        fixed = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
        super().__init__(tokenizer_file=tokenizer_file, tokenizer_object=tokenizer_object, **{**fixed, **kwargs})

    @classmethod
    def convert_to_native_format(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' hook for files of other formats: nothing is converted, since `__init__` reads this one."""
        return kwargs


def from_byte_pairs(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from a file of byte pairs, in which the pair whose merged bytes have the lowest rank merges first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pairs = [_parse_byte_pair(line) for line in path.read_bytes().splitlines() if line.strip()]
    ranks = dict(pair for pair in pairs if pair is not None)
    characters = bytes_to_unicode()
    text_of = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda pair: pair[1]):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        candidates = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        candidates.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text_of[left], text_of[right]) for left, right in candidates]
    vocabulary = {text_of[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in GLM4_SPECIAL])
    template_tokens = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>", "<|endoftext|>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1 <|endoftext|>:1", special_tokens=template_tokens
    )
    return tokenizer


def as_fast(tokenizer: ChatGLMTokenizer) -> PreTrainedTokenizerFast:
    """ChatGLM2's or ChatGLM3's tokenizer as a fast one, which is saved as tokenizer.json and loads without glmtuner.

    Ids of plain text are the same: the file is byte-pair encoding without normalization. `sop` and `eop` are renamed to
    `<sop>` and `<eop>`: a fast tokenizer recognizes control tokens anywhere in text, and the bare words may occur there.
    Raises ValueError for ChatGLM-6B's tokenizer.
    """
    if tokenizer.first_generation:
        raise ValueError("ChatGLM-6B's tokenizer is a unigram model with its own rules and has no fast version")
    from tokenizers import AddedToken as Added
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    sp = tokenizer.sp
    vocabulary = {sp.id_to_piece(token): token for token in range(sp.get_piece_size())}
    merges = []
    for piece, token in vocabulary.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        candidates = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        candidates.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-sp.get_score(token), token, pair) for pair in candidates]
    merges.sort(key=lambda merge: merge[:2])
    backend = Tokenizer(
        models.BPE(vocabulary, [pair for _, _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [{"sop": "<sop>", "eop": "<eop>"}.get(token, token) for token in APPENDED]
    backend.add_special_tokens([Added(token, normalized=False, special=True) for token in ("</s>", *names)])
    template_tokens = [(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1 </s>:1", special_tokens=template_tokens
    )
    if tokenizer.new:
        backend.add_tokens([Added(token, normalized=False, special=False) for token in tokenizer.new])
    added = {NEW_TOKENS: tokenizer.init_kwargs[NEW_TOKENS]} if tokenizer.new else {}
    return PreTrainedTokenizerFast(
        **added, tokenizer_object=backend, eos_token="</s>", pad_token="<unk>", unk_token="<unk>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
