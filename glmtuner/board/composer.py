"""A process that composes for a board: `python -m glmtuner.board.composer`, started by compose.py. It imports no torch.

Each line of standard input is a request, and is answered by a line, until the input is closed.
"""

import contextlib
import io
import json
import os
import re
import shlex
import time
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from glmtuner.board.form import BASIC, HYDRA_GROUPS, form
from glmtuner.board.places import inside, run_base, shown, sweep_base
from glmtuner.config.compose import Composed, combinations, compose, count_jobs, parse_and_check, presets, searched_dirs
from glmtuner.config.keys import TARGET, hydra_keys
from glmtuner.config.offline import adopt_offline
from glmtuner.config.overrides import bracket_lists, check_overrides, parse, quoted_value
from glmtuner.config.paths import conf_dir
from glmtuner.config.preset_files import preset_files
from glmtuner.console import plain
from glmtuner.data.splits import dataset_entries
from glmtuner.errors import ConfigError, GlmtunerError, did_you_mean
from glmtuner.launch.places import catalogue_dirs
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.redaction import flatten, redact_config

LIVE_SECONDS = 1.0  # of composing jobs of a sweep while its words are typed
MOST_JOBS = 64  # that are composed
MOST_OF_A_SWEEP = 10_000
OUTPUT_DIR, RUN_DIR, SWEEP_DIR = "trainer.output_dir", "hydra.run.dir", "hydra.sweep.dir"
HYDRA_PATHS = ("hydra.launcher.submitit_folder", "hydra.launcher.temp_folder")
STORAGE, PARAMETERS = "hydra.sweeper.storage", "hydra.launcher.additional_parameters"
SBATCH_PATHS = ("output", "error", "chdir", "wrap", "input", "batch")
SUBDIR = "${job_slug:${hydra.job.override_dirname}}"


def main() -> None:
    """Answer the requests of standard input until it is closed."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    register_presets()
    adopt_offline()
    for line in requests:
        request = json.loads(line)
        try:
            os.chdir(request.pop("cwd"))
            kind = request.pop("what")
            answer = form(**request) if kind == "form" else composed(**request)
        except GlmtunerError as error:
            answer = {"ok": False, "errors": [{"word": None, "message": plain(str(error))}]}
        except OSError as error:
            answer = {"ok": False, "errors": [{"word": None, "message": f"{error.filename}: {error.strerror}"}]}
        except Exception as error:  # whatever words can bring about in Hydra, in OmegaConf or in a plugin
            traceback.print_exc()
            message = plain(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            answer = {"ok": False, "errors": [{"word": None, "message": message}]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def composed(
    words: list[str], multirun: bool, config_dir: str | None, config_name: str, root: str, full: bool
) -> dict[str, Any]:
    """What the words describe.

    `ok`, `errors` as (word, message); and if there are none `command`, `yaml`, `keys`, `jobs`, how many of them were `composed`
    and `complete`, whether these were all, the `folder` that it is written to (None: one that the start names), the `name` of a
    run, the `add`itional words that put it into the board's folder, and `notes`.
    """
    flags = ["--config-dir", config_dir] if config_dir else []
    flags += ["--config-name", config_name] if config_name != "config" else []
    mode = ["-m"] if multirun else []
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "glmtuner", *flags, *mode, *words]),
        "plugins": any(word.lstrip("+~").startswith("plugins=") for word in words),
    }
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        errors = word_errors(words, config_dir, multirun)
        if not errors:
            try:
                if multirun:
                    about = sweep_of(words, config_dir, config_name, Path(root), full)
                else:
                    about = run_of(words, config_dir, config_name, Path(root))
                notes = [*about.pop("notes", []), *filter(None, said.getvalue().splitlines())]
                return {**found, "ok": True, "errors": [], **about, "notes": [plain(note) for note in notes]}
            except GlmtunerError as error:
                errors = attributed(str(error), words)
    return {**found, "ok": False, "errors": [{"word": word, "message": plain(message)} for word, message in errors]}


Errors = list[tuple[str | None, str]]


def word_errors(words: Sequence[str], config_dir: str | None, multirun: bool) -> Errors:
    """The errors that each word has by itself, so that all of them are told at once."""
    searched = searched_dirs(config_dir)
    found: Errors = []
    try:
        parse_and_check([word for word in words if word.partition("=")[0] == "plugins"], searched, multirun)
    except GlmtunerError as error:
        return [(next(word for word in words if word.startswith("plugins=")), str(error))]
    known = presets(searched)
    files = preset_files(searched)
    hydra = {key.name for key in hydra_keys(files, "en")}
    parts = {group: [BASIC, *(file.name for file in files if file.group == group)] for group in HYDRA_GROUPS}
    for word in words:
        try:
            parsed = parse(bracket_lists([word], multirun))
            check_overrides(parsed, known, multirun)
            check_hydra(parsed[0].key_or_group, word, hydra)
            check_parts(parsed[0], parts)
        except GlmtunerError as error:
            found.append((word, str(error)))
    return found


def check_hydra(key: str, word: str, known: set[str]) -> None:
    """Raise ConfigError for a key of Hydra's that the form does not have: many of them write files, or name code."""
    if key.partition(".")[0].partition("/")[0] != "hydra" or key in HYDRA_GROUPS or key in (RUN_DIR, SWEEP_DIR):
        return
    if key in HYDRA_PATHS or (key == STORAGE and "://" in word):
        raise ConfigError(
            f"{word}: the board writes into its own folder alone; leave it out, or type the command in a terminal"
        )
    parts = key.removeprefix(f"{PARAMETERS}.")
    if parts != key and parts.replace("-", "_") in SBATCH_PATHS:
        raise ConfigError(
            f"{word}: the launcher names the files of its jobs; leave it out, or type the command in a terminal"
        )
    if key not in known and parts == key:
        hint = did_you_mean(
            key, [*known, *HYDRA_GROUPS], "of Hydra's keys the board takes those of launchers and sweepers"
        )
        raise ConfigError(f"{word}: the board does not take {key}{hint}; type the command in a terminal")


