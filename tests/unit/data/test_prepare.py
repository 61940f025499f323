"""Preprocessing as a stream: what is in memory, what is on the disk when it breaks off, and processes against threads."""

import errno
import gc
import json
import os
import random
import signal
import threading
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from glmtuner.config.groups import Data
from glmtuner.config.paths import ASSETS
from glmtuner.data import find
from glmtuner.data import prepare as preparing
from glmtuner.data.blocks import BlockEncoder
from glmtuner.data.encode import Encoder
from glmtuner.data.encoding import THREADS, encoded_batches
from glmtuner.data.feedback import FeedbackEncoder
from glmtuner.data.pairs import PairEncoder
from glmtuner.data.prepare import cache_root, prepare
from glmtuner.data.prompts import PromptEncoder
from glmtuner.data.records import Example, Message
from glmtuner.errors import DataError
from glmtuner.templates import tiktoken_engine as bpe
from glmtuner.templates.glm import TEMPLATES
from glmtuner.templates.named import template_named


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


def prepared(tmp_path, tokenizer, *, records=2500, broken=(), encoder=Encoder, name="a.json", **options):
    lines = [
        json.dumps({"instruction": f"问题 {number}", "output": "" if number in broken else f"答案 {number}"})
        for number in range(records)
    ]
    text = f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = Data(dataset=[name], dataset_dir=str(tmp_path), max_source_length=64, max_target_length=64, **options)
    made = encoder(template=TEMPLATES["glm4"], tokenizer=tokenizer, **data.lengths())
    return prepare(find(name, tmp_path, []), data, made, hub_cache=None, token=False)


def left():
    """What is in the cache's folder of rows."""
    folder = cache_root() / "tokenized"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def fails_at(batch, action):
    """An encoder that encodes so many batches and then acts."""
    calls = iter(range(batch))

    @dataclass(frozen=True, kw_only=True)
    class Failing(Encoder):
        def encode(self, examples):
            if next(calls, None) is None:
                action()
            return super().encode(examples)

        def settings(self):
            return {**super().settings(), "encoder": "Encoder"}  # the same rows: the same key

    return Failing


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_come_in_the_records_order(tmp_path, tokenizer, name):
    encoded = prepared(tmp_path, tokenizer, name=name)
    assert encoded.rows["answer"][:] == [f"答案 {number}" for number in range(2500)]
    assert (encoded.counts.records, encoded.counts.tokens) == (2500, sum(map(len, encoded.rows["input_ids"])))
    (file,) = encoded.rows.cache_files  # memory-mapped from there
    assert file["filename"].endswith("/rows-00000.arrow")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_few_batches_are_in_memory_however_many_records(tmp_path, tokenizer, name):
    alive, alone = [], threading.Lock()

    @dataclass(frozen=True, kw_only=True)
    class Counting(Encoder):
        batch_size: ClassVar[int] = 20

        def encode(self, examples):
            with alone:  # the list of one count would keep alive what the next one finds
                alive.append(sum(type(thing) is Example for thing in gc.get_objects()))
            return super().encode(examples)

    prepared(tmp_path, tokenizer, records=400, encoder=Counting, name=name)
    assert len(alive) == 20
    assert 20 <= max(alive) <= 20 * (3 * THREADS + 2)


def test_processes_write_the_same_bytes(tmp_path, tokenizer):
    files = []
    for workers in (None, 2):
        encoded = prepared(tmp_path, tokenizer, preprocessing_num_workers=workers, overwrite_cache=True)
        (file,) = encoded.rows.cache_files
        with open(file["filename"], "rb") as rows:
            files.append(rows.read())
    assert files[0] == files[1]


ENCODERS = {
    "answers": partial(Encoder),
    "feedback": partial(FeedbackEncoder),
    "pairs": partial(PairEncoder),
    "blocks": partial(BlockEncoder, block_length=50),
    "prompts": partial(PromptEncoder),
}
WORDS = [
    "答案",
    "a",
    " the",
    "12345",
    "\n\n",
    "  ",
    "<|user|>",
    "[gMASK]",
    "é",
    "e\u0301",
    "😀",
    "\0",
    "\0|",
    bpe.SEPARATOR,
    "。",
]


