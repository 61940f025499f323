"""The contribution of each evaluated record to a run's scores, from the files in its folder."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from glmtuner.config.groups import SCHEMA_CLASSES, Metric
from glmtuner.config.plugins import load_plugins
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.report.benchmarks import benchmark_records
from glmtuner.run_folder.files import read_lines
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOSSES, PREDICTIONS

EVALUATION_KEYS = ("data.dataset_dir", "data.split", "data.max_samples")

# record -> its total and its weight; a score is the ratio of their sums
RecordScores = dict[Hashable, tuple[float, float]]


def record_scores(folder: RunFolder, values: Mapping[str, Any], measured: Iterable[str]) -> dict[str, RecordScores]:
    """The record scores of each of the run's metrics, as far as they are in its files; `values` is its flat config.

    A record of predictions is identified by question and label; one of losses by the evaluation set, its index there and
    its number of tokens. So a record is the same in two runs if both were scored on the same text.
    """
    measured = [*measured]
    scores: dict[str, RecordScores] = benchmark_records(folder, measured)
    predicted = {name for name in measured if name.startswith("predict_")}
    metric = build_metric(values) if predicted else None
    if metric is not None:
        for prompt, label, reference, answer in read_answers(folder, metric.without_reasoning):
            for name, score in metric.score(answer.strip(), reference.strip()).items():
                if f"predict_{name}" in predicted:
                    _add(scores.setdefault(f"predict_{name}", {}), (prompt, label), score, 1.0)
    evaluated = evaluation_set(values)
    for line in read_lines(folder / LOSSES):
        index, tokens = line.get("index"), line.get("tokens", 1)
        if not isinstance(index, int) or not isinstance(tokens, int):
            continue
        for name in line.keys() - {
            "index",
            "tokens",
            "weight",
            "dataset",
        }:  # the loss, or a metric of the stage such as accuracy
            value, key = line[name], f"eval_{name}"
            if key in measured and isinstance(value, (int, float)):
                weight = line.get("weight", tokens) if name == "loss" else 1
                _add(scores.setdefault(key, {}), (evaluated, index, tokens), float(value), float(weight))
    return scores


def pooled(runs: Iterable[RecordScores]) -> RecordScores:
    """The record scores of several runs as one: totals and weights of the same record are added."""
    pool: RecordScores = {}
    for scores in runs:
        for record, (total, weight) in scores.items():
            _add(pool, record, total, weight)
    return pool


def common_records(one: RecordScores, other: RecordScores) -> list[Hashable]:
    """The records that both were scored on; empty unless one's records include the other's."""
    both = [record for record in one if record in other]
    return both if len(both) == min(len(one), len(other)) else []


def _add(scores: RecordScores, record: Hashable, total: float, weight: float) -> None:
    before = scores.get(record, (0.0, 0.0))
    scores[record] = (before[0] + total, before[1] + weight)


class Answer(NamedTuple):
    """One line of predictions.jsonl: the answer was scored against `reference`."""

    prompt: str
    label: str
    reference: str
    answer: str


def read_answers(folder: RunFolder, without_reasoning: bool = False) -> Iterator[Answer]:
    """The answers of predictions.jsonl, in its order; earlier versions scored against the label itself.

    `without_reasoning`: answers and what they were scored against without their thoughts, where they have any.
    """
    for line in read_lines(folder / PREDICTIONS):
        reference, answer = line.get("reference", line.get("label")), line.get("predict")
        if without_reasoning:
            reference, answer = line.get("reference_answer", reference), line.get("answer", answer)
        texts = [line.get("prompt"), line.get("label"), reference, answer]
        if all(isinstance(text, str) for text in texts):
            yield Answer(*map(str, texts))


def build_metric(values: Mapping[str, Any]) -> Metric | None:
    """The metric of the config; None if this installation does not have it, or not with these keys."""
    import glmtuner.metrics  # noqa: F401  (registers the metrics)

    try:
        load_plugins(values.get("plugins") or [], named_by_run=True)
    except ConfigError as error:
        say(f"answers are not scored again: {error}")
        return None
    cls = SCHEMA_CLASSES["metric"].get(str(values.get("metric.name")))
    settings = {key.removeprefix("metric."): value for key, value in values.items() if key.startswith("metric.")}
    try:
        return cls(**settings) if cls else None
    except TypeError:  # the keys of another version
        return None


def evaluation_set(values: Mapping[str, Any]) -> str:
    """A text that identifies the records on which a run was evaluated: equal for equal records."""
    named = values.get("data.eval_dataset")
    facts = {key: values.get(key) for key in EVALUATION_KEYS} | {"dataset": named or values.get("data.dataset")}
    if not named and values.get("data.dev_ratio"):
        seed = values.get("trainer.data_seed")
        facts |= {"held out": values["data.dev_ratio"], "seed": values.get("trainer.seed") if seed is None else seed}
    return repr(facts)