def check_parts(override: Override, known: dict[str, list[str]]) -> None:
    """Raise ConfigError for a launcher, a sweeper or a part of one that there is no preset of."""
    group = override.key_or_group
    for name in str(override.value()).strip("[]").split(",") if group in known else ():
        if name.strip() not in known[group]:
            legal = f"legal: {', '.join(known[group])}"
            raise ConfigError(
                f"{group}={name}: no {group} preset of that name{did_you_mean(name, known[group], legal)}"
            )


def check_count(parsed: Sequence[Override]) -> None:
    """Raise ConfigError for more jobs than anybody can wait for, before they are listed in memory."""
    count = 1.0
    for override in parsed:
        value = override.value()
        if isinstance(value, ChoiceSweep):
            count *= max(len(value.list), 1)
        elif isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
            count *= max(abs((value.stop - value.start) / (value.step or 1)), 1)
    if count > MOST_OF_A_SWEEP:
        raise ConfigError(
            f"{count:.0f} jobs: the board takes sweeps of {MOST_OF_A_SWEEP} at most; type a search, or fewer values"
        )


def attributed(message: str, words: Sequence[str]) -> Errors:
    """The parts of an error's message with the word that each is about, None where none is named."""
    return [(_word_of(part, words), part) for part in message.split("; also: ")]


def _word_of(part: str, words: Sequence[str]) -> str | None:
    places = []
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        for rank, text in enumerate((word, f"{key}=", f"'{key}'", f"{key}:", f"{key} ")):
            if (at := part.find(text)) >= 0 and (at == 0 or (not part[at - 1].isalnum() and part[at - 1] not in "._/")):
                places.append((at, rank, -len(key), word))
                break
    if places:
        return min(places)[-1]
    for word in words:  # the message may name a value alone: no dataset named 'x'
        values = re.split(r"[\[\],{}\s]+", word.partition("=")[2].replace("'", "").replace('"', ""))
        if any(value and f"'{value}'" in part for value in values):
            return word
    return None


def run_of(words: Sequence[str], config_dir: str | None, config_name: str, root: Path) -> dict[str, Any]:
    """The run that the words describe."""
    made = compose(words, config_dir=config_dir, config_name=config_name)
    check_run(made)
    run, folder = made.run, None
    if run.trainer.output_dir:
        folder = inside(root, Path(run.trainer.output_dir), f"{OUTPUT_DIR}={run.trainer.output_dir}")
    elif RUN_DIR in made.user_keys:
        folder = inside(root, Path(str(made.hydra.run.dir)), f"{RUN_DIR}={made.hydra.run.dir}")
    name = run.name or f"{Path(run.model.model_name_or_path).name}_{run.finetuning.finetuning_type}"
    base = run_base(root, Path.cwd())
    place = folder if folder is not None else base / "<date>" / f"<time>_{name.replace('/', '_').replace(' ', '_')}"
    return {
        **_values(made.config), "jobs": 1, "composed": 1, "complete": True, "add": [], "notes": _notes(made),
        "folder": None if folder is None else str(folder), "place": shown(place, Path.cwd()),
        "name": "".join("_" if sign in "/ \\\0" else sign for sign in name)[:100],
        "overwrites": bool(run.trainer.overwrite_output_dir),
    }  # fmt: skip


def check_run(made: Composed) -> None:
    """Raise what a run raises before it loads anything: for datasets that are not known, say."""
    dataset_entries(made.run, catalogue_dirs(made))
    made.run.stage.check(made.run)


