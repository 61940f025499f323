"""A run's answers with the scores of each, searched, filtered, sorted, and beside those of another run."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtuner.board.records import Record, Signature
from glmtuner.errors import ConfigError
from glmtuner.report.record_scores import build_metric
from glmtuner.run_folder.files import is_number, read_lines
from glmtuner.run_folder.names import PREDICTIONS

MOST_FILES = 4  # that are kept
TEXTS = ("prompt", "label", "predict")


@dataclass(frozen=True)
class Asked:
    """What of the answers is asked for."""

    search: str = ""
    metric: str = ""  # that is filtered by
    low: float | None = None
    high: float | None = None
    sort: str = ""  # a score, after a minus from the highest on; empty for the order of the file
    offset: int = 0
    limit: int = 50


@dataclass
class Line:
    """One line of predictions.jsonl: `texts` are its other texts, such as both answers of a pair."""

    index: int
    prompt: str
    label: str | None
    predict: str | None
    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str | None]:
        """Equal in two runs that were asked the same."""
        return self.prompt, self.label

    def holds(self, text: str) -> bool:
        """Whether one of its texts contains the text, which is in small letters."""
        return any(
            text in (each or "").lower() for each in (self.prompt, self.label, self.predict, *self.texts.values())
        )

    def as_json(self) -> dict[str, Any]:
        finite = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        return {
            "index": self.index, "prompt": self.prompt, "label": self.label, "predict": self.predict, "texts": self.texts,
            "scores": finite,
        }  # fmt: skip


class Predictions:
    """The answers of the runs that were asked for last."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[Signature | None, list[Line]]] = OrderedDict()

    def page(self, record: Record, beside: Record | None, asked: Asked) -> dict[str, Any]:
        """The answer to api/predictions; raises ConfigError for a score that there is not."""
        lines = self.of(record)
        others = {line.key: line for line in self.of(beside)} if beside is not None else {}
        scores = [*dict.fromkeys(name for line in lines for name in line.scores)]
        found = selected(lines, scores, asked)
        return {
            "total": len(found),
            "all": len(lines),
            "scores": scores,
            "lines": [
                {**line.as_json(), "other": others[line.key].as_json() if line.key in others else None}
                for line in found[asked.offset : asked.offset + asked.limit]
            ],
        }

    def of(self, record: Record) -> list[Line]:
        """The run's answers, read and scored again when the file changed."""
        signature = record.files.get(PREDICTIONS)
        known = self._files.get(record.id)
        if known is None or known[0] != signature:
            known = (signature, read(record) if signature is not None else [])
        self._files[record.id] = known
        self._files.move_to_end(record.id)
        while len(self._files) > MOST_FILES:
            self._files.popitem(last=False)
        return known[1]


def selected(lines: Sequence[Line], scores: Sequence[str], asked: Asked) -> list[Line]:
    """The lines that are asked for, in the order that is asked for; those without a score are sorted last."""
    name = asked.sort.removeprefix("-")
    for knob, value in (("metric", asked.metric), ("sort", name)):
        if value and value not in scores:
            raise ConfigError(
                f"{knob}={value[:100]}: the answers have no such score; legal are {', '.join(scores) or 'none'}"
            )
    low, high = -math.inf if asked.low is None else asked.low, math.inf if asked.high is None else asked.high
    text = asked.search.strip().lower()
    found = [line for line in lines if not text or line.holds(text)]
    if asked.metric:
        found = [line for line in found if low <= line.scores.get(asked.metric, math.nan) <= high]
    if name:
        sign = -1 if asked.sort.startswith("-") else 1
        found.sort(key=lambda line: (name not in line.scores, sign * line.scores.get(name, 0.0)))
    return found


def read(record: Record) -> list[Line]:
    """The lines of the run's file with their scores, computed as for its report."""
    metric = build_metric(record.values) if record.values else None
    without_reasoning = metric is not None and metric.without_reasoning
    lines = []
    for number, values in enumerate(read_lines(record.path / PREDICTIONS)):
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            continue
        label, predict = (values[name] if isinstance(values.get(name), str) else None for name in ("label", "predict"))
        index = values["index"] if isinstance(values.get("index"), int) else number
        texts = {name: value for name, value in values.items() if isinstance(value, str) and name not in TEXTS}
        if label is not None and texts.get("reference") == label:
            del texts["reference"]
        line = Line(index, prompt, label, predict, texts)
        line.scores = {name: float(value) for name, value in values.items() if name != "index" and is_number(value)}
        if metric is not None and predict is not None:
            reference, answer = scored_texts(values, without_reasoning)
            if isinstance(reference, str) and isinstance(answer, str):
                line.scores |= metric.score(answer.strip(), reference.strip())
        lines.append(line)
    return lines


def scored_texts(values: Mapping[str, Any], without_reasoning: bool) -> tuple[Any, Any]:
    """What was scored against what, as `read_answers` of the report has it."""
    reference, answer = values.get("reference", values.get("label")), values.get("predict")
    if without_reasoning:
        return values.get("reference_answer", reference), values.get("answer", answer)
    return reference, answer
