"""The errors that a user can cause, one class per kind; anything else is a bug and keeps its traceback.

GlmtunerError                exit code 2; the message is one paragraph: what is wrong, what is legal, what to type next
├── ConfigError              a key, a value or a combination of values
│   └── UnknownName          a name that is not registered; the nearest ones are suggested
├── DataError                a dataset: its file, its entry, its records
├── CheckpointError          a checkpoint or a run folder
│   └── FolderBusy           a run folder that another process is using
├── PreflightError           a run that would train nothing, or produce garbage
└── TrainingError            a training that took no optimizer step
    ├── Diverged             a training whose numbers are no longer finite
    └── RankLost             a training one of whose ranks has gone; exit code 1
"""

from collections.abc import Iterable


class GlmtunerError(Exception):
    """An error that the user caused; the message is all they see."""


class ConfigError(GlmtunerError):
    """An illegal key or value, or values that exclude each other."""


class DataError(GlmtunerError):
    """A dataset that cannot be found, read or used."""


class CheckpointError(GlmtunerError):
    """A checkpoint or a run folder that cannot be used."""


class FolderBusy(CheckpointError):
    """A run folder that another process is using."""


class PreflightError(GlmtunerError):
    """A run that would train nothing, or produce garbage."""


class TrainingError(GlmtunerError):
    """A training that took no optimizer step, or cannot go on."""


class Diverged(TrainingError):
    """A training whose losses, gradients or weights are no longer finite: the same values end the same way again."""


class RankLost(TrainingError):
    """A rank was killed, has failed, or cannot be reached any more."""

    def __init__(self, reason: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable  # its machine, as if the network was cut


class UnknownName(ConfigError):
    """A name that is not registered, with the nearest legal names; a long list of legal names is truncated."""

    MAX_LISTED = 40

    def __init__(self, kind: str, name: str, known: Iterable[str], add_one: str = "") -> None:
        legal = sorted(known)
        more = f" and {len(legal) - self.MAX_LISTED} more" if len(legal) > self.MAX_LISTED else ""
        listing = f"known: {', '.join(legal[: self.MAX_LISTED])}{more}" if legal else ""
        message = f"no {kind} named {name!r}{did_you_mean(name, legal, listing)}"
        if add_one:
            message += f"; add one: {add_one}"
        super().__init__(message)


def nearest(word: str, legal: Iterable[str], max_edits: int | None = None) -> list[str]:
    """The legal words with the fewest edits to `word`, all of them if several tie; empty if even those are too far.

    An edit inserts, deletes, substitutes or transposes one character (optimal string alignment distance). By default,
    too far means more edits than a third of the word's length, or than two if that is more.
    """
    from rapidfuzz.distance import OSA

    limit = max(2, len(word) // 3) if max_edits is None else max_edits
    distances = {candidate: OSA.distance(word, candidate, score_cutoff=limit) for candidate in legal}
    smallest = min(distances.values(), default=limit + 1)
    if smallest > limit:
        return []
    return sorted(candidate for candidate, distance in distances.items() if distance == smallest)


def did_you_mean(word: str, legal: Iterable[str], then: str = "") -> str:
    """`; did you mean 'x'? <then>`, with every nearest word if several tie; `; <then>` if none is near."""
    candidates = nearest(word, legal)
    question = f"; did you mean {' or '.join(map(repr, candidates))}?" if candidates else ""
    return f"{question}{' ' if candidates else '; '}{then}" if then else question
