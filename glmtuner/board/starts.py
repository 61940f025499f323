"""Starting runs and sweeps, continuing them, and their words for the form."""

import os
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from glmtuner.board.begun import Task, Tasks
from glmtuner.board.compose import Composer
from glmtuner.board.places import inside, reserve, run_base, shown
from glmtuner.board.processes import child_command, holder, sweep_command, sweep_command_above
from glmtuner.board.root import Root
from glmtuner.config.overrides import parse, quoted_value
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.report.race import readable_race
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import LOCK, OUTPUT, OVERRIDES, SWEEP
from glmtuner.run_folder.redaction import HIDDEN, redact_overrides
from glmtuner.sweep.submissions import read_submissions

PLACES = ("trainer.output_dir", "hydra.run.dir", "hydra.sweep.dir")  # keys that say where a run or a sweep is
OPTIONS = {"--config-dir": "config_dir", "-cd": "config_dir", "--config-name": "config_name", "-cn": "config_name"}
CODE = (
    "hydra.launcher.setup", "hydra.launcher.srun_args", "hydra.launcher.additional_parameters", "hydra.launcher.runtime_env",
    "hydra.launcher.address",
)  # fmt: skip
SLURM = ("hydra/launcher=slurm", "hydra.launcher.wait=false")


@dataclass
class Words:
    """A command: its overrides, its options, whether it is a sweep, the folder that it is typed in, and what was left out of it."""

    words: list[str]
    multirun: bool = False
    config_dir: str | None = None
    config_name: str = "config"
    cwd: Path | None = None
    notes: list[str] = field(default_factory=list)

    def arguments(self) -> list[str]:
        """What stands behind `python -m glmtuner`."""
        options = ["--config-dir", self.config_dir] if self.config_dir else []
        options += ["--config-name", self.config_name] if self.config_name != "config" else []
        return [*options, *(["-m"] if self.multirun else []), *self.words]

    def record(self) -> dict[str, Any]:
        """What the form takes."""
        names = ("words", "multirun", "config_dir", "config_name", "notes")
        return {name: getattr(self, name) for name in names}


