"""What a user can get wrong, one class a kind; everything else is a bug and keeps its traceback.

GlmtunerError                exit code 2; the message is one paragraph: what is wrong, what is legal, what to type
├── ConfigError              a key, a value or a combination of values
│   └── UnknownName          a name that is in no list; the nearest ones are offered
├── DataError                a dataset: its file, its entry, its records
├── CheckpointError          a checkpoint or a run folder
│   └── FolderBusy           a run folder that another process runs in
└── PreflightError           a run that would train nothing, or nonsense
"""

from collections.abc import Iterable


class GlmtunerError(Exception):
    """A mistake of the user's; the message is all they see."""


class ConfigError(GlmtunerError):
    """A key, a value, or values that cannot meet."""


class DataError(GlmtunerError):
    """A dataset that cannot be found, read or used."""


class CheckpointError(GlmtunerError):
    """A checkpoint or a run folder that cannot be used."""


class FolderBusy(CheckpointError):
    """A run folder that another process runs in."""


class PreflightError(GlmtunerError):
    """A run that would train nothing, or nonsense."""


class UnknownName(ConfigError):
    """A name that is in no list, with the nearest legal ones; long lists of legal names are cut."""

    SHOWN = 40

    def __init__(self, kind: str, name: str, known: Iterable[str], add_one: str = "") -> None:
        legal = sorted(known)
        more = f" and {len(legal) - self.SHOWN} more" if len(legal) > self.SHOWN else ""
        known = f"known: {', '.join(legal[: self.SHOWN])}{more}" if legal else ""
        message = f"no {kind} named {name!r}{did_you_mean(name, legal, known)}"
        if add_one:
            message += f"; add one: {add_one}"
        super().__init__(message)


def nearest(word: str, legal: Iterable[str], most_edits: int | None = None) -> list[str]:
    """The legal words with the fewest edits to `word`, all of them when they tie; none when even those are far.

    An edit inserts, drops, changes or swaps one character (optimal string alignment). Far means more than a third of
    the word's letters, and at least two.
    """
    from rapidfuzz.distance import OSA

    most = max(2, len(word) // 3) if most_edits is None else most_edits
    edits = {candidate: OSA.distance(word, candidate, score_cutoff=most) for candidate in legal}
    fewest = min(edits.values(), default=most + 1)
    return sorted(candidate for candidate, count in edits.items() if count == fewest) if fewest <= most else []


def did_you_mean(word: str, legal: Iterable[str], then: str = "") -> str:
    """`; did you mean 'x'? <then>`, naming every nearest word when several tie; `; <then>` when none is near."""
    near = nearest(word, legal)
    asked = f"; did you mean {' or '.join(repr(candidate) for candidate in near)}?" if near else ""
    return f"{asked}{' ' if near else '; '}{then}" if then else asked
