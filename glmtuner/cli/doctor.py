"""`doctor`: what this machine can do, in ten lines, and what to install for what is missing."""

import argparse

from glmtuner.errors import ConfigError

HELP = "what this machine can do, and what to install"
TAKES = ""  # in the help
NEEDS_PRESETS = False  # it must work where their libraries do not


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object, with the numbers")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import json

    from glmtuner.console import say
    from glmtuner.launch.doctor.diagnose import diagnose, lines, wrapped

    if overrides:
        raise ConfigError(
            f"{overrides[0]}: doctor looks at the machine and takes no overrides; type python -m glmtuner doctor"
        )
    findings = diagnose()
    ends_well = not any(each.stops_runs for each in findings)
    if arguments.json:
        named = [
            {
                "subject": each.subject,
                "state": each.state,
                "text": each.text,
                "type": each.fix,
                "facts": dict(each.facts),
            }
            for each in findings
        ]
        say(json.dumps({"ok": ends_well, "findings": named}, ensure_ascii=False, default=str))
    else:
        for line in lines(findings):
            say(wrapped(line))
    return 0 if ends_well else 1
