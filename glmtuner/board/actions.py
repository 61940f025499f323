"""The routes of a board that change something: the form, starting and stopping, the trash, talking, exporting."""

import shutil
import threading
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from glmtuner.board.begun import Tasks
from glmtuner.board.compose import MOST_WORDS, Composer
from glmtuner.board.places import inside, working_folder
from glmtuner.board.processes import child_command
from glmtuner.board.root import Root
from glmtuner.board.starts import Starts, Words, sweep_of
from glmtuner.board.stops import Stops
from glmtuner.board.talk import Talks
from glmtuner.board.trash import Trash
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.sweep.queue import in_queue
from glmtuner.sweep.submissions import read_submissions

Text = Annotated[str, Field(max_length=8192)]
Id = Annotated[str, Field(min_length=1, max_length=4096)]
Asked = Annotated[str, Query(max_length=4096)]


class Body(BaseModel):
    """A body of JSON, without keys that are not known."""

    model_config = ConfigDict(extra="forbid")


class Typed(Body):
    """The words of a command, and whether it is a sweep."""

    words: Annotated[list[Text], Field(max_length=MOST_WORDS)]
    multirun: bool = False
    config_dir: Annotated[str, Field(max_length=4096)] | None = None
    launcher: str | None = None

    def as_words(self) -> Words:
        """The same for Starts."""
        folder = self.config_dir
        if folder is not None and (not folder or folder.startswith("-") or any(ord(sign) < 32 for sign in folder)):
            raise ConfigError(f"--config-dir {folder!r}: type a folder that holds presets, such as my_conf")
        return Words(list(self.words), self.multirun, folder)


class Named(Body):
    id: Id


class Resumed(Named):
    trust: bool = False


class Several(Body):
    ids: Annotated[list[Id], Field(min_length=1, max_length=1000)]


class Restored(Body):
    trash: Annotated[str, Field(max_length=60)]


class Closed(Body):
    talk: Annotated[str, Field(max_length=60)]


class Question(Closed):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    parameters: dict[str, Any] = {}


class Exported(Body):
    id: Id
    to: Annotated[str, Field(max_length=1024)] | None = None
    layout: str = "transformers"
    dtype: str | None = None


