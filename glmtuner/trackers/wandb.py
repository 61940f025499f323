"""Weights & Biases."""

import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Tracker
from glmtuner.console import say
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.redaction import redact_overrides, redact_value
from glmtuner.trackers.client import one_line
from glmtuner.trackers.experiment import (
    described_config,
    job_type_of,
    pictures,
    report_page,
    run_name,
    sweep_of,
    tables,
)

if TYPE_CHECKING:
    from wandb import Run as WandbRun

TIMESTAMP = "%Y%m%d_%H%M%S"  # in the names of the folders that W&B writes
Mode = Literal["online", "offline", "disabled", "shared"]
# W&B's environment variables (WANDB_INIT_TIMEOUT, …) win over these. W&B's own record of git is disabled because it holds
# the remote's URL, with a token in place of a user name, and the diff; the commit is in the config instead.
SETTINGS = {"silent": True, "console": "off", "disable_git": True, "init_timeout": 30.0, "finish_timeout": 300.0}
open_sessions: list["WandbRun"] = []  # of this process


@preset("tracker", "wandb")
@dataclass(kw_only=True)
class Wandb(Tracker):
    """Logs online if logged in, offline otherwise; it never prompts. A resumed run resumes its W&B run.

    The user's overrides win over W&B's environment variables, and these over the defaults here.
    """

    project: str
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    log_artifact: bool = False

    def __post_init__(self) -> None:
        self._num_logged = 0  # lines of the history that this process has passed to `log`
        self._num_synced = 0  # lines that an earlier session of an offline run has synced to the server
        self._has_failed = False  # W&B's own process is gone
        self._session: WandbRun | None = None  # that of this run; jobs that share a process have one each

    def start(self, run: Run, folder: Path) -> None:
        sweep = sweep_of(folder)
        session = self._start_session(
            folder,
            os.environ.get("WANDB_RUN_ID") if sweep is None else None,  # one variable cannot identify all jobs
            name=run_name(run, folder, os.environ.get("WANDB_NAME")),
            group=self._group(sweep),
            job_type=self.job_type or os.environ.get("WANDB_JOB_TYPE") or job_type_of(run),
            config=described_config(folder),
        )
        if not (session.offline or session.disabled):
            say(f"W&B: {session.url}")

    def log(self, line: dict[str, float]) -> None:
        """Log one line under the names of transformers (train/loss, eval/loss, …); W&B's step is the line's number.

        What W&B already has is not sent again: online it refuses steps before its last one, offline they are left out here.
        """
        from transformers.integrations import rewrite_logs

        if self._session is None or self._has_failed:
            return
        if self._num_logged >= self._num_synced:
            values = rewrite_logs({name: value for name, value in line.items() if name != "step"})
            with self._surviving_failures():
                self._session.log({"train/global_step": line["step"], **values}, step=self._num_logged, commit=True)
        self._num_logged += 1

    def abandon(self, preempted: bool = False) -> None:
        if self._session is None or self._has_failed:
            return
        with self._surviving_failures():
            if preempted:
                self._session.mark_preempting()  # with exit code 1, W&B then shows the run as preempted, not as crashed
            self._end_session(exit_code=1)

    @contextmanager
    def _surviving_failures(self) -> Iterator[None]:
        """On an error of W&B, print it once and continue the run without the tracker.

        SLURM signals W&B's own process together with ours, and it ends at once because it has no checkpoint to save. A
        resumed run logs the whole history again, so that nothing of it is missing.
        """
        try:
            yield
        except Exception as error:
            self._has_failed = True
            say(f"W&B failed ({type(error).__name__}: {one_line(error)}): the run continues without it")
            with suppress(Exception):
                self._give_up_session(exit_code=1)

    def finish(self, folder: Path, metrics: dict[str, float]) -> str | None:
        if self._session is None or self._has_failed:
            return None
        with self._surviving_failures():
            return self._finish(self._session, folder, metrics)
        return None

    def _finish(self, run: "WandbRun", folder: Path, metrics: dict[str, float]) -> str | None:
        """Log images, predictions, metrics and, with `log_artifact`, the weights, and finish the session."""
        import wandb

        logged = images(folder)
        for name, (columns, rows) in tables(folder).items():
            logged[name] = wandb.Table([*columns], [*rows])
        if logged:
            run.log(logged)
        run.summary.update(metrics)
        trained = RunFolder(folder).trained()
        if self.log_artifact and trained is not None:
            artifact = wandb.Artifact(f"{trained.name}-{run.id}", type="model", metadata=dict(metrics))
            artifact.add_dir(str(trained), policy="immutable")  # uploaded from there, without a copy
            run.log_artifact(artifact)
        return self._finish_session(folder)

    def publish(self, sweep: Path) -> str | None:
        """Log the sweep's plots, leaderboard and report as a run of its group, the same one each time."""
        import wandb

        logged = images(sweep)
        for name, (columns, rows) in tables(sweep).items():
            logged[name] = wandb.Table([*columns], [*rows])
        if page := report_page(sweep):
            logged["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        if not logged:
            return None
        session = self._start_session(
            sweep, None, name=f"{sweep.name} report", group=self._group(sweep), job_type="report"
        )
        session.log(logged)
        return self._finish_session(sweep)

    def _group(self, sweep: Path | None) -> str | None:
        return self.group or os.environ.get("WANDB_RUN_GROUP") or (sweep.resolve().name if sweep else None)

    def _start_session(self, folder: Path, new_id: str | None, **options: Any) -> "WandbRun":
        """A new session of the folder's W&B run, whose id is in wandb/run_id.txt; a new run gets `new_id` or a random one.

        `options` are arguments of `wandb.init`. If the server refuses the run, the session is written offline.
        """
        import wandb

        logs = folder / "wandb"
        id_file = logs / "run_id.txt"
        if not id_file.is_file():
            write_text(id_file, new_id or secrets.token_hex(4))
        run_id = id_file.read_text(encoding="utf-8").strip()
        earlier = sessions(logs)
        wait_for_unused_timestamp(earlier)
        settings: dict[str, Any] = {
            name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ
        }
        if self.log_artifact:
            settings.pop("finish_timeout", None)  # uploading weights may take longer
        options |= {"project": self.project, "entity": self.entity, "tags": self.tags, "dir": str(folder)}
        options = redact_value(options, assignments=False)
        options |= {
            "id": run_id,
            "resume": "allow",
            "allow_val_change": True,
            "reinit": "create_new",  # else a session that another job of this process has open would be returned
            "settings": wandb.Settings(**settings, finish_timeout_raises=True),
        }
        mode = resolve_mode()
        with redacted_argv():
            try:
                run = wandb.init(mode=mode, **options)
            except wandb.Error as error:
                if mode == "offline":
                    raise
                say(f"W&B refuses this run ({one_line(error)}): it is written offline")
                if not open_sessions:
                    wandb.teardown(exit_code=1)
                for session in set(sessions(logs)) - set(earlier):
                    shutil.rmtree(session, ignore_errors=True)
                run = wandb.init(mode="offline", **options)
        run.define_metric("train/global_step", hidden=True)
        for names in ("train/*", "eval/*"):
            run.define_metric(names, step_metric="train/global_step")
        has_synced = run.offline and any(is_synced(session) for session in earlier)
        self._num_logged, self._num_synced = 0, len(RunFolder(folder).history()) if has_synced else 0
        self._session = run
        open_sessions.append(run)
        return run

    def _end_session(self, exit_code: int) -> bool:
        """Finish the W&B run; returns whether the upload, if there is one, finished in time."""
        assert self._session is not None
        try:
            self._session.finish(exit_code=exit_code)
        except TimeoutError:
            return False
        finally:
            self._give_up_session(exit_code)
        return True

    def _give_up_session(self, exit_code: int) -> None:
        """End W&B's process with the last session, so that the next run reads W&B's environment variables again."""
        import wandb

        if self._session in open_sessions:
            open_sessions.remove(self._session)
        self._session = None
        if not open_sessions:
            wandb.teardown(exit_code)

    def _finish_session(self, folder: Path) -> str | None:
        """Finish the session; returns a line with the URL of its W&B run, or with the command that uploads it.

        Earlier sessions whose content the server, or the last session, has are removed.
        """
        run = self._session
        assert run is not None
        is_disabled, is_offline, session = run.disabled, run.offline, Path(run.dir).parent
        url = None if is_disabled or is_offline else run.url  # W&B prints a warning if an offline run is asked for it
        is_complete = self._end_session(exit_code=0)
        if is_disabled:
            return None
        written = sessions(folder / "wandb")
        unsynced = [each for each in written if not is_synced(each)]
        if not is_offline and is_complete:
            superseded = unsynced  # the server has everything
        elif unsynced == written:
            superseded = unsynced[:-1]  # the server has nothing, and the last session has everything
        else:
            superseded = []
        for each in superseded:
            shutil.rmtree(each, ignore_errors=True)
        if is_offline:
            paths = [str(each) for each in unsynced if each not in superseded]
            return f"W&B: offline; upload it with `wandb sync {shlex.join(paths)}`"
        if is_complete:
            return f"W&B: {url}"
        return f"W&B: {url}; the upload did not finish in time: type `wandb sync --include-online {shlex.quote(str(session))}`"


def resolve_mode() -> Mode:
    """W&B's mode by its environment and settings files, or `offline` if that is online and the login fails."""
    import wandb

    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return "disabled"
    try:
        is_logged_in = wandb.login(prompt=False, verify=True)
    except wandb.Error as error:
        say(f"the login to W&B failed ({one_line(error)}): this run is written offline")
        return "offline"
    if not is_logged_in:
        return "offline"
    return "shared" if mode == "shared" else "online"


@contextmanager
def redacted_argv() -> Iterator[None]:
    """Redact secrets in `sys.argv`, which W&B stores with the run, during the context."""
    original = sys.argv
    sys.argv = redact_overrides(original)
    try:
        yield
    finally:
        sys.argv = original


def sessions(logs: Path) -> list[Path]:
    """The folders of the W&B run's sessions, run-<time>-<id> and offline-run-<time>-<id>, oldest first."""
    folders = [path for path in logs.glob("*run-*-*") if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: path.name.removeprefix("offline-"))


def wait_for_unused_timestamp(earlier: list[Path]) -> None:
    """Wait until a new session gets another name than the last one; W&B would write both to one folder and lose one."""
    last = earlier[-1].name.split("-")[-2] if earlier else ""
    while last in (time.strftime(TIMESTAMP), time.strftime(TIMESTAMP, time.gmtime())):
        time.sleep(0.05)


def is_synced(session: Path) -> bool:
    """Whether the server has the session: it was online, or `wandb sync` has marked it."""
    return not session.name.startswith("offline-") or any(session.glob("*.synced"))


def images(folder: Path) -> dict[str, Any]:
    """The plots in the folder of a run or a sweep, as W&B images by their keys pictures/<name>."""
    import wandb

    return {name: wandb.Image(str(path)) for name, path in pictures(folder).items()}
