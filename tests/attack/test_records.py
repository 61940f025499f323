"""Thousands of records of every format, file type and kind of damage: each is read, counted as broken, or refused in one paragraph.

`ATTACK_RECORDS` is how many records are made, 10,000 by default.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import time
from itertools import count

import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet
from transformers import AutoTokenizer

from glmtuner.config.groups import Data
from glmtuner.config.paths import ASSETS
from glmtuner.data import find
from glmtuner.data.blocks import BlockEncoder
from glmtuner.data.columns import description
from glmtuner.data.encode import Encoder
from glmtuner.data.feedback import FeedbackEncoder
from glmtuner.data.pairs import PairEncoder
from glmtuner.data.prepare import prepare
from glmtuner.errors import GlmtunerError
from glmtuner.templates.named import template_named

NUM_RECORDS = int(os.environ.get("ATTACK_RECORDS", "10000"))
RECORDS_PER_FILE = 3  # on average, of the files that are not damaged
HANG_S = 120.0

# What a value may be

LONG = "@LONG@"  # in JSON an integer of more digits than Python reads

WORDS = st.sampled_from(
    ["q", "你好", "a b", "1+1?", "<|user|>", "x\u2028y", "é\t", "[Round 1]", "true", "0", "\u0085z"]
)
ODD_TEXTS = st.sampled_from(
    ["", " ", "\x00", "\ufeffx", "\ud83d\ude00"[:1], "a\r\nb", "=1+1", '"', "[", "[{", '[["a", "b"]]', "𝔘" * 300, LONG]
)
TEXTS = st.one_of(WORDS, WORDS, st.text(max_size=12), ODD_TEXTS)
NUMBERS = st.one_of(
    st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**18, 2**63, 2**64, 0.5])
)
SCALARS = st.one_of(st.none(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
DEPTH = "[" * 3000
DEEP = st.integers(500, 3000).map(lambda depth: "[" * depth + "]" * depth)  # as JSON text

# Records of every format


def turns(role_key, content_key, user, assistant):
    marks = st.dictionaries(
        st.sampled_from(["weight", "loss", "train", "name", "id", "tool_calls"]), SCALARS, max_size=1
    )
    answer = st.tuples(WORDS, marks).map(lambda pair: {role_key: assistant, content_key: pair[0], **pair[1]})
    rounds = st.lists(st.tuples(WORDS, answer), min_size=1, max_size=3)
    return rounds.map(lambda pairs: [turn for q, a in pairs for turn in ({role_key: user, content_key: q}, a)])


def as_json(values):
    """The values, or their JSON."""
    return values | values.map(json.dumps)


def mostly(usual, odd):
    """Nine values of `usual` to one of `odd`."""
    return st.integers(0, 9).flatmap(lambda number: usual if number else odd)


NAMES = mostly(st.sampled_from(["get_weather", "f", "g", "查询", "a b", "<|user|>"]), SCALARS)
OBJECTS = st.dictionaries(WORDS, st.booleans() | st.integers(-9, 9) | WORDS | st.lists(WORDS, max_size=2), max_size=2)
ARGUMENTS = mostly(as_json(OBJECTS), VALUES | st.sampled_from(["{", "[1]", "null", DEPTH]))
FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES}, optional={"description": WORDS, "parameters": mostly(OBJECTS, VALUES)}
)
TOOLS = as_json(st.lists(FUNCTIONS | FUNCTIONS.map(lambda tool: {"type": "function", "function": tool}), max_size=2))
CALLS = st.lists(st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS}), min_size=1, max_size=2)
RESULTS = st.lists(mostly(WORDS, as_json(VALUES)), min_size=2, max_size=2)
ROUNDS = st.lists(st.tuples(WORDS, WORDS, CALLS, RESULTS, WORDS), min_size=1, max_size=2)
IDS = st.sampled_from(["a", "b", "call00001", "call00002", "", 3])


@st.composite
def tool_turns(draw, form):
    """Turns with calls and results in one of the four forms; now and then a turn is missing, doubled, or has a key too many."""
    made = []
    role, content = ("from", "value") if form == "sharegpt" else ("role", "content")
    user, assistant = ("human", "gpt") if form == "sharegpt" else ("user", "assistant")
    for number, (question, text, calls, results, answer) in enumerate(draw(ROUNDS)):
        results = results if draw(st.integers(0, 9)) == 0 else results[: len(calls)]
        made.append({role: user, content: question})
        if form == "openai":
            ids = [draw(mostly(st.just(f"id{number}{index}"), IDS)) for index in range(len(calls))]
            calls = [{"id": id_, "type": "function", "function": call} for id_, call in zip(ids, calls, strict=True)]
            made.append({role: assistant, content: draw(st.none() | TEXTS), "tool_calls": calls})
            made += [
                {role: "tool", content: result, "tool_call_id": draw(mostly(st.just(f"id{number}{index}"), IDS))}
                for index, result in enumerate(results)
            ]
        elif form == "sharegpt":
            made += [{role: assistant, content: text}] * draw(st.integers(0, 1))
            made.append({role: "function_call", content: json.dumps(calls if len(calls) > 1 else calls[0])})
            made += [{role: "observation", content: result} for result in results]
        elif form == "glm4":
            made += [{role: assistant, content: text}] * draw(st.integers(0, 1))
            made += [{role: assistant, content: call["arguments"], "metadata": call["name"]} for call in calls]
            made += [{role: "observation", content: result} for result in results]
        else:
            made += [
                {role: "tool", "name": call["name"], "parameters": call["arguments"], "observation": result}
                for call, result in zip(calls, results, strict=False)
            ]
        made.append({role: assistant, content: answer})
    if form == "glm4":
        made.insert(0, {role: "system", content: draw(TEXTS), "tools": draw(TOOLS)})
    if draw(st.integers(0, 4)) == 0:
        made.pop(draw(st.integers(0, len(made) - 1)))
    if draw(st.integers(0, 9)) == 0:
        made.insert(draw(st.integers(0, len(made))), draw(st.sampled_from(made or [{}])))
    if made and draw(st.integers(0, 4)) == 0:
        turn = dict(draw(st.sampled_from(made)))
        key = draw(
            st.sampled_from([*turn, "tool_calls", "function_call", "metadata", "tools", "name", "loss", "reasoning"])
        )
        made[draw(st.integers(0, len(made) - 1))] = {**turn, key: draw(VALUES)}
    return made


OPENAI, SHAREGPT = turns("role", "content", "user", "assistant"), turns("from", "value", "human", "gpt")
HISTORY = st.lists(st.tuples(WORDS, TEXTS).map(list), max_size=2) | st.sampled_from(["", None])
QUESTION = OPENAI.map(lambda messages: messages[:-1])
LABEL = {"label": st.booleans()}
SHAPES = [
    ("Encoder", {"instruction": WORDS, "output": WORDS}, {"input": TEXTS, "history": HISTORY, "system": TEXTS, "id": SCALARS}),
    ("Encoder", {"instruction": WORDS, "output": WORDS}, {"context": TEXTS, "note": VALUES, "input_length": SCALARS}),
    ("Encoder", {"prompt": WORDS, "completion": WORDS}, {"weight": NUMBERS, **LABEL}),
    ("Encoder", {"messages": OPENAI}, {"system": TEXTS, "tools": st.sampled_from(["", None]), **LABEL}),
    ("Encoder", {"conversations": SHAREGPT}, {"system": TEXTS, "id": SCALARS}),
    ("Encoder", {"conversations": st.lists(TEXTS, min_size=2, max_size=4)}, {}),
    ("Encoder", {"prompt": QUESTION, "completion": OPENAI.map(lambda messages: messages[-1:])}, {}),
    ("FeedbackEncoder", {"instruction": WORDS, "output": WORDS, **LABEL}, {"id": SCALARS}),
    ("FeedbackEncoder", {"messages": OPENAI, **LABEL}, {}),
    ("PairEncoder", {"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}, {"score": NUMBERS}),
    ("PairEncoder", {"instruction": WORDS, "output": st.lists(WORDS, min_size=1, max_size=3)}, {}),
    ("PairEncoder", {"prompt": QUESTION, "chosen": WORDS, "rejected": WORDS}, {}),
    ("PairEncoder", {name: WORDS.map(f"Human: q\nAssistant: {name[0]}{{}}".format) for name in ("chosen", "rejected")}, {}),
    ("BlockEncoder", {"text": TEXTS}, {"url": TEXTS}),
]  # fmt: skip
TOOL_SHAPES = [
    ("Encoder", {"messages": tool_turns("openai"), "tools": mostly(TOOLS, VALUES)}, {**LABEL, "weight": NUMBERS}),
    ("Encoder", {"messages": tool_turns("openai")}, {"functions": TOOLS}),
    ("Encoder", {"conversations": tool_turns("sharegpt"), "tools": mostly(TOOLS, TEXTS)}, {"system": TEXTS}),
    ("Encoder", {"messages": tool_turns("glm4")}, {"tools": TOOLS}),
    ("Encoder", {"conversations": tool_turns("chatglm3"), "tools": TOOLS}, {"id": SCALARS}),
    ("FeedbackEncoder", {"conversations": tool_turns("sharegpt"), "tools": TOOLS, **LABEL}, {}),
    ("PairEncoder", {"messages": tool_turns("openai").map(lambda made: made[:-1]), "tools": TOOLS, "chosen": WORDS, "rejected": CALLS.map(
        lambda calls: {"role": "assistant", "content": None, "tool_calls": calls})}, {}),
    ("Encoder", {"instruction": WORDS, "output": WORDS, "tools": TOOLS}, {}),
]  # fmt: skip


@st.composite
def record_lists(draw, shapes=SHAPES):
    """Records of one format and its encoder; some have a value of another kind, one value less, or another column."""
    encoder, required, optional = draw(st.sampled_from(shapes))
    records = draw(
        st.lists(st.fixed_dictionaries(required, optional=optional), min_size=1, max_size=2 * RECORDS_PER_FILE - 1)
    )
    for record in records:
        if draw(st.integers(0, 9)) == 0:
            key = draw(st.sampled_from([*record, "context", "note", "é\n", "weight", "\ud83d"]))
            record[key] = draw(VALUES)
        if draw(st.integers(0, 19)) == 0:
            record.pop(draw(st.sampled_from([*record])))
    return encoder, records


# Files


def json_file(records, draw):
    options = {"ensure_ascii": draw(st.booleans())}
    texts = [json.dumps(record, **options).replace(f'"{LONG}"', "7" * 4400) for record in records]
    if draw(st.integers(0, 9)) == 0:
        texts[-1] = texts[-1].replace("{", '{"deep": ' + draw(DEEP) + (", " if texts[-1] != "{}" else ""), 1)
    layout = draw(st.sampled_from(["lines", "array", "array of lines", "data"]))
    if layout == "lines":
        return "\n".join(texts) + draw(st.sampled_from(["", "\n", "\r\n\n"]))
    if layout == "data":
        return f'{{"version": 1,\n "data": [{", ".join(texts)}]}}'
    return f"[{(',' + chr(10)).join(texts)}]" if layout == "array of lines" else f"[{', '.join(texts)}]"


def csv_file(records, draw):
    names = list(dict.fromkeys(name for record in records for name in record))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=draw(st.sampled_from(",;\t")))
    trailing = [""] * draw(st.integers(0, 2))
    writer.writerow([*names, *trailing])
    for record in records:
        writer.writerow([*(cell(record.get(name)) for name in names), *trailing])
    return file.getvalue()


def cell(value):
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def arrow_file(records, draw, write):
    try:
        names = list(dict.fromkeys(name for record in records for name in record))
        table = pyarrow.table({name: [plain(record.get(name)) for record in records] for name in names})
        file = io.BytesIO()
        write(table, file)
        return file.getvalue()
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        return None  # Arrow has no column of such values


def plain(value):
    return None if isinstance(value, dict) and not value else value  # a struct without fields is not written


def write_stream(table, file):
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@st.composite
def files(draw, shapes=SHAPES):
    """(suffix, bytes, records or None if the bytes were damaged, encoder)."""
    encoder, records = draw(record_lists(shapes))
    suffix = draw(st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".feather"]))
    if suffix in (".parquet", ".arrow", ".feather"):
        writers = {".parquet": parquet.write_table, ".feather": feather.write_feather, ".arrow": write_stream}
        content = arrow_file(records, draw, writers[suffix])
        if content is None:
            suffix = ".jsonl"
    if suffix in (".json", ".jsonl", ".csv", ".tsv"):
        text = csv_file(records, draw) if suffix in (".csv", ".tsv") else json_file(records, draw)
        encoding = draw(st.sampled_from([*["utf-8"] * 4, "utf-8-sig", "utf-16", "utf-32"]))
        content = text.encode(encoding, "surrogatepass")
    if draw(st.integers(0, 14)) == 0:  # damage
        place = draw(st.integers(0, len(content)))
        content, records = (
            content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 9)) :],
            None,
        )
    compress = draw(st.sampled_from([None, None, None, gzip.compress, bz2.compress, lzma.compress]))
    if compress:
        content, suffix = compress(content), suffix + {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(compress, ".xz")
        if draw(st.integers(0, 9)) == 0:
            content, records = content[: len(content) // 2], None
    return suffix, content, records, encoder


# What has to hold

ENCODERS = {
    "Encoder": Encoder,
    "PairEncoder": PairEncoder,
    "FeedbackEncoder": FeedbackEncoder,
    "BlockEncoder": BlockEncoder,
}
NUMBERS_OF_FILES = count()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("records")
    os.environ["GLMTUNER_CACHE"] = str(path / "cache")
    return path


def rows_of(path, encoder, tokenizer, template):
    """What a run makes of the file."""
    data = Data(
        dataset=[str(path)], dataset_dir=str(path.parent), max_source_length=10**5, max_target_length=10**5, max_bad_records=10**6
    )  # fmt: skip
    spec = find(str(path), path.parent / "nowhere", [])
    options = {"block_length": 64} if encoder is BlockEncoder else {}
    made = encoder(template=template_named(template, tokenizer), tokenizer=tokenizer, **data.lengths(), **options)
    return prepare(spec, data, made, hub_cache=None, token=False)


def is_blank(record):
    """Whether a record is a row of empty cells in CSV."""
    return not any(cell(value).strip() for value in record.values())


def test_ten_thousand_records(folder, tokenizer):
    templates = st.sampled_from(["glm4", "plain", "tokenizer"])
    totals = attack(folder, tokenizer, NUM_RECORDS, SHAPES, [None, None, None, *ENCODERS], templates)
    assert totals["read"] > totals["records"] / 4  # or nothing was tested


def test_records_with_tools(folder, tokenizer):
    templates = st.sampled_from(["glm4", "glm4", "glm4_0414", "plain"])  # the last renders no tools
    totals = attack(
        folder, tokenizer, NUM_RECORDS // 2, TOOL_SHAPES, [None] * 9 + ["Encoder", "PairEncoder"], templates
    )
    assert totals["read"] > totals["records"] / 8


def attack(folder, tokenizer, num_records, shapes, encoders, templates):
    """How many files and records were made, and how many of these were read."""
    totals = {"files": 0, "records": 0, "read": 0}

    @settings(
        max_examples=max(num_records // RECORDS_PER_FILE, 1), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(files(shapes), st.sampled_from(encoders), templates)
    def check(file, encoder, template):
        suffix, content, records, own = file
        encoder = encoder or own
        path = folder / f"{next(NUMBERS_OF_FILES)}{suffix}"
        path.write_bytes(content)
        totals["files"] += 1
        totals["records"] += len(records or [])
        start = time.monotonic()
        try:
            prepared = rows_of(path, ENCODERS[encoder], tokenizer, template)
        except GlmtunerError as error:
            message = str(error)
            message.encode()  # no lone surrogate
            assert message and not {*message} & {"\n", "\r", "\x00", "\x1b"}, message
            return
        finally:
            path.unlink()
            assert time.monotonic() - start < HANG_S
        counts = prepared.counts
        total = counts.records + counts.bad_records + counts.undesirable + counts.unlearned
        description(prepared.spec, prepared.columns).encode()
        if records is None:
            return
        is_csv = suffix.startswith((".csv", ".tsv"))
        assert total == sum(not (is_csv and is_blank(record)) for record in records)
        totals["read"] += counts.records
        if ENCODERS[encoder] is Encoder:
            nothing_lost(prepared, records, tokenizer)

    check()
    print(totals)
    return totals


def nothing_lost(prepared, records, tokenizer):
    """Every text of a column that is read is in some row; what is not read is named."""
    decoded = "".join(tokenizer.decode(ids) for ids in prepared.rows["input_ids"])
    bad = {record.number for record in prepared.bad}
    if prepared.counts.undesirable or prepared.counts.unlearned or bad:
        return
    for record in records:
        for name, value in record.items():
            if (
                name in prepared.spec.columns.values()
                and isinstance(value, str)
                and name not in ("label", "weight", "kto_tag", "history", "tools", "functions")
            ):
                assert value.strip() in decoded, (name, value)
            elif name not in prepared.spec.columns.values() and isinstance(value, str) and value.strip():
                assert name in prepared.columns, name
