"""Which columns of a file hold the question and which the answer, judged over all of its records; and what is left unread."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glmtuner.data.records import MARKS, REASONING, BadRecord, Example, as_rows, is_empty, names_of
from glmtuner.data.tools import keys_read

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

PROMPTS = ("instruction", "prompt", "question", "query", "input")
QUERIES = ("input", "query", "context")
ANSWERS = ("output", "response", "answer", "completion")
TOOLS = ("tools", "functions")
DIALOGUES = ("conversations", "conversation", "messages", "turns")
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# A text column with one of these words in its name is taken for a part of the question, or of the answer's reasoning…
QUESTION_WORDS = frozenset(
    """
    input inputs instruction instructions prompt prompts question questions query problem context contexts
    document documents passage passages paragraph paragraphs article background evidence knowledge facts story
    premise hypothesis table schema hint hints text content body code options choices constraint constraints
    persona system history dialogue dialog conversation conversations messages turns reasoning thinking tool
    tools function functions image images picture video videos audio audios
    """.split()  # noqa: SIM905
)
QUESTION_SIGNS = "问题 提问 输入 指令 上下文 背景 文章 段落 材料 系统 历史 对话 选项 思考".split()  # noqa: SIM905
# … unless it ends in one of these, as prompt_id and context_length do.
METADATA_WORDS = frozenset(
    """
    id ids uuid hash index idx key name names type types kind category categories source origin url link path
    file filename lang language locale domain topic tag tags label labels title length len count tokens score
    scores quality difficulty level rating date time timestamp year author model version license split subset
    embedding fingerprint status flag format template
    """.split()  # noqa: SIM905
)
RENDERED_WORDS = {"text", "formatted", "full", "chat"}  # in names of columns that hold a whole conversation as one text
NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?\s*", re.IGNORECASE)
END_MARKERS = re.compile(r"\s*(?:<[^<>\s]*>\s*|\[[^\[\]\s]*\]\s*)*")  # such as </s> and <|im_end|>
SHORT = 20  # characters
NOTHING = ("[]", "{}", "null")  # JSON of nothing
TELLING = "[H \t\r\n\u3000\u2028\u2029\x85\xa0"  # a text may begin so that is blank, JSON, or a transcript
ROLES = {
    **dict.fromkeys(("prompt", "query"), "prompt"),
    "response": "answer",
    "history": "earlier turns",
    "messages": "turns",
    "system": "system prompt",
    "tools": "tools",
    "chosen": "better answer",
    "rejected": "worse answer",
    "kto_tag": "good or bad answer",
    "weight": "weight in the loss",
}


@dataclass
class Column:
    """What a file's records hold in one column, as far as they hold anything."""

    kinds: set[str] = field(default_factory=set)
    longest: int = 0  # of its lists
    texts_are_numbers: bool = True  # as the cells of CSV may be

    def add(self, value: Any) -> None:
        """Take the value of one more record into account."""
        self.kinds.add(kind_of(value))
        self.texts_are_numbers &= not isinstance(value, str) or NUMBER.fullmatch(value) is not None
        rows = as_rows(value)
        if isinstance(rows, list | tuple):
            self.longest = max(self.longest, len(rows))

    @property
    def is_dialogue(self) -> bool:
        return bool(self.kinds & {"OpenAI turns", "ShareGPT turns"})

    @property
    def holds_text(self) -> bool:
        return bool(self.kinds - {"boolean", "0 or 1", "number"})


def kind_of(value: Any) -> str:
    """What a value is to the choice of a format."""
    if isinstance(value, str):
        if value.strip().lower() in ("true", "false"):
            return "boolean"
        value = _parsed_turns(value)
    value = as_rows(value)
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "0 or 1" if value in (0, 1) else "number"
    if isinstance(value, list | tuple) and value:
        if isinstance(value[0], dict):
            return "OpenAI turns" if value[0].get("role") is not None else "ShareGPT turns"
        return "texts" if isinstance(value[0], str) else "list"
    if isinstance(value, str):
        return "transcript" if value.lstrip().startswith("Human:") else "text"
    return "other"


