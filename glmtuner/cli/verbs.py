"""Verbs, which work on a finished run: `python -m glmtuner <verb> RUN …`, one file each.

A verb's module has `HELP`, its help line; `arguments(parser)`, which adds its options; and `run(arguments, overrides)`, which
executes it and returns the exit code. The overrides follow the run, such as generation.temperature=0.2. `NEEDS_PRESETS`, if it is
there, says that it works without the presets.
"""

import argparse
import os
from contextlib import nullcontext
from typing import NoReturn

from glmtuner.cli.streams import results_in_files
from glmtuner.errors import ConfigError, did_you_mean

VERBS = (
    "board",
    "chat",
    "completion",
    "diff",
    "doctor",
    "export",
    "keys",
    "prefetch",
    "report",
    "reproduce",
    "schema",
    "serve",
    "show",
    "status",
)
WRITING = (
    "board",
    "export",
    "prefetch",
    "report",
    "reproduce",
    "schema",
    "serve",
)  # they go on when nobody reads what they print
NO_FOLDERS = ("completion", "doctor", "keys", "prefetch", "schema")  # their words are no run folders
OVERRIDDEN = ("chat", "export", "prefetch", "reproduce", "serve")  # they take overrides


def run_verb(argv: list[str]) -> int:
    """Run a verb, given with its run folders, its options and the overrides for the run; returns the exit code."""
    from importlib import import_module

    verb, *rest = argv
    if verb not in VERBS:
        rule = f"the verbs are {', '.join(VERBS)}, most of them before a run folder; a run is started with overrides, key=value"
        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS, rule)}")
    module = import_module(f"glmtuner.cli.{verb}")
    parser = _VerbParser(prog=f"python -m glmtuner {verb}", description=module.__doc__, allow_abbrev=False)
    module.arguments(parser)
    overrides = [item for item in rest if not item.startswith("-") and "=" in item and not os.path.exists(item)]
    arguments = parser.parse_args([item for item in rest if item not in overrides])
    if getattr(module, "NEEDS_PRESETS", True):
        from glmtuner.launch.register import register_presets

        register_presets()
    with results_in_files() if verb in WRITING else nullcontext():
        return module.run(arguments, overrides)


class _VerbParser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise ConfigError(f"{self.prog.rpartition(' ')[2]}: {message}; type {usage}")