class Actions:
    """The routes below /api/ that start, stop, move or load something. Each is a plain function, called in a thread."""

    def __init__(self, root: Root) -> None:
        self.root, self.cwd = root, working_folder(root.path)
        self.tasks = Tasks()
        self.composer = Composer(root.path, self.cwd)
        self.starts = Starts(root, self.cwd, self.composer, self.tasks)
        self.stops = Stops(root, self.starts, self.tasks)
        self.talks = Talks(root, Path(self.tasks.folder.name))
        self.trash = Trash(root, self.busy)
        self.moving = threading.Lock()  # nothing is moved while something is started or loaded
        self.router = APIRouter(prefix="/api")
        for name in ("form", "task", "tasks", "clone", "trash", "talks"):
            self.router.get(f"/{name}")(getattr(self, f"get_{name}"))
        for name in ("compose", "check", "start", "stop", "continue", "delete", "restore", "export"):
            self.router.post(f"/{name}")(getattr(self, f"post_{name}"))
        self.router.post("/talk/open")(self.post_open)
        self.router.post("/talk/close")(self.post_close)
        self.router.post("/talk/chat")(self.post_chat)

    def close(self) -> None:
        """End what is of use to the board alone: loaded runs, forecasts, and the child that composes. Runs and exports go on."""
        self.talks.close_all()
        self.composer.close()
        self.tasks.close()

    # -- the form --------------------------------------------------------------------------------------------------------

    def get_form(self, config_dir: Asked | None = None) -> dict[str, Any]:
        """What the form is made of, the folder that commands are typed in, and whether this machine can submit to SLURM."""
        return {
            **self.composer.form(config_dir or None),
            "cwd": str(self.cwd),
            "slurm": shutil.which("sbatch") is not None,
        }

    def post_compose(self, typed: Typed) -> dict[str, Any]:
        """What the words describe, or their errors."""
        asked = typed.as_words()
        return self.composer.compose(asked.words, multirun=asked.multirun, config_dir=asked.config_dir)

    def post_check(self, typed: Typed) -> dict[str, Any]:
        """Begin the forecast of the memory and the time."""
        return self.starts.check(typed.as_words()).record()

    def get_task(self, task: Asked) -> dict[str, Any]:
        """What a task has said, whether and how it has ended, and whether the run or sweep that it is about is `written` yet."""
        found = self.tasks.get(task)
        return {
            **found.record(),
            "lines": found.lines(),
            "written": found.about is not None and self.is_written(found.about),
        }

    def is_written(self, name: str) -> bool:
        """Whether this is the id of a run or a sweep by now."""
        try:
            return sweep_of(self.root, name) is not None or bool(self.root.run(name))
        except CheckpointError:
            return False

    def get_tasks(self) -> list[dict[str, Any]]:
        """What this board has begun, the latest first."""
        return self.tasks.listed()

    # -- runs ------------------------------------------------------------------------------------------------------------

    def post_start(self, typed: Typed) -> dict[str, Any]:
        """Start a run or a sweep; its id, which it has once its folder is written."""
        with self.moving:
            name, task = self.starts.start(typed.as_words(), typed.launcher)
        return {**task.record(), "id": name}

    def post_stop(self, named: Named) -> dict[str, Any]:
        """Stop a run or a sweep with a checkpoint."""
        return self.stops.stop(named.id).record()

    def post_continue(self, resumed: Resumed) -> dict[str, Any]:
        """Continue a run or a sweep."""
        with self.moving:
            return self.starts.resume(resumed.id, resumed.trust)[1].record()

    def get_clone(self, id: Asked) -> dict[str, Any]:
        """The words of a run or a sweep for the form."""
        return self.starts.clone(id).record()

    def post_delete(self, several: Several) -> dict[str, Any]:
        """Move runs and sweeps into the trash."""
        with self.moving:
            return {"trash": self.trash.delete(several.ids)}

    def post_restore(self, restored: Restored) -> dict[str, Any]:
        """Move them back."""
        with self.moving:
            return {"ids": self.trash.restore(restored.trash)}

    def get_trash(self) -> dict[str, Any]:
        """What is in the trash, and where that is."""
        return {"folder": str(self.trash.path), "deleted": self.trash.listed()}

    def busy(self, name: str, folder: Path) -> str | None:
        """Why a run or a sweep cannot be moved now; None if it can."""
        jobs = [job.path.name for job in job_folders(folder) if job.is_running]
        if RunFolder(folder).is_running or jobs:
            return f"{jobs[0] if jobs else 'it'} is running; stop it first"
        if begun := [task for task in self.tasks.running(name) if task.what != "check"]:
            return f"this board is at it ({begun[0].what}); wait until that has ended, or stop it"
        if self.talks.uses(name):
            return "it is loaded to talk with; close the talk first"
        if sweep_of(self.root, name) is not None:
            if self.starts.sweep_process(folder) is not None:
                return "its command is running; stop it first"
            submitted = read_submissions(folder)
            queued = in_queue(each.id for each in submitted.values()) if submitted else {}
            if queued is None or queued:
                return "SLURM has jobs of it in the queue, or does not answer; stop it first"
        return None

    # -- models ----------------------------------------------------------------------------------------------------------

    def post_open(self, named: Named) -> dict[str, Any]:
        """Load a run to talk with."""
        with self.moving:
            return self.talks.open(named.id).record()

    def get_talks(self, talk: Asked) -> dict[str, Any]:
        """Whether a loaded run is ready, and what can be asked of it."""
        return self.talks.get(talk).record()

    def post_close(self, closed: Closed) -> dict[str, Any]:
        """End a loaded run."""
        self.talks.close(closed.talk)
        return {}

    def post_chat(self, question: Question) -> StreamingResponse:
        """An answer as server-sent events."""
        answer = self.talks.ask(question.talk, question.messages, question.parameters)
        return StreamingResponse(answer, media_type="text/event-stream")

    def post_export(self, exported: Exported) -> dict[str, Any]:
        """Export a run into a new folder inside of the board's; without a name into exports/<run>."""
        run = self.root.run(exported.id)
        if not run.is_finished:
            raise CheckpointError(f"{exported.id} is not finished; continue it, and export it then")
        if exported.layout not in ("transformers", "published"):
            raise ConfigError(f"layout={exported.layout[:40]}: legal are transformers and published")
        if exported.dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(
                f"dtype={exported.dtype[:40]}: legal are float32, float16 and bfloat16, or null for that of the base"
            )
        name = exported.to or f"exports/{run.path.name}"
        to = inside(self.root.path, self.root.path / name, f"to={name[:200]}")
        if to.exists():
            raise ConfigError(f"to={name}: it exists in {self.root.path}; type the name of a new folder")
        dtype = [f"--dtype={exported.dtype}"] if exported.dtype else []
        command = child_command("export", str(run.path), f"--to={to}", f"--layout={exported.layout}", *dtype)
        with self.moving:
            task = self.tasks.child("export", command, self.cwd, about=exported.id)
        return {**task.record(), "to": self.root.id_of(to)}
