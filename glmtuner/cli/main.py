"""`python -m glmtuner …`: arguments in, exit code out; the only place that turns GlmtunerErrors into messages.

0 done; 2 the user's mistake; 1 a crash, a rank that has gone, or a sweep with failed jobs; 130 Ctrl-C; 140 and 143 a run that
SIGUSR2 or SIGTERM stopped, with a checkpoint.
"""

import argparse
import errno
import os
import re
import select
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from glmtuner import __version__
from glmtuner.cli.options import hydra_flags, parse_options
from glmtuner.cli.streams import ReaderGone, results_in_files
from glmtuner.config.offline import adopt_offline
from glmtuner.console import complain, end_live_region, plain
from glmtuner.distributed import heartbeat, ranks
from glmtuner.distributed.preemption import Preempted
from glmtuner.errors import ConfigError, GlmtunerError, RankLost

SIGPIPE = 13  # signal.SIGPIPE, which Windows does not have


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        ranks.adopt_slurm_env()
        check_encodable(arguments)
        if arguments[:1] != ["doctor"]:  # which says what is wrong with the folder
            adopt_offline()
        try:
            return run_command(arguments)
        finally:
            end_live_region()
    except GlmtunerError as error:
        if ranks.should_report(error):
            complain(f"glmtuner: {error}")
        return 1 if isinstance(error, RankLost) else 2
    except ranks.RankFailed as failed:
        if failed.code not in (1, 2):  # otherwise the rank has reported its error
            complain(f"glmtuner: {failed}; the same command with the same trainer.output_dir resumes")
        return 2 if failed.code == 2 else 1
    except ReaderGone:
        return 128 + SIGPIPE
    except BrokenPipeError:
        if not stdout_closed():
            raise
        return 128 + SIGPIPE
    except Exception as error:
        problem = system_problem(error)
        if problem is None:
            raise
        message, code = problem
        complain(f"glmtuner: {message}")
        return code
    except Preempted as stopped:
        if ranks.is_main() and not ranks.is_started_by_glmtuner():
            complain(f"glmtuner: {stopped}; the same command with the same trainer.output_dir resumes")
        with suppress(RuntimeError):  # another rank has gone
            ranks.destroy_process_group()  # its threads would abort the process at its end, and hide the exit code
        stopped.call_previous_handler()
        return stopped.exit_code
    except KeyboardInterrupt:
        heartbeat.leave("stopped by Ctrl-C")
        if ranks.is_main() and not ranks.is_started_by_glmtuner():
            complain("glmtuner: stopped; the same command with the same trainer.output_dir resumes")
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


def check_encodable(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument, or a current folder, that no file of a run can name: what is not UTF-8."""
    for argument in arguments:
        if not is_encodable(argument):
            raise ConfigError(
                f"{plain(argument)}: the argument is not valid UTF-8; rename the file, or type it in UTF-8"
            )
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder has been removed; change to another one") from None
    if not is_encodable(folder):
        raise ConfigError(f"{plain(folder)}: the name of the current folder is not valid UTF-8; change to another one")
    variable = "GLMTUNER_CACHE" if os.environ.get("GLMTUNER_CACHE") else "HOME"
    if not is_encodable(cache := os.environ.get(variable, "")):
        raise ConfigError(f"{variable}={plain(cache)} is not valid UTF-8; set GLMTUNER_CACHE to a folder that is")


def is_encodable(text: str) -> bool:
    """Whether the text holds no lone surrogate, by which Python represents bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
BAD_PATH = (  # of a file that the user named, or below a folder that the user named
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY,
)  # fmt: skip
FAILED_SYSTEM = {errno.EMFILE: "close some files, or raise `ulimit -n`", errno.ENFILE: "close some files of other programs",
                 errno.EIO: "check the disk", errno.EFBIG: "check `ulimit -f`"}  # fmt: skip


def system_problem(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code for an error of the operating system that is no fault of glmtuner's; None for others."""
    again = "type the same command again"
    if out_of_space(error):
        return f"the disk is full ({error}); free some space and {again}", 1
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors and tokenizers report it
    number = error.errno if isinstance(error, OSError) else int(in_rust.group(1)) if in_rust else None
    if number is None:
        return None
    reason = os.strerror(number).lower()
    filename = getattr(error, "filename", None)
    name = plain(os.fsdecode(filename)) if isinstance(filename, (str, bytes)) else ""
    if number in FAILED_SYSTEM:
        return f"{name or 'a file'}: {reason}; {FAILED_SYSTEM[number]}, and {again}", 1
    if number in BAD_PATH and name:
        return f"{name}: {reason}; check the path and its permissions, or name another one", 2
    if number == errno.ENOENT and name and os.path.dirname(name) and not os.path.exists(os.path.dirname(name)):
        return f"{name}: the folder has been removed meanwhile; {again}", 1
    return None


def out_of_space(error: Exception) -> bool:
    """Whether a write failed because the disk or the user's quota is full."""
    if (isinstance(error, OSError) and error.errno in FULL_DISK) or os.strerror(errno.ENOSPC) in str(error):
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
    if options.preview is not None:
        return show_rows(options, rest)
    multirun = options.multirun or any(argument.replace(" ", "").lower() == "hydra.mode=multirun" for argument in rest)
    if options.hydra_help or options.shell_completion or options.info:
        return hydra_main(arguments)
    if options.cfg:
        return show_config(options, rest)
    if multirun:
        with nullcontext() if options.check else results_in_files("the sweep goes on"):
            return sweep(options, rest)
    from glmtuner.config.compose import compose

    composed = compose(rest, config_dir=options.config_dir, config_name=options.config_name)
    if options.check:
        from glmtuner.launch.forecast.check import check_run

        check_run(composed, as_json=options.json)
        return 0
    from glmtuner.launch.run import launch

    with results_in_files("the run goes on"):
        launch(composed)
    ranks.destroy_process_group()
    return 0


def sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the sweep, or with --check forecast it; returns the exit code."""
    from glmtuner.sweep.multirun import run_sweep

    source = {"config_dir": options.config_dir, "config_name": options.config_name}
    return run_sweep(overrides, hydra_flags(options), **source, check=options.check, as_json=options.json)


def show_rows(options: argparse.Namespace, overrides: list[str]) -> int:
    """Print the first rows of each dataset; returns the exit code."""
    from glmtuner.cli.preview import preview
    from glmtuner.config.compose import compose

    if any(override.replace(" ", "").lower() == "hydra.mode=multirun" for override in overrides):
        raise ConfigError(
            "--preview with hydra.mode=MULTIRUN: --preview shows the rows of one run; leave one of the two out"
        )
    composed = compose(overrides, config_dir=options.config_dir, config_name=options.config_name)
    preview(composed, options.preview, as_json=options.json, with_ids=options.ids)
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
        print(plain(OmegaConf.to_yaml(part)), end="")
        return 0
    normalized, _ = parse_and_check(overrides, searched_dirs(options.config_dir), multirun=False)
    return hydra_main([*hydra_flags(options), *normalized])