class Starts:
    """Starts what was composed, in the folder `cwd`; nothing is started twice in one folder."""

    def __init__(self, root: Root, cwd: Path, composer: Composer, tasks: Tasks) -> None:
        self.root, self.cwd, self.composer, self.tasks = root, cwd, composer, tasks
        self.lock = threading.Lock()

    def check(self, asked: Words) -> Task:
        """Forecast the run or the sweep (`--check`) in a child."""
        self._composed(asked)
        return self.tasks.child("check", child_command("--check", *asked.arguments()), asked.cwd or self.cwd)

    def start(self, asked: Words, launcher: str | None = None) -> tuple[str | None, Task]:
        """Start the run or the sweep; its id, and the task. Raises ConfigError for the first error in the words.

        `launcher` is slurm to submit it as a sweep of SLURM's, of one job if nothing is swept.
        """
        if launcher not in (None, "slurm"):
            raise ConfigError(
                f"launcher={launcher}: legal is slurm; type hydra/launcher={launcher} among the words for the others"
            )
        if launcher:
            kept = [
                word for word in asked.words if word.partition("=")[0] not in ("hydra/launcher", "hydra.launcher.wait")
            ]
            asked = Words([*kept, *SLURM], True, asked.config_dir, asked.config_name, asked.cwd)
        found = self._composed(asked)
        cwd = asked.cwd or self.cwd
        with self.lock:
            if found["folder"] is None:
                folder, is_new = reserve(run_base(self.root.path, cwd), found["name"]), True
            else:
                folder = inside(self.root.path, Path(found["folder"]), found["place"])
                self._refuse_busy(folder, asked.multirun)
                if found["overwrites"] and folder.exists():
                    raise ConfigError(
                        f"trainer.overwrite_output_dir=true removes what is in {found['place']}: delete it, which moves it to the trash, "
                        "and start again without this word"
                    )
                is_new = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
            added = list(found["add"])
            if not asked.multirun and not any(word.startswith("trainer.output_dir=") for word in asked.words):
                added.append(f"trainer.output_dir={quoted_value(shown(folder, cwd))}")
            return self._begin(
                "start",
                Words([*asked.words, *added], asked.multirun, asked.config_dir, asked.config_name, cwd),
                folder,
                is_new,
            )

    def resume(self, name: str, trust: bool) -> tuple[str, Task]:
        """The recorded command of a run or a sweep again, in its folder; the same as typing it in the folder that it was typed in.

        Raises CheckpointError where it cannot be, and unless `trust` for one that names code: the folder may be a stranger's.
        """
        folder, asked = self.recorded(name)
        if not asked.multirun and (folder.parent / SWEEP).is_file():
            self._refuse_job(folder.parent, name)
        if hidden := [word for word in asked.words if HIDDEN in word]:
            raise CheckpointError(
                f"{name}: {hidden[0].partition('=')[0]} was a secret, which is stored nowhere; type its command in a terminal: {command_of(asked)}"
            )
        if not trust and (code := code_in(asked)):  # before it is composed, which imports plugins
            raise CheckpointError(
                f"{name}: its command has {code}, which can execute code; continue it only if you trust it"
            )
        found = self._composed(asked)
        if (where := found["folder"]) is not None and Path(where) != folder:
            raise CheckpointError(
                f"{name}: its command writes into {found['place']}, not into this folder; clone it instead"
            )
        with self.lock:
            self._refuse_busy(folder, asked.multirun)
            if not asked.multirun and RunFolder(folder).is_finished:
                raise CheckpointError(f"{name} is finished; clone it to run it again")
            return self._begin("continue", asked, folder, False)

    def clone(self, name: str) -> Words:
        """The words of a run or a sweep for the form, without its folder and its secrets; a name gets a number behind it."""
        folder, asked = self.recorded(name)
        kept, notes = [], list(asked.notes)
        for word in asked.words:
            key = word.partition("=")[0].lstrip("+~")
            if HIDDEN in word:
                notes.append(f"{key} was a secret, which is stored nowhere")
            elif is_plugins(word):  # the form composes its words, which would import them
                notes.append(f"{word} is left out, since it executes these modules; type it if you trust them")
            elif key not in (*PLACES, "name"):
                kept.append(word)
        named = any(word.startswith("name=") for word in asked.words)
        if asked.multirun or named:
            stem = (
                folder.name
                if asked.multirun
                else next(word for word in asked.words if word.startswith("name="))[5:].strip("'\"")
            )
            number = next(n for n in range(2, 10_000) if not folder.with_name(f"{stem}-{n}").exists())
            value = f"{stem}-{number}"
            kept.append(
                f"name={value if value.isascii() and value.replace('-', '').replace('_', '').isalnum() else quoted_value(value)}"
            )
        return Words(kept, asked.multirun, asked.config_dir, asked.config_name, asked.cwd, notes)

    def recorded(self, name: str) -> tuple[Path, Words]:
        """The folder with this id, and the command that made it, such that it writes there again."""
        if (sweep := sweep_of(self.root, name)) is not None:
            return sweep, self._of_sweep(sweep)
        run = self.root.run(name)
        return run.path, self._of_run(run)

    def _of_run(self, run: RunFolder) -> Words:
        failure = run.failure() or {}
        try:
            has_failed_early = not os.path.lexists(run / OVERRIDES) and isinstance(failure.get("words"), list)
            if has_failed_early:
                lines = [str(word) for word in failure["words"]]
            else:
                lines = self.root.file(run.path, OVERRIDES).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(
                f"{run.path} has no readable {OVERRIDES}, so that its command is not known; restore the file"
            ) from None
        about = run.provenance()
        cwd = Path(str(about.get("cwd") or self.cwd))
        if not cwd.is_dir():
            raise CheckpointError(
                f"{run.path} was started in {cwd}, which is gone: paths in its command are relative to it; restore it"
            )
        words = [line for line in lines if line and line.partition("=")[0] not in PLACES]
        options, _ = split_options(list(map(str, about.get("flags", []))))
        words.append(f"trainer.output_dir={quoted_value(shown(run.path, cwd))}")
        return Words(words, False, options.get("config_dir"), options.get("config_name", "config"), cwd)

    def _of_sweep(self, folder: Path) -> Words:
        about = read_object(self.root.file(folder, SWEEP))
        typed = about.get("typed")
        if not isinstance(typed, list) or not typed or not isinstance(typed[-1], str):
            raise CheckpointError(f"{folder / SWEEP} is damaged (it has no list of command lines)")
        try:
            line = shlex.split(typed[-1])
        except ValueError as error:
            raise CheckpointError(f"{folder / SWEEP} is damaged (its command line: {error})") from None
        cwd = Path(str(about.get("cwd") or self.cwd))
        if line[:3] != ["python", "-m", "glmtuner"] or not cwd.is_dir():
            raise CheckpointError(
                f"{folder / SWEEP}: its command was {typed[-1][:200]}, in {cwd}; type it in a terminal"
            )
        options, words = split_options(line[3:])
        return Words(words, True, options.get("config_dir"), options.get("config_name", "config"), cwd)

    def _refuse_job(self, sweep: Path, name: str) -> None:
        """Raise CheckpointError for a job that its sweep alone can go on with."""
        race = readable_race(sweep)
        submitted = read_submissions(sweep)
        if race or submitted or any((folder.path / "pauses").is_dir() for folder in job_folders(sweep)):
            raise CheckpointError(
                f"{name} is a job of a race, of a search or of SLURM's, which the sweep goes on with; continue {self.root.id_of(sweep)}"
            )

    def _refuse_busy(self, folder: Path, multirun: bool) -> None:
        name = self.root.id_of(folder)
        if begun := self.tasks.running(name):
            what = f"this board's {begun[0].what} of {name} has not ended"
            raise CheckpointError(f"{what}; wait until it has, or stop it")
        if RunFolder(folder).is_running:
            raise CheckpointError(f"{name} is running; wait until it has ended, or stop it")
        if multirun and (folder / SWEEP).is_file() and self.sweep_process(folder) is not None:
            raise CheckpointError(f"the sweep {name} is running; wait until it has ended, or stop it")

    def sweep_process(self, folder: Path) -> psutil.Process | None:
        """The process of the sweep's command on this machine; None if none is found."""
        for job in job_folders(folder):
            if job.is_running and (found := holder(job / LOCK)) and (command := sweep_command_above(found)):
                return command
        try:
            about = read_object(folder / SWEEP)
        except CheckpointError:
            return None
        typed = about.get("typed")
        return (
            sweep_command([each for each in typed if isinstance(each, str)], str(about.get("cwd")))
            if isinstance(typed, list)
            else None
        )

    def _composed(self, asked: Words) -> dict[str, Any]:
        found = self.composer.compose(
            asked.words,
            multirun=asked.multirun,
            config_dir=asked.config_dir,
            config_name=asked.config_name,
            cwd=asked.cwd,
            full=True,
        )
        if not found["ok"]:
            raise ConfigError("; also: ".join(each["message"] for each in found["errors"]))
        return found

    def _begin(self, what: str, asked: Words, folder: Path, is_new: bool) -> tuple[str, Task]:
        log = folder / OUTPUT
        if log.is_symlink() or (log.exists() and not log.is_file()):
            raise CheckpointError(f"{log} is no plain file, so that the output cannot be added to it; remove it")

        def at_end(task: Task) -> None:
            """A run that ended before it wrote anything leaves no folder; its output stays in the task."""
            if is_new and {entry.name for entry in folder.iterdir()} <= {OUTPUT, LOCK}:
                task.said, task.log = task.lines(), None
                for entry in folder.iterdir():
                    entry.unlink()
                folder.rmdir()

        name = self.root.id_of(folder)
        command = child_command(*asked.arguments())
        assert asked.cwd is not None
        with log.open("ab") as file:
            file.write(f"$ {command_of(asked)}\n".encode())
        return name, self.tasks.child(what, command, asked.cwd, about=name, log=log, at_end=at_end)