def _parsed_turns(text: str) -> Any:
    """The list of a text that is JSON of turns, as in a cell of CSV; any other text unchanged."""
    if not text.lstrip().startswith("[{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def survey(records: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of records, in the order of their appearance."""
    columns: dict[str, Column] = {}
    for record in records:
        for name, value in record.items():
            column = columns.get(name) or columns.setdefault(name, Column())
            if type(value) is str and len(value) > 6 and value[0] not in TELLING and "text" in column.kinds:
                continue  # most values: nothing is new
            if not is_empty(value):
                column.add(value)
    return columns


def infer_format(columns: dict[str, Column]) -> tuple[str, dict[str, str]]:
    """The format and the columns that a file's columns imply; ("", {}) if they imply none."""
    formatting, named = _format_and_columns(columns)
    tools = [name for name in TOOLS if name in columns]
    if formatting not in ("sharegpt", "messages"):  # of other records only what can be nothing else
        tools = [name for name in tools if _kinds(columns, name) & {"ShareGPT turns"}] if formatting != "text" else []
    tools.sort(key=lambda name: not _kinds(columns, name))
    return formatting, {**named, **({"tools": tools[0]} if tools and formatting else {})}


def _format_and_columns(columns: dict[str, Column]) -> tuple[str, dict[str, str]]:
    extras = {"system": "system"} if "system" in columns else {}
    pair = {key: key for key in ("chosen", "rejected") if "chosen" in columns and "rejected" in columns}
    tag = next((key for key in ("kto_tag", "label") if "boolean" in _kinds(columns, key)), None)
    extras |= {"kto_tag": tag} if tag and not pair else {}
    mark = next((key for key in MARKS if key in columns and _marks(key, columns[key])), None)
    extras |= {"weight": mark} if mark else {}
    prompt = _prompt(columns)
    if pair and columns["chosen"].is_dialogue and columns["chosen"].longest > 1:
        return "messages", {**pair, **extras}
    for name in DIALOGUES:
        if name in columns and (columns[name].is_dialogue or "texts" in columns[name].kinds):
            return _dialogue_format(columns[name]), {"messages": name, **pair, **extras}
    answer = next(
        (key for key in ANSWERS if _kinds(columns, key)), next((key for key in ANSWERS if key in columns), "")
    )
    if prompt and columns[prompt].is_dialogue and (pair or answer):
        return _dialogue_format(columns[prompt]), {"messages": prompt, **(pair or {"response": answer}), **extras}
    if pair and not prompt and columns["chosen"].is_dialogue:
        return "messages", {**pair, **extras}
    if pair and not prompt and "transcript" in columns["chosen"].kinds:
        return "transcript", {**pair, **extras}
    if prompt and (pair or answer):
        query = next((key for key in QUERIES if key in columns and key != prompt), "")
        history = {"history": "history"} if "history" in columns else {}
        found = {"prompt": prompt, **({"query": query} if query else {}), **history}
        return "alpaca", {**found, **(pair or {"response": answer}), **extras}
    marks = {"weight": mark} if mark else {}
    return ("text", {"prompt": "text", **marks}) if "text" in columns else ("", {})


def _marks(name: str, column: Column) -> bool:
    """Whether a column says how much each record is learned; of numbers only `weight` does: a `loss` is a measurement."""
    numbers = {"number", *(("text",) if column.texts_are_numbers else ())} if name == "weight" else set()
    return bool(column.kinds) and column.kinds <= {"boolean", "0 or 1"} | numbers


def _kinds(columns: dict[str, Column], name: str) -> set[str]:
    return columns[name].kinds if name in columns else set()


def _prompt(columns: dict[str, Column]) -> str:
    """The column of the prompt: the first of PROMPTS that holds something, or that a query completes; "" if there is none."""
    present = [name for name in PROMPTS if name in columns]
    if present and present[0] == "instruction" and any(_kinds(columns, name) for name in QUERIES):
        return present[0]
    return next((name for name in present if columns[name].kinds), present[0] if present else "")


def _dialogue_format(column: Column) -> str:
    if not column.is_dialogue:
        return "turns"
    return "messages" if "OpenAI turns" in column.kinds else "sharegpt"


def is_ranked(columns: dict[str, Column], named: dict[str, str]) -> bool:
    """Whether the records are ranked pairs: two columns, or lists of two answers and more."""
    answers = columns.get(named.get("response", ""))
    return "chosen" in named or ("messages" not in named and answers is not None and answers.longest > 1)


def unread(columns: Iterable[str], spec: DatasetSpec) -> list[str]:
    """The columns that a dataset's entry does not read."""
    return [name for name in columns if name not in spec.columns.values()]


def looks_needed(name: str, column: Column | None = None) -> bool:
    """Whether an unread column seems to be a part of the question or of the answer's reasoning, by its name."""
    if column is not None and not column.holds_text:
        return name == "weight" and "number" in column.kinds  # which the entry does not name
    if name in REASONING or any(sign in name for sign in QUESTION_SIGNS):
        return True
    words = _words(name)
    return bool(words) and words[-1] not in METADATA_WORDS and not QUESTION_WORDS.isdisjoint(words)


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORD.findall(name)]


