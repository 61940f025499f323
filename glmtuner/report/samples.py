"""What each evaluated record contributed to a run's scores, from the files in its folder."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from glmtuner.config.groups import SCHEMA_CLASSES, Metric
from glmtuner.run_folder.files import read_lines
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOSSES, PREDICTIONS

EVALUATED = ("data.dataset_dir", "data.split", "data.max_samples")

# a record -> its total and its weight; a score is the ratio of their sums
Samples = dict[Hashable, tuple[float, float]]


def samples_of(folder: RunFolder, values: Mapping[str, Any], measured: Iterable[str]) -> dict[str, Samples]:
    """The samples behind the run's scores by the names in metrics.json, as far as its files tell; `values` is its config.

    An answer's record is its question and label, a loss's the place in the evaluation records that the config names, with
    its number of tokens where a loss is the mean over tokens; so records are the same in two runs when they were scored on the same text.
    """
    found: dict[str, Samples] = {}
    wanted = {name for name in measured if name.startswith("predict_")}
    metric = metric_of(values) if wanted else None
    for prompt, label, answer in answered(folder) if metric else ():
        for name, score in metric.score(answer.strip(), label.strip()).items():
            if f"predict_{name}" in wanted:
                _add(found.setdefault(f"predict_{name}", {}), (prompt, label), score, 1.0)
    records = evaluated_on(values)
    for line in read_lines(folder / LOSSES):
        index, tokens = line.get("index"), line.get("tokens", 1)
        if not isinstance(index, int) or not isinstance(tokens, int):
            continue
        for name in line.keys() - {"index", "tokens"}:  # the loss, and what the objective of a stage measured
            value, key = line[name], f"eval_{name}"
            if key in measured and isinstance(value, (int, float)):
                weight = tokens if name == "loss" else 1
                _add(found.setdefault(key, {}), (records, index, tokens), float(value), float(weight))
    return found


def together(many: Iterable[Samples]) -> Samples:
    """The samples of several runs as one: the score of all of them."""
    found: Samples = {}
    for samples in many:
        for record, (total, weight) in samples.items():
            _add(found, record, total, weight)
    return found


def shared(one: Samples, other: Samples) -> list[Hashable]:
    """The records that both were scored on; empty unless one's are all among the other's: then their sets differ."""
    both = [record for record in one if record in other]
    return both if len(both) == min(len(one), len(other)) else []


def _add(samples: Samples, record: Hashable, total: float, weight: float) -> None:
    before = samples.get(record, (0.0, 0.0))
    samples[record] = (before[0] + total, before[1] + weight)


def answered(folder: RunFolder) -> Iterator[tuple[str, str, str]]:
    """Question, label and answer of each line of predictions.jsonl, in its order."""
    for line in read_lines(folder / PREDICTIONS):
        texts = [line.get(name) for name in ("prompt", "label", "predict")]
        if all(isinstance(text, str) for text in texts):
            yield tuple(texts)


def metric_of(values: Mapping[str, Any]) -> Metric | None:
    """The metric that the config names; None for one that is not known here."""
    import glmtuner.metrics  # noqa: F401  (makes them known)

    cls = SCHEMA_CLASSES["metric"].get(values.get("metric.name"))
    given = {key.removeprefix("metric."): value for key, value in values.items() if key.startswith("metric.")}
    try:
        return cls(**given) if cls else None
    except TypeError:  # written by a version whose metric had other keys
        return None


def evaluated_on(values: Mapping[str, Any]) -> str:
    """Which records a run was evaluated on, in words that are equal for equal records."""
    named = values.get("data.eval_dataset")
    facts = {key: values.get(key) for key in EVALUATED} | {"dataset": named or values.get("data.dataset")}
    if not named and values.get("data.dev_ratio"):
        seed = values.get("trainer.data_seed")
        facts |= {"held out": values["data.dev_ratio"], "seed": values.get("trainer.seed") if seed is None else seed}
    return repr(facts)