@pytest.mark.parametrize("template", ["glm4", "chatglm", "plain", "tokenizer"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_engine_changes_no_byte(tmp_path, monkeypatch, capsys, kind, template):
    drawn = random.Random(0)

    def text():
        return "".join(drawn.choices(WORDS, k=drawn.randrange(1, 60))).strip() or "a"

    examples = []
    for number in range(240):
        turns = [Message(role, text()) for role in ("user", "assistant") * drawn.randrange(1, 4)]
        more = {"desirable": number % 2 == 0} if kind == "feedback" else {}
        if kind == "blocks":
            turns, more = [], {"text": text()}
        elif kind == "pairs":
            turns, more = turns[:-1], {"chosen": turns[-1].content, "rejected": text()}
        examples.append(Example(turns, **more))
    tokenizer = byte_level_tokenizer()
    encoder = ENCODERS[kind](
        template=template_named(template, tokenizer), tokenizer=tokenizer, max_source_length=40, max_target_length=30
    )
    written = []
    for engines in (False, True):
        used = []
        monkeypatch.setattr(bpe.Engine, "_encode_supported", spied(bpe.Engine._encode_supported, used))
        batches = iter([examples[:80], examples[80:160], examples[160:]])
        engine_json = preparing.serialized(tokenizer) if engines else None
        tables, counts = zip(*encoded_batches(batches, encoder, None, engine_json), strict=True)
        written.append(([table.to_pylist() for table in tables], counts))
        assert bool(used) is (engines and template in ("glm4", "chatglm"))  # the others ask the tokenizer themselves
        assert bpe.engine_of(tokenizer) is None  # it is gone with the work
    assert written[0] == written[1]
    assert "tiktoken" not in capsys.readouterr().out  # no engine was dropped


def byte_level_tokenizer():
    """The tiny model's tokenizer, with a pattern for which there is an engine (its own splits digits one by one)."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def spied(function, calls):
    def spy(*args):
        calls.append(args)
        return function(*args)

    return spy


@pytest.mark.parametrize("use", [True, False])
def test_engines_are_switched_off_by_a_key_that_is_not_in_the_cache_key(tmp_path, monkeypatch, use):
    monkeypatch.setattr(preparing, "ENGINE_BYTES_PER_TOKEN", 0)
    used = []
    monkeypatch.setattr(bpe.Engine, "_encode_supported", spied(bpe.Engine._encode_supported, used))
    encoded = prepared(tmp_path, byte_level_tokenizer(), tiktoken_engine=use)
    assert bool(used) is use
    used.clear()
    assert prepared(tmp_path, byte_level_tokenizer(), tiktoken_engine=not use).rows[:] == encoded.rows[:]
    assert not used and len(left()) == 1  # the other run reads the same cache


def test_an_engine_that_differs_is_dropped_while_a_dataset_is_encoded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "ENGINE_BYTES_PER_TOKEN", 0)
    expected = prepared(tmp_path, byte_level_tokenizer(), records=490, tiktoken_engine=False)
    encode = bpe.Engine._encode_supported

    def encode_wrongly(engine, texts):
        return [ids[:-1] if "问题 450" in text else ids for text, ids in zip(texts, encode(engine, texts), strict=True)]

    monkeypatch.setattr(bpe.Engine, "_encode_supported", encode_wrongly)
    encoded = prepared(tmp_path, byte_level_tokenizer(), records=490, overwrite_cache=True)
    assert encoded.rows[:] == expected.rows[:] and encoded.counts == expected.counts
    assert capsys.readouterr().out.count("data.tiktoken_engine=false") == 1


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        prepared(tmp_path, tokenizer, encoder=fails_at(3, full))
    assert left() == []


def test_a_killed_process_leaves_no_half_cache(tmp_path, tokenizer):
    child = os.fork()
    if not child:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads are not in a forked process
        prepared(tmp_path, tokenizer, encoder=fails_at(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (entry,) = left()
    files = {path.name for path in (cache_root() / "tokenized" / entry).iterdir()}
    assert files and all(name.startswith(".") for name in files)  # nothing that is taken for a piece
    assert len(prepared(tmp_path, tokenizer).rows) == 2500
    assert left() == [entry]
    files = {path.name for path in (cache_root() / "tokenized" / entry).iterdir()}
    assert files == {"rows-00000.arrow", "hashes-00000", "piece-00000.json", "counts.json"}


def test_all_broken_records_are_counted_and_no_more_is_encoded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("glmtuner.data.encoding.encode_batch", lambda encoder, examples: pytest.fail("encoded"))
    with pytest.raises(
        DataError, match=r"'a\.json': 3 broken records and data\.max_bad_records=2: .*max_bad_records=3"
    ):
        prepared(tmp_path, tokenizer, records=1000, broken=(0, 1, 2), max_bad_records=2)
    assert left() == []


def test_broken_records_may_pass(tmp_path, tokenizer):
    encoded = prepared(tmp_path, tokenizer, records=1000, broken=(0, 700, 999), max_bad_records=3)
    assert (encoded.counts.records, encoded.counts.bad_records) == (997, 3)
    assert [line.number for line in encoded.bad] == [1, 701, 1000]
    with pytest.raises(DataError, match="max_bad_records=2"):  # of the cached rows, too
        prepared(tmp_path, tokenizer, records=1000, broken=(0, 700, 999), max_bad_records=2)
