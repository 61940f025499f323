"""Records with a prompt and its answer in columns: `{"instruction": …, "input": …, "output": …, "history": […]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import (
    BadRecord,
    Example,
    Message,
    Turn,
    answer_turn,
    answered,
    feedback_of,
    list_of,
    optional_text,
    ranked,
    shown,
    system_turn,
    text_of,
    value_of,
)

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """One answer, or two: in `columns.chosen` and `columns.rejected`, or as a list of answers, best first.

    Of a longer list the first two answers are used, as in ChatGLM-Efficient-Tuning.
    """
    columns = spec.columns
    turns = [*system_turn(raw, columns.get("system")), *history(raw, columns.get("history"))]
    turns.append((columns["prompt"], Message("user", prompt(raw, spec))))
    if "chosen" in columns:
        chosen, rejected = columns["chosen"], columns["rejected"]
        return ranked(
            turns,
            text_of(value_of(raw, chosen), chosen, "answer"),
            text_of(value_of(raw, rejected), rejected, "answer"),
        )
    column = columns["response"]
    answer = value_of(raw, column)
    if isinstance(answer, list | tuple) and len(answer) == 1 and not spec.ranking:
        answer = answer[0]
    if isinstance(answer, list | tuple):
        if not answer:
            raise BadRecord(column, "empty answer: a list of none")
        if len(answer) < 2:
            raise BadRecord(column, f"a ranked pair needs two answers, got a list of {len(answer)}")
        better, worse = (text_of(text, f"{column}[{index}]", "answer") for index, text in enumerate(answer[:2]))
        return ranked(turns, better, worse)
    if spec.ranking:
        raise BadRecord(column, f"ranking needs a list of two answers, the better one first, got {shown(answer)}")
    turns.append((column, Message("assistant", text_of(answer, column, "answer"))))
    return answered(turns, feedback_of(raw, columns.get("kto_tag")))


def prompt(raw: dict[str, Any], spec: DatasetSpec) -> str:
    """Prompt and query with `data.input_separator` between them; one of them may be blank."""
    prompt_column, query_column = spec.columns["prompt"], spec.columns.get("query")
    query = optional_text(raw, query_column, "query")
    if not query:
        return text_of(value_of(raw, prompt_column), prompt_column, "prompt")
    first = optional_text(raw, prompt_column, "prompt")
    return f"{first}{spec.input_separator}{query}" if first else query


def history(raw: dict[str, Any], column: str | None) -> list[Turn]:
    """The turns of the earlier rounds, a list of [prompt, answer]; [] if the column is unnamed, missing, null or blank."""
    turns: list[Turn] = []
    value = raw.get(column) if column else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return turns
    for index, pair in enumerate(list_of(value, str(column), "[prompt, answer] pairs")):
        place = f"{column}[{index}]"
        if len(list_of(pair, place, "a prompt and an answer")) != 2:
            raise BadRecord(place, f"a prompt and an answer are expected, got a list of {len(pair)}")
        turns.append((f"{place}[0]", Message("user", text_of(pair[0], f"{place}[0]", "prompt"))))
        turns.append((f"{place}[1]", answer_turn(text_of(pair[1], f"{place}[1]", "answer", may_be_blank=True))))
    return turns
