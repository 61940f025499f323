"""The options of the command line, which are Hydra's and a few of glmtuner's."""

import argparse
import re

from glmtuner.errors import ConfigError, did_you_mean, nearest

ROWS = 3  # that --preview shows of each dataset


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the remaining arguments, which are overrides; raises ConfigError for a misspelt option."""
    parser = option_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    try:
        options, rest = parser.parse_known_args(with_preview_count(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `python -m glmtuner --help` lists the options") from None
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("-") and nearest(name, flags):
            hint = did_you_mean(name, flags, "`python -m glmtuner --help` lists the options")
            raise ConfigError(f"unknown option {argument!r}{hint}")
    if options.preview is not None:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", options.preview):
            raise ConfigError(f"--preview {options.preview}: a number of rows, 1 or more; type --preview {ROWS}")
        options.preview = int(options.preview)
        other = next((flag for flag in ("multirun", "check", "cfg", "info") if getattr(options, flag)), None)
        if other:
            raise ConfigError(
                f"--preview with --{other}: --preview shows the rows of one run; leave one of the two out"
            )
    elif options.ids or (options.json and not options.check):
        flag = "--ids" if options.ids else "--json"
        also = ", or --check --json for a forecast" if flag == "--json" else ""
        raise ConfigError(
            f"{flag} without --preview: it is for the rows that --preview prints; type --preview {flag}{also}"
        )
    return options, rest


def option_parser() -> argparse.ArgumentParser:
    """The parser of the options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--help", "-h", action="store_true", help="groups, presets, options")
    parser.add_argument("--version", action="store_true", help="the version")
    parser.add_argument("--multirun", "-m", action="store_true", help="a sweep")
    parser.add_argument("--run", "-r", action="store_true", help="one run")
    parser.add_argument("--check", action="store_true", help="estimate memory, time and money, and start nothing")
    parser.add_argument("--preview", help="the first rows of each dataset")
    parser.add_argument("--json", action="store_true", help="with --check or --preview: as objects")
    parser.add_argument("--ids", action="store_true", help="with --preview: the token ids")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help="print the composed configuration")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: without interpolations")
    parser.add_argument("--package", "-p", help="with --cfg: one part of it")
    parser.add_argument("--info", "-i", nargs="?", const="all", help="why each file was composed")
    parser.add_argument("--config-dir", "-cd", help="a folder with more presets")
    parser.add_argument("--config-name", "-cn", default="config", help="the file to compose instead of config.yaml")
    parser.add_argument("--hydra-help", action="store_true", help="the help of Hydra")
    parser.add_argument("--shell-completion", "-sc", action="store_true", help="Hydra's own completion")
    return parser


def with_preview_count(arguments: list[str]) -> list[str]:
    """The arguments with the number of rows joined to --preview; where none follows it, the default."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--preview":
            number = re.fullmatch(r"[+-]?[0-9]+", argument)
            joined[-1] = f"--preview={argument if number else ROWS}"
            if number:
                continue
        joined.append(argument)
    if joined and joined[-1] == "--preview":
        joined[-1] = f"--preview={ROWS}"
    return joined


def hydra_flags(options: argparse.Namespace) -> list[str]:
    """The options that are passed on to Hydra's own command line."""
    flags = ["--cfg", options.cfg] if options.cfg else []
    flags += ["--resolve"] if options.resolve else []
    flags += ["--package", options.package] if options.package else []
    flags += ["--config-dir", options.config_dir] if options.config_dir else []
    return flags + (["--config-name", options.config_name] if options.config_name != "config" else [])
