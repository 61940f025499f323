"""`python -m glmtuner …`: words in, exit code out; the only place that turns our errors into messages.

0 done; 2 the user's mistake; 1 a crash, or a sweep with failed jobs; 130 Ctrl-C; 140 and 143 a run that SIGUSR2 or SIGTERM
stopped, with a checkpoint.
"""

import argparse
import errno
import os
import select
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner import __version__, ranks
from glmtuner.errors import ConfigError, GlmtunerError, did_you_mean, nearest
from glmtuner.preemption import Preempted

if TYPE_CHECKING:
    from glmtuner.config.compose import Composed
    from glmtuner.config.schema import Tracker

EXAMPLES = """\
  python -m glmtuner experiment=quickstart                          one minute, offline, on the model that ships
  python -m glmtuner finetuning=freeze data.dataset=alpaca_zh,belle one run on the mix of two datasets
  python -m glmtuner model=causal_lm model.model_name_or_path=Qwen/Qwen3-0.6B data.dataset=my.jsonl trainer.bf16=true
  python -m glmtuner trainer=predict model.checkpoint_dir=outputs/<date>/<run> data.dataset=identity_sample
  python -m glmtuner -m finetuning=lora,freeze,p_tuning trainer.learning_rate=1e-3,5e-4   a sweep of six runs
"""
MEANINGS = {
    "model": "which pretrained model",
    "quant": "how its frozen weights are stored",
    "data": "which records, and how they become tokens",
    "finetuning": "which weights are trained",
    "stage": "what is learned",
    "trainer": "train, evaluate or predict; every field of transformers' Seq2SeqTrainingArguments",
    "metric": "how answers are scored",
    "generation": "how chat decodes",
    "tracker": "where the numbers go besides the run folder",
    "kernels": "what computes a block besides torch's own kernels",
    "parallel": "how many processes train one run, and what each holds",
    "experiment": "whole recipes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    ranks.settle()
    try:
        return _main(words)
    except GlmtunerError as error:
        if ranks.has_a_word_of_its_own(error):
            print(f"glmtuner: {error}", file=sys.stderr)
        return 2
    except ranks.RankFailed as failed:
        if failed.code not in (1, 2):  # otherwise it has told why
            print(f"glmtuner: {failed}; the same command with the same trainer.output_dir goes on", file=sys.stderr)
        return 2 if failed.code == 2 else 1
    except BrokenPipeError:
        if not nobody_listens():
            raise
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not out_of_space(error):
            raise
        print(f"glmtuner: the disk is full ({error}); free some space and type the same command again", file=sys.stderr)
        return 1
    except Preempted as stopped:
        if ranks.is_main() and not ranks.is_child():
            print(f"glmtuner: {stopped}; the same command with the same trainer.output_dir goes on", file=sys.stderr)
        stopped.hand_on()
        return stopped.exit_code
    except KeyboardInterrupt:
        if ranks.is_main() and not ranks.is_child():
            print("glmtuner: stopped; the same command with the same trainer.output_dir goes on", file=sys.stderr)
        return 130


def nobody_listens() -> bool:
    """Whether who reads standard output has gone, as `head` does; Python then closes it without a word."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(events & select.POLLERR for _, events in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def out_of_space(error: Exception) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if (isinstance(error, OSError) and error.errno in full) or os.strerror(errno.ENOSPC) in str(error):
        return True
    # torch.save tells no errno: its writer finds the file shorter than what it wrote
    return isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "PytorchStreamWriter" in str(error))


def _main(words: list[str]) -> int:
    if words and not words[0].startswith(("-", "~", "+")) and "=" not in words[0]:
        return _verb(words)
    options, rest = _options(words)
    if options.help:
        print(help_text(options.config_dir))
        return 0
    if options.version:
        print(f"glmtuner {__version__}")
        return 0
    _register()
    multirun = options.multirun or any(word.replace(" ", "").lower() == "hydra.mode=multirun" for word in rest)
    if options.hydra_help or options.shell_completion or options.info:
        return _hydra(words)
    if options.cfg:
        return _show_config(options, rest)
    if multirun:
        return _sweep(options, rest)
    from glmtuner.config.compose import compose

    composed = compose(rest, config_dir=options.config_dir, config_name=options.config_name)
    if options.check:
        return _check(composed)
    from glmtuner.launch import launch

    launch(composed)
    ranks.leave()
    return 0


def _check(composed: "Composed") -> int:
    from glmtuner.launch import check

    check(composed)
    return 0


def _register() -> None:
    """Make every method, stage, metric, model family, quantization, tracker and way of several processes known."""
    import glmtuner.families
    import glmtuner.finetuning
    import glmtuner.metrics
    import glmtuner.parallel
    import glmtuner.quant
    import glmtuner.stages
    import glmtuner.trackers  # noqa: F401


def _options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's options that glmtuner knows, and the remaining words."""
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
        options, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `python -m glmtuner --help` lists the options") from None
    for word in rest:
        if word.startswith("-") and nearest(word.partition("=")[0], flags):
            hint = did_you_mean(word.partition("=")[0], flags, "`python -m glmtuner --help` lists the options")
            raise ConfigError(f"unknown option {word!r}{hint}")
    return options, rest


def _show_config(options: argparse.Namespace, words: list[str]) -> int:
    """`--cfg job`: the composed run; with --resolve its interpolations filled in, with --package one part of it."""
    from omegaconf import OmegaConf

    from glmtuner.config.compose import check, searched_dirs
    from glmtuner.config.overrides import bracket_lists

    if options.cfg != "job":
        return _hydra([*_flags(options), *bracket_lists(words, multirun=False)])
    if options.resolve:
        from glmtuner.config.compose import compose

        config = compose(words, config_dir=options.config_dir, config_name=options.config_name).config
        part = OmegaConf.select(config, options.package) if options.package else config
        print(OmegaConf.to_yaml(part), end="")
        return 0
    settled, _ = check(words, searched_dirs(options.config_dir), multirun=False)
    return _hydra([*_flags(options), *settled])


def _flags(options: argparse.Namespace) -> list[str]:
    flags = ["--cfg", options.cfg] if options.cfg else []
    flags += ["--resolve"] if options.resolve else []
    flags += ["--package", options.package] if options.package else []
    flags += ["--config-dir", options.config_dir] if options.config_dir else []
    return flags + (["--config-name", options.config_name] if options.config_name != "config" else [])


def _hydra(words: list[str], task: object = None) -> int:
    """Hydra's own command line on these words; its errors become ConfigErrors."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from glmtuner.config.explain import explain
    from glmtuner.config.paths import conf_dir

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of being printed
    typed, sys.argv = sys.argv, ["glmtuner", *words]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
            task or (lambda config: None)
        )()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    finally:
        sys.argv = typed
    return 0


def _sweep(options: argparse.Namespace, words: list[str]) -> int:
    """Every job of the sweep, one folder a job; nothing runs before every combination was composed and validated.

    Started again, it skips what is finished, continues what is half done and tries again what failed.
    """
    from glmtuner.config.compose import check_sweep, first_job
    from glmtuner.console import say
    from glmtuner.launch import check_elsewhere
    from glmtuner.launchers import register
    from glmtuner.report.jobs import State, read_jobs
    from glmtuner.sweep import note_sweep, run_job, sweep_folder, sweep_words

    words = [word for word in words if word.replace(" ", "").lower() != "hydra.mode=multirun"]
    register()
    settled = check_sweep(words, config_dir=options.config_dir, config_name=options.config_name)
    first = partial(first_job, settled, config_dir=options.config_dir, config_name=options.config_name)
    if options.check:
        return _check(first())
    if "hydra/launcher=slurm" in settled and shutil.which("sbatch"):
        check_elsewhere(first())
    root = sweep_folder(settled)
    note_sweep(root, words)
    crash = None
    try:
        _hydra(["--multirun", *_flags(options), *sweep_words(settled)], run_job)
    except ConfigError:
        raise
    except Exception as error:  # such as Optuna's, when no trial of a search came to an end
        crash = error
    finally:
        (root / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of the words, keys and tokens among them
    jobs = read_jobs(root)  # judged by the folders alone, whoever ran the jobs
    count = Counter(job.state for job in jobs)
    if crash is not None and count[State.finished] == len(jobs):
        raise crash
    failed = [job for job in jobs if job.state in (State.failed, State.unfinished, State.running)]
    for job in failed:
        reason = {State.unfinished: "cut off before its end", State.running: "still running"}.get(job.state, job.reason)
        print(f"glmtuner: a job of the sweep failed: {job.name}: {reason[:300]}", file=sys.stderr)
    _report(root, lambda: first().run.tracker)
    say(
        f"sweep folder: {root} ({count[State.finished]} finished, {count[State.infeasible]} did not fit into memory, "
        f"{len(failed)} failed)"
    )
    if failed:
        print("glmtuner: the same command tries the failed ones again and skips the finished ones", file=sys.stderr)
    return 1 if failed else 0


def _report(sweep: Path, tracker: "Callable[[], Tracker]") -> None:
    """Write, show and publish the sweep's report; what goes wrong with it is told in a line and changes nothing else."""
    from glmtuner.console import say
    from glmtuner.report import report

    try:
        report(sweep)
        if closing := tracker().publish(sweep):
            say(closing)
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"glmtuner: the report was not written ({told}); python -m glmtuner report {sweep}", file=sys.stderr)


