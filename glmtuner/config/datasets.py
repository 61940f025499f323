"""Rules of the lists that name datasets and what belongs to each."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

WEIGHTS = (1e-6, 1e6)  # beyond any meaning, and far from where products and sums in float32 vanish or overflow


def dataset_errors(datasets: Sequence[str], shares: Sequence[float], weights: Sequence[float]) -> Iterator[str]:
    """One sentence for each of data.dataset, mix_probabilities and weights that is illegal."""
    if not datasets:
        yield "data.dataset=[]: name at least one dataset, such as data.dataset=alpaca_zh_sample"
    if shares and len(shares) != len(datasets):
        yield (
            f"data.mix_probabilities={as_override(shares)}: {len(shares)} shares for the {len(datasets)} datasets "
            f"{as_override(datasets)}; give one share per dataset"
        )
    elif shares and (min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6):
        yield f"data.mix_probabilities={as_override(shares)}: shares are above 0 and sum to 1; these sum to {sum(shares):g}"
    if weights and len(weights) != len(datasets):
        yield (
            f"data.weights={as_override(weights)}: {len(weights)} weights for the {len(datasets)} datasets {as_override(datasets)}; "
            "give one weight per dataset"
        )
    elif not all(WEIGHTS[0] <= weight <= WEIGHTS[1] for weight in weights):
        yield (
            f"data.weights={as_override(weights)}: a weight is a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}; leave a dataset that "
            "is not to be learned out of data.dataset"
        )


def labels_of(datasets: Sequence[str]) -> dict[str, str]:
    """The word that stands for each dataset in the names of metrics: its name, or of a path that of its file, without other signs.

    Empty for a single dataset, whose metrics are those of the whole.
    """
    labels: dict[str, str] = {}
    for name in dict.fromkeys(datasets):
        path = PurePath(name)
        is_path = "/" in name or path.suffix[1:].isalpha()  # my.jsonl, not belle_0.5m
        word = re.sub(r"\W+", "_", path.stem if is_path else name).strip("_") or "dataset"
        taken = sum(re.fullmatch(rf"{re.escape(word)}(_\d+)?", label) is not None for label in labels.values())
        labels[name] = f"{word}_{taken + 1}" if word in labels.values() else word
    return labels if len(labels) > 1 else {}


def as_override(values: Sequence[Any]) -> str:
    """A list in the syntax of an override: [a,b]."""
    return f"[{','.join(str(value) for value in values)}]"
