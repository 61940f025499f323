"""The answers that stage=grpo sampled, as a table: those to a prompt of the first and of the last step."""

from collections.abc import Iterator
from typing import Any

from glmtuner.run_folder.files import is_number, read_lines
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import SAMPLED

MOST_OF_STEP = 8  # answers of a step in a report; the file has all, and the tracker gets as many as of predictions
TEXTS = ("prompt", "label", "answer")


def first_and_last(folder: RunFolder) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of the numbers of an answer, and the first answers of the first and of the last step; both empty without any."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for line in _complete_lines(folder):
        if not first or line["step"] == first[0]["step"]:
            first.append(line)
        elif last and line["step"] == last[0]["step"]:
            last.append(line)
        else:
            last = [line]
    shown = [*first[:MOST_OF_STEP], *last[:MOST_OF_STEP]]
    return list(dict.fromkeys(name for line in shown for name in line if name not in ("step", *TEXTS))), shown


def _complete_lines(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The lines of the file, without those that another program damaged."""
    for line in read_lines(folder / SAMPLED):
        has_texts = all(isinstance(line.get(name), str) for name in TEXTS)
        numbers = [value for name, value in line.items() if name not in TEXTS]
        if has_texts and isinstance(line.get("step"), int) and all(map(is_number, numbers)):
            yield line