def is_plugins(word: str) -> bool:
    """Whether the word names plugins, however it is written; a word that cannot be read may."""
    try:
        return any(override.key_or_group == "plugins" for override in parse([word]))
    except ConfigError:
        return "plugins" in word


def code_in(asked: Words) -> str | None:
    """The first part of a command that can execute code of whoever wrote it; None if none does."""
    if asked.config_dir:
        return f"--config-dir {asked.config_dir}"
    return next((word for word in asked.words if is_plugins(word) or word.lstrip("+~").startswith(CODE)), None)


def sweep_of(root: Root, name: str) -> Path | None:
    """The folder of the sweep with this id; None if it is no sweep's."""
    try:
        return root.sweep(name)
    except CheckpointError:
        return None


def command_of(asked: Words) -> str:
    """The command as it is typed."""
    return shlex.join(
        [
            "python",
            "-m",
            "glmtuner",
            *Words(redact_overrides(asked.words), asked.multirun, asked.config_dir, asked.config_name).arguments(),
        ]
    )


def split_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options for presets of one's own, and the overrides; raises ConfigError for other options."""
    options: dict[str, str] = {}
    kept: list[str] = []
    waiting = None
    for word in words:
        name, sign, value = word.partition("=")
        if waiting:
            options[waiting], waiting = word, None
        elif name in OPTIONS:
            if sign:
                options[OPTIONS[name]] = value
            else:
                waiting = OPTIONS[name]
        elif word in ("-m", "--multirun"):
            continue
        elif word.startswith("-"):
            raise ConfigError(f"{word}: the board does not continue commands with this option; type it in a terminal")
        elif word.replace(" ", "").lower() != "hydra.mode=multirun":
            kept.append(word)
    return options, kept