def sweep_of(words: Sequence[str], config_dir: str | None, config_name: str, root: Path, full: bool) -> dict[str, Any]:
    """The sweep that the words describe."""
    from glmtuner.sweep.folders import sweep_folder
    from glmtuner.sweep.forecast import check_not_swept
    from glmtuner.sweep.launchers import register
    from glmtuner.sweep.race_options import RACE_TARGET, check_race
    from glmtuner.sweep.search import OPTUNA_TARGET, check_sweeper
    from glmtuner.sweep.shared import register_shared

    register()
    register_shared()
    source = {"config_dir": config_dir, "config_name": config_name}
    normalized, parsed = parse_and_check(words, searched_dirs(config_dir), multirun=True)
    check_not_swept(normalized)
    check_count(parsed)
    jobs: list[Composed] = []
    until = time.monotonic() + LIVE_SECONDS
    for job in islice(combinations(normalized, config_dir=config_dir), MOST_JOBS):
        jobs.append(compose(job, config_dir=config_dir, config_name=config_name))
        check_run(jobs[-1])
        if not full and time.monotonic() > until:
            break
    first, target = jobs[0], jobs[0].hydra.sweeper._target_
    check_template(first.hydra)
    count = count_jobs(normalized, config_dir=config_dir)
    if target == RACE_TARGET:
        check_race(jobs)
    if full or target == OPTUNA_TARGET:
        check_sweeper(first, normalized, **source)  # type: ignore[arg-type]
    if target == OPTUNA_TARGET:
        count = int(first.hydra.sweeper.n_trials)
        if storage := first.hydra.sweeper.storage:
            inside(root, Path(str(storage)), f"{STORAGE}={storage}")
    typed = {override.key_or_group for override in parsed}
    folder, add = sweep_folder(normalized), list[str]()
    named = next((key for key in (SWEEP_DIR, OUTPUT_DIR, "name") if key in typed), None)
    base = sweep_base(root, Path.cwd())
    if named in (None, "name") and not (Path.cwd() / "outputs" / "sweeps").resolve().is_relative_to(root):
        folder = base / folder.relative_to(Path("outputs") / "sweeps")
        add = [f"{SWEEP_DIR}={quoted_value(shown(folder, Path.cwd()))}"]
    place = inside(root, folder, f"{named}={folder}" if named else str(folder))
    if place == base.resolve():
        raise ConfigError(
            f"{named}={'' if named == 'name' else folder}: it is the folder of all sweeps; type a name for this one"
        )
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    notes = _notes(first)
    if target != OPTUNA_TARGET and not swept:
        notes.append("no key has several values: a sweep of one job")
    return {
        **_values(first.config), "jobs": count, "composed": len(jobs), "add": add, "notes": notes, "swept": swept,
        "complete": len(jobs) == min(count, MOST_JOBS), "folder": str(place), "place": shown(place, Path.cwd()), "name": place.name,
        "overwrites": any(job.run.trainer.overwrite_output_dir for job in jobs),
        "launcher": str(first.hydra.runtime.choices.get("hydra/launcher")),
    }  # fmt: skip


def check_template(hydra: DictConfig) -> None:
    """Raise ConfigError where files of the user's put the jobs of a sweep elsewhere, or name classes of their own."""
    raw = OmegaConf.to_container(hydra, resolve=False)
    assert isinstance(raw, dict)
    if raw["sweep"]["subdir"] != SUBDIR or raw["output_subdir"] is not None or raw["callbacks"]:
        raise ConfigError(
            "hydra.sweep.subdir, hydra.output_subdir or hydra.callbacks are not those of conf/config.yaml: the board does not know what "
            "such a sweep writes; type the command in a terminal"
        )
    shipped = {file.values[TARGET] for file in preset_files([conf_dir()]) if TARGET in file.values}
    parts = {"hydra/launcher": raw["launcher"], "hydra/sweeper": raw["sweeper"]}
    parts |= {f"hydra/sweeper/{name}": raw["sweeper"].get(name) for name in ("sampler", "pruner")}
    for name, part in parts.items():
        target = str((part or {}).get(TARGET) or "")
        if target and target not in shipped and not target.startswith("hydra._internal.core_plugins."):
            raise ConfigError(
                f"{name}: {target} is a class that glmtuner does not ship; type the command in a terminal"
            )


def _values(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration without secrets, as YAML and by dotted keys."""
    public = redact_config(config)
    return {"yaml": plain(OmegaConf.to_yaml(public)), "keys": flatten(OmegaConf.to_container(public))}


def _notes(made: Composed) -> list[str]:
    """What whoever starts this should know."""
    notes = []
    if made.run.plugins:
        notes.append(f"plugins=[{','.join(made.run.plugins)}] executes the code of these modules, here and in the run")
    if made.hydra.launcher.get("setup"):
        notes.append("hydra.launcher.setup executes these shell lines in every job")
    if made.run.trainer.push_to_hub:
        notes.append("trainer.push_to_hub=true uploads the result")
    return notes


if __name__ == "__main__":
    main()