def _verb(words: list[str]) -> int:
    """A verb, its run folders and options, and the key=value words that are composed over the run."""
    from importlib import import_module

    from glmtuner.verbs import VERBS

    verb, *rest = words
    if verb not in VERBS:
        rule = f"a first word without '=' is a verb ({', '.join(VERBS)}), then a run folder; a run is started with key=value words"
        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS, rule)}")
    module = import_module(f"glmtuner.verbs.{verb}")
    parser = _VerbParser(prog=f"python -m glmtuner {verb}", description=module.__doc__, allow_abbrev=False)
    module.arguments(parser)
    typed = [word for word in rest if not word.startswith("-") and "=" in word and not Path(word).exists()]
    given = parser.parse_args([word for word in rest if word not in typed])
    _register()
    return module.run(given, typed)


class _VerbParser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> None:
        raise ConfigError(
            f"{self.prog.rpartition(' ')[2]}: {message}; type {self.format_usage().removeprefix('usage: ').strip()}"
        )


def help_text(config_dir: str | None = None) -> str:
    """The groups, what they mean, their presets, and five examples."""
    from glmtuner.config.compose import presets, searched_dirs

    found = presets(searched_dirs(config_dir))
    width = max(map(len, found))
    lines = [
        "glmtuner fine-tunes ChatGLM, GLM and other causal language models from composed YAML.",
        "",
        "  python -m glmtuner [options] group=preset group.key=value …     one run",
        "  python -m glmtuner -m group=a,b group.key=1,2 …                 a sweep: every combination",
        *(f"  {f'python -m glmtuner {verb} RUN …':<64}{line}" for verb, line in _verbs()),
        "",
        "Groups (the default preset comes first):",
    ]
    defaults = _default_presets()
    for group in [*MEANINGS, *sorted(found.keys() - MEANINGS.keys())]:
        names = found.get(group, [])
        default = defaults.get(group)
        names = [default, *(name for name in names if name != default)] if default else names
        lines += [f"  {group:<{width}}  {MEANINGS.get(group, '')}", f"  {'':<{width}}  {', '.join(names)}"]
    lines += [
        "",
        "A comma means 'and' in a run (data.dataset=a,b trains on both) and 'each' in a sweep; brackets always mean 'and'.",
        "",
        "Examples:",
        EXAMPLES,
        "Options:",
        "  --cfg job --resolve     show the composed run and stop      --package GROUP   only one part of it",
        "  --info defaults-tree    why each file was composed          --config-dir DIR  more presets, in DIR/<group>/",
        "  --check                 what memory a training will take: no weights or data are loaded, nothing is written",
        "  -m, --multirun          a sweep                             --version, --hydra-help",
    ]
    return "\n".join(lines)


def _verbs() -> list[tuple[str, str]]:
    """Every verb and what it does."""
    from importlib import import_module

    from glmtuner.verbs import VERBS

    return [(verb, import_module(f"glmtuner.verbs.{verb}").HELP) for verb in VERBS]


def _default_presets() -> dict[str, str]:
    import yaml

    from glmtuner.config.paths import conf_dir

    listed = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = {group: name for entry in listed if isinstance(entry, dict) for group, name in entry.items()}
    return {group: name for group, name in pairs.items() if name and not group.startswith("override")}


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
