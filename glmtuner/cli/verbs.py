"""What is done with a finished run: `python -m glmtuner <verb> RUN …`, one file a verb.

A verb's module has `HELP`, one line; `arguments(parser)`, its options; and `run(given, words)`, which does it and returns
the exit code. `words` are the key=value words behind the run, such as generation.temperature=0.2.
"""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.launch.register import register_presets

VERBS = ("chat", "export", "report", "serve", "show")


def run_verb(overrides: list[str]) -> int:
    """A verb, its run folders and options, and the key=value words that are composed over the run."""
    from importlib import import_module

    verb, *rest = overrides
    if verb not in VERBS:
        rule = f"a first word without '=' is a verb ({', '.join(VERBS)}), then a run folder; a run is started with key=value words"
        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS, rule)}")
    module = import_module(f"glmtuner.cli.{verb}")
    parser = _VerbParser(prog=f"python -m glmtuner {verb}", description=module.__doc__, allow_abbrev=False)
    module.arguments(parser)
    typed = [word for word in rest if not word.startswith("-") and "=" in word and not Path(word).exists()]
    given = parser.parse_args([word for word in rest if word not in typed])
    register_presets()
    return module.run(given, typed)


class _VerbParser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> None:
        raise ConfigError(
            f"{self.prog.rpartition(' ')[2]}: {message}; type {self.format_usage().removeprefix('usage: ').strip()}"
        )
