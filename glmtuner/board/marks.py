"""Which runs need to be looked at: those that write nothing any more, and those whose loss is no number."""

import math
from typing import Any

from glmtuner.board.records import Record
from glmtuner.console import duration

STALLED, DIVERGED, WAITS = "stalled", "diverged", "waits for memory"
PATIENCE = 10.0  # times the usual time between two signs of life
SHORTEST, BEFORE_FIRST = 60.0, 600.0  # seconds; a model is loaded and data are encoded before the first sign


class Marks:
    """Decides on the marks of running runs."""

    def of(self, record: Record, progress: dict[str, Any], now: float) -> tuple[str | None, str]:
        """The mark of a running run and the sentence that explains it; None and no sentence for one that is well."""
        loss = record.last.get("loss")
        if loss is not None and not math.isfinite(loss):
            return DIVERGED, f"its loss is not a number at step {record.last.get('step', 0):g}"
        silent = now - (record.updated or now)
        usual = usual_seconds(progress)
        if silent > (BEFORE_FIRST if usual is None else max(SHORTEST, PATIENCE * usual)):
            often = "" if usual is None else f"; a step takes {duration(usual)}"
            return STALLED, f"it runs, and has written nothing for {duration(silent)}{often}"
        return None, ""


def usual_seconds(progress: dict[str, Any]) -> float | None:
    """How long a step of the training takes, by its progress.json; None before its first step."""
    try:
        done, seconds = progress["step"] - progress["start_step"], float(progress["seconds"])
        return seconds / done if done > 0 else None
    except (KeyError, TypeError, ValueError):
        return None
