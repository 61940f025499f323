"""`python -m glmtuner …`: arguments in, exit code out; the only place that turns GlmtunerErrors into messages.

0 done; 2 the user's mistake; 1 a crash, or a sweep with failed jobs; 130 Ctrl-C; 140 and 143 a run that SIGUSR2 or SIGTERM
stopped, with a checkpoint.
"""

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence

from glmtuner import __version__
from glmtuner.cli.options import hydra_flags, parse_options
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import Preempted
from glmtuner.errors import GlmtunerError

SIGPIPE = 13  # signal.SIGPIPE, which Windows does not have


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ranks.adopt_slurm_env()
    try:
        return run_command(arguments)
    except GlmtunerError as error:
        if ranks.should_report(error):
            print(f"glmtuner: {error}", file=sys.stderr)
        return 2
    except ranks.RankFailed as failed:
        if failed.code not in (1, 2):  # otherwise the rank has reported its error
            print(f"glmtuner: {failed}; the same command with the same trainer.output_dir resumes", file=sys.stderr)
        return 2 if failed.code == 2 else 1
    except BrokenPipeError:
        if not stdout_closed():
            raise
        return 128 + SIGPIPE
    except Exception as error:
        if not out_of_space(error):
            raise
        print(f"glmtuner: the disk is full ({error}); free some space and type the same command again", file=sys.stderr)
        return 1
    except Preempted as stopped:
        if ranks.is_main() and not ranks.is_started_by_glmtuner():
            print(f"glmtuner: {stopped}; the same command with the same trainer.output_dir resumes", file=sys.stderr)
        stopped.call_previous_handler()
        return stopped.exit_code
    except KeyboardInterrupt:
        if ranks.is_main() and not ranks.is_started_by_glmtuner():
            print("glmtuner: stopped; the same command with the same trainer.output_dir resumes", file=sys.stderr)
        return 130


def stdout_closed() -> bool:
    """Whether the reader of standard output has closed the pipe, as `head` does; further output is then discarded."""
    if hasattr(select, "poll"):
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        is_closed = any(events & select.POLLERR for _, events in output.poll(0))
    else:  # Windows
        try:
            print(flush=True)
            is_closed = False
        except OSError:
            is_closed = True
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
    return is_closed


def out_of_space(error: Exception) -> bool:
    """Whether a write failed because the disk or the user's quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if (isinstance(error, OSError) and error.errno in full) or os.strerror(errno.ENOSPC) in str(error):
        return True
    # torch.save raises no errno: its writer only sees that the file is shorter than what it wrote
    return isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "PytorchStreamWriter" in str(error))


def run_command(arguments: list[str]) -> int:
    """Run a verb, an option that prints something, a sweep or a run; returns the exit code."""
    if arguments and not arguments[0].startswith(("-", "~", "+")) and "=" not in arguments[0]:
        from glmtuner.cli.verbs import run_verb

        return run_verb(arguments)
    options, rest = parse_options(arguments)
    if options.help:
        from glmtuner.cli.help import help_text

        print(help_text(options.config_dir))
        return 0
    if options.version:
        print(f"glmtuner {__version__}")
        return 0
    from glmtuner.config.hydra_main import hydra_main
    from glmtuner.launch.register import register_presets

    register_presets()
    multirun = options.multirun or any(argument.replace(" ", "").lower() == "hydra.mode=multirun" for argument in rest)
    if options.hydra_help or options.shell_completion or options.info:
        return hydra_main(arguments)
    if options.cfg:
        return show_config(options, rest)
    if multirun:
        from glmtuner.sweep.multirun import run_sweep

        source = {"config_dir": options.config_dir, "config_name": options.config_name}
        return run_sweep(rest, hydra_flags(options), **source, check=options.check)
    from glmtuner.config.compose import compose

    composed = compose(rest, config_dir=options.config_dir, config_name=options.config_name)
    if options.check:
        from glmtuner.launch.memory_check import report_memory

        report_memory(composed)
        return 0
    from glmtuner.launch.run import launch

    launch(composed)
    ranks.destroy_process_group()
    return 0


def show_config(options: argparse.Namespace, overrides: list[str]) -> int:
    """Print the composed run (`--cfg job`), with --resolve without interpolations, with --package one part of it."""
    from omegaconf import OmegaConf

    from glmtuner.config.compose import parse_and_check, searched_dirs
    from glmtuner.config.hydra_main import hydra_main
    from glmtuner.config.overrides import bracket_lists

    if options.cfg != "job":
        return hydra_main([*hydra_flags(options), *bracket_lists(overrides, multirun=False)])
    if options.resolve:
        from glmtuner.config.compose import compose

        config = compose(overrides, config_dir=options.config_dir, config_name=options.config_name).config
        part = OmegaConf.select(config, options.package) if options.package else config
        print(OmegaConf.to_yaml(part), end="")
        return 0
    normalized, _ = parse_and_check(overrides, searched_dirs(options.config_dir), multirun=False)
    return hydra_main([*hydra_flags(options), *normalized])
