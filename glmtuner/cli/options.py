"""The options of the command line, which are Hydra's and a few of glmtuner's."""

import argparse

from glmtuner.errors import ConfigError, did_you_mean, nearest


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the remaining arguments, which are overrides; raises ConfigError for a misspelt option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="config")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    flags = [flag for action in parser._actions for flag in action.option_strings]
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `python -m glmtuner --help` lists the options") from None
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("-") and nearest(name, flags):
            hint = did_you_mean(name, flags, "`python -m glmtuner --help` lists the options")
            raise ConfigError(f"unknown option {argument!r}{hint}")
    return options, rest


def hydra_flags(options: argparse.Namespace) -> list[str]:
    """The options that are passed on to Hydra's own command line."""
    flags = ["--cfg", options.cfg] if options.cfg else []
    flags += ["--resolve"] if options.resolve else []
    flags += ["--package", options.package] if options.package else []
    flags += ["--config-dir", options.config_dir] if options.config_dir else []
    return flags + (["--config-name", options.config_name] if options.config_name != "config" else [])