def adds_something(name: str, value: Any, example: Example) -> bool:
    """Whether an unread value is in no turn of the example, and is not the conversation itself as one text.

    Short texts are only compared as a whole, since they are in many others.
    """
    turns = [message.content.strip() for message in example.messages]
    turns += [text.strip() for text in (example.chosen, example.rejected, example.text) if text is not None]
    for text in map(str.strip, _texts(value)):
        if text in NOTHING or text in turns or (len(text) >= SHORT and any(text in turn for turn in turns)):
            continue
        if not {*_words(name)} & RENDERED_WORDS or len(example.messages) < 2:
            return True
        *_, question, answer = turns[: len(example.messages)]
        before, found, after = text.rpartition(answer)
        if not found or question not in before or not END_MARKERS.fullmatch(after):
            return True
    return name == "weight"


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value; role names and the like are texts, too, but short."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for key, part in value.items() if key not in ("role", "from", "type") for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))
    elif value is not None and not isinstance(value, bool | int | float):
        yield str(value)


def description(spec: DatasetSpec, columns: Collection[str]) -> str:
    """What is read as what, of the columns that hold something, and what is not used; in one line."""
    roles: dict[str, list[str]] = {}
    for key, name in spec.columns.items():
        if name in columns:
            role = "text" if spec.formatting == "text" and key == "prompt" else ROLES.get(key, key)
            roles.setdefault(role, []).append(name)
    read = ", ".join(f"{names_of(names).replace(', ', '+')} -> {role}" for role, names in roles.items())
    others = unread(columns, spec)
    return f"{read or spec.formatting}{f'; not used: {names_of(others, 20)}' if others else ''}"


def turn_keys(raw: Mapping[str, Any], spec: DatasetSpec) -> Iterator[str]:
    """The keys of a record's turns that are not read, as <column>.<key>."""
    known = {spec.tags.get("role_tag", ""), spec.tags.get("content_tag", ""), "role", "content", "from", "value"}
    known |= {*MARKS, *REASONING} - {*spec.ignore_columns}
    for key in ("messages", "response", "chosen", "rejected"):
        name = spec.columns.get(key, "")
        value = as_rows(raw.get(name))
        for turn in value if isinstance(value, list) else [value]:
            if isinstance(turn, dict):
                if others := turn.keys() - known:  # most turns have none
                    others -= keys_read(turn, spec)
                yield from (f"{name}.{other}" for other in others if not is_empty(turn[other]))


def refuse_needed(
    spec: DatasetSpec, records: Iterable[tuple[str, int, Any]], names: Collection[str], parse: Any
) -> str | None:
    """An error for the first record in which one of these unread columns adds something to the example; None if none does."""
    for source, number, raw in records:
        if isinstance(raw, BadRecord) or all(is_empty(raw.get(name)) for name in names):
            continue
        try:
            example = parse(raw, spec)
        except BadRecord:
            continue
        needed = [name for name in names if not is_empty(raw.get(name)) and adds_something(name, raw[name], example)]
        if needed:
            return needed_message(spec, source, number, needed)
    return None


def needed_message(spec: DatasetSpec, source: str, number: int, needed: list[str]) -> str:
    """The error for columns that are not read, and look as if they should be."""
    listing = names_of(needed)
    plural = len(needed) > 1
    ignored = ",".join([*spec.ignore_columns, *needed])
    return (
        f"dataset {spec.name!r}: {source}: record {number} has {listing}, which {'are' if plural else 'is'} not read "
        f"({description(spec, [*spec.columns.values()])}) and {'look' if plural else 'looks'} like a part of the question; "
        f"type data.ignore_columns={ignored} to leave {'them' if plural else 'it'} out, or say what "
        f"{'they are' if plural else 'it is'} in an entry of dataset_info.json in data.dataset_dir, such as "
        f'{{"file_name": …, "formatting": "{spec.formatting}", "columns": {json.dumps(spec.columns, ensure_ascii=False)}}}'
    )
