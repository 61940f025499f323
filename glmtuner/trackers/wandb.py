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
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Tracker
from glmtuner.console import say
from glmtuner.run_folder.files import read_lines, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PREDICTIONS, SWEEP
from glmtuner.run_folder.redaction import redact_overrides

STAMP = "%Y%m%d_%H%M%S"  # in the names of the folders that W&B writes
MOST_ANSWERS = 1000  # rows of the table of predictions
# W&B's own variables (WANDB_INIT_TIMEOUT, …) win over these. Of git it would keep the remote's URL with a token that
# stands where the user name does, and the changed lines; the commit is in the config instead.
SETTINGS = {"silent": True, "console": "off", "disable_git": True, "init_timeout": 30.0, "finish_timeout": 300.0}


@preset("tracker", "wandb")
@dataclass(kw_only=True)
class Wandb(Tracker):
    """Online when logged in, offline otherwise; it never asks. One run stays one W&B run when it is resumed.

    What is typed wins over W&B's environment variables, and those over what is filled in here.
    """

    project: str
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    log_artifact: bool = False

    def __post_init__(self) -> None:
        self._line = self._sent = 0  # lines of the history: logged here; sent before, as far as only we know
        self._lost = False

    def start(self, run: Run, folder: Path) -> None:
        import wandb

        sweep = sweep_of(folder)
        work = "train" if run.trainer.do_train else "predict" if run.trainer.do_predict else "evaluate"
        if sweep is None:
            names = (run.name, os.environ.get("WANDB_NAME"), folder.name)
            proposed = os.environ.get("WANDB_RUN_ID")
        else:  # one variable cannot name all jobs, and `name` names the sweep
            names = (folder.name.rpartition("_")[0], folder.name)
            proposed = None
        about = RunFolder(folder).provenance()
        self._open(
            folder,
            proposed,
            name=next(filter(None, names)),
            group=self._group(sweep),
            job_type=self.job_type or os.environ.get("WANDB_JOB_TYPE") or work,
            config={
                **OmegaConf.to_container(RunFolder(folder).config()),
                "provenance": {name: about.get(name) for name in ("git", "packages")},
            },
        )
        assert wandb.run is not None
        if not (wandb.run.offline or wandb.run.disabled):
            say(f"W&B: {wandb.run.url}")

    def log(self, line: dict[str, float]) -> None:
        """One row a line, under transformers' names (train/loss, eval/loss, …); the line's number is W&B's step.

        What W&B has is not sent again: online it refuses steps behind its last one, offline they are left out here.
        """
        import wandb
        from transformers.integrations import rewrite_logs

        if wandb.run is None or self._lost:
            return
        if self._line >= self._sent:
            values = rewrite_logs({name: value for name, value in line.items() if name != "step"})
            with self._or_without():
                wandb.run.log({"train/global_step": line["step"], **values}, step=self._line, commit=True)
        self._line += 1

    def abandon(self, preempted: bool = False) -> None:
        wandb = sys.modules.get("wandb")  # not there: it was never started
        if wandb is None or wandb.run is None or self._lost:
            return
        with self._or_without():
            if preempted:
                wandb.run.mark_preempting()  # with the exit code, W&B shows the run as preempted and not as crashed
            end(exit_code=1)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """A run does not end for its tracker: where W&B's own process is gone, it says so once and goes on without.

        SLURM tells that process to go together with ours, and it has no checkpoint to write first. What it had written of
        the history is written again, whole, when the run is resumed.
        """
        import wandb

        try:
            yield
        except Exception as error:
            self._lost = True
            say(f"W&B is lost ({type(error).__name__}: {one_line(error)}): the run goes on without it")
            with suppress(Exception):
                wandb.teardown(exit_code=1)

    def finish(self, folder: Path, metrics: dict[str, float]) -> str | None:
        import wandb

        if wandb.run is None or self._lost:
            return None
        with self._or_without():
            return self._finish(folder, metrics)
        return None

    def _finish(self, folder: Path, metrics: dict[str, float]) -> str | None:
        import wandb

        shown = pictures(folder)
        answers = list(islice(read_lines(folder / PREDICTIONS), MOST_ANSWERS))
        if answers:
            columns = list(answers[0])
            shown["predictions"] = wandb.Table(columns, [[answer.get(name) for name in columns] for answer in answers])
        if shown:
            wandb.run.log(shown)
        wandb.run.summary.update(metrics)
        trained = RunFolder(folder).trained()
        if self.log_artifact and trained is not None:
            artifact = wandb.Artifact(f"{trained.name}-{wandb.run.id}", type="model", metadata=dict(metrics))
            artifact.add_dir(str(trained), policy="immutable")  # read where it lies: no second copy on the disk
            wandb.run.log_artifact(artifact)
        return self._close(folder)

    def publish(self, sweep: Path) -> str | None:
        """A run of the sweep's group with its pictures, its leaderboard and its report; the same one when done again."""
        import wandb

        shown = pictures(sweep)
        leaderboard, report = sweep / "leaderboard.csv", sweep / "report.html"
        if leaderboard.is_file():
            import pandas

            table = pandas.read_csv(leaderboard).astype(object)
            shown["leaderboard"] = wandb.Table(dataframe=table.where(table.notna(), None))
        if report.is_file():
            shown["report"] = wandb.Html(report.read_text(encoding="utf-8"), inject=False)
        if not shown:
            return None
        self._open(sweep, None, name=f"{sweep.name} report", group=self._group(sweep), job_type="report")
        assert wandb.run is not None
        wandb.run.log(shown)
        return self._close(sweep)

    def _group(self, sweep: Path | None) -> str | None:
        return self.group or os.environ.get("WANDB_RUN_GROUP") or (sweep.resolve().name if sweep else None)

    def _open(self, folder: Path, proposed: str | None, **about: Any) -> None:
        """Start the W&B run of this folder, or go on with the one whose id the folder remembers."""
        import wandb

        logs = folder / "wandb"
        remembered = logs / "run_id.txt"
        if not remembered.is_file():
            write_text(remembered, proposed or secrets.token_hex(4))
        run_id = remembered.read_text(encoding="utf-8").strip()
        earlier = sessions(logs)
        wait_for_another_second(earlier)
        settings = {name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ}
        if self.log_artifact:
            settings.pop("finish_timeout", None)  # weights may take long
        about |= {"project": self.project, "entity": self.entity, "tags": self.tags, "dir": str(folder)}
        about |= {
            "id": run_id,
            "resume": "allow",
            "allow_val_change": True,
            "settings": wandb.Settings(**settings, finish_timeout_raises=True),
        }
        mode = mode_now()
        with hidden_secrets():
            try:
                opened = wandb.init(mode=mode, **about)
            except wandb.Error as error:
                if mode == "offline":
                    raise
                say(f"W&B does not take this run ({one_line(error)}): it is written offline")
                wandb.teardown(exit_code=1)
                for session in set(sessions(logs)) - set(earlier):
                    shutil.rmtree(session, ignore_errors=True)
                opened = wandb.init(mode="offline", **about)
        opened.define_metric("train/global_step", hidden=True)
        for names in ("train/*", "eval/*"):
            opened.define_metric(names, step_metric="train/global_step")
        sent = opened.offline and any(is_sent(session) for session in earlier)
        self._line, self._sent = 0, len(RunFolder(folder).history()) if sent else 0

    def _close(self, folder: Path) -> str | None:
        """End the W&B run; returns where it is, or how to send it."""
        import wandb

        run = wandb.run
        assert run is not None
        disabled, offline, here = run.disabled, run.offline, Path(run.dir).parent
        url = None if disabled or offline else run.url  # asked for offline, it prints a warning
        all_sent = end(exit_code=0)
        if disabled:
            return None
        found = sessions(folder / "wandb")
        left = [session for session in found if not is_sent(session)]
        # the server has everything, or, while it has nothing, the last session does
        replaced = left if not offline and all_sent else left[:-1] if left == found else []
        for session in replaced:
            shutil.rmtree(session, ignore_errors=True)
        if offline:
            paths = [str(session) for session in left if session not in replaced]
            return f"W&B: offline; send it with `wandb sync {shlex.join(paths)}`"
        rest = f"; it did not take everything in time: `wandb sync --include-online {shlex.quote(str(here))}`"
        return f"W&B: {url}{'' if all_sent else rest}"


def end(exit_code: int) -> bool:
    """Close the W&B run and its process; returns whether the server, where there is one, took everything in time."""
    import wandb

    assert wandb.run is not None
    try:
        wandb.run.finish(exit_code=exit_code)
    except TimeoutError:
        return False
    finally:
        wandb.teardown(exit_code)  # the next run reads W&B's environment anew, and no process stays behind
    return True


def mode_now() -> str:
    """W&B's mode, from its environment and settings files; offline where that is online and no server takes the login."""
    import wandb

    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        return mode
    try:
        return mode if wandb.login(prompt=False, verify=True) else "offline"
    except wandb.Error as error:
        say(f"W&B cannot be logged in to ({one_line(error)}): this run is written offline")
        return "offline"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


@contextmanager
def hidden_secrets() -> Iterator[None]:
    """While this lasts, `sys.argv`, which W&B keeps with the run, shows no tokens and keys."""
    typed = sys.argv
    sys.argv = redact_overrides(typed)
    try:
        yield
    finally:
        sys.argv = typed


def sweep_of(folder: Path) -> Path | None:
    """The sweep whose job lives in this folder; None for a single run."""
    parent = folder.resolve().parent
    return parent if (parent / SWEEP).is_file() else None


def sessions(logs: Path) -> list[Path]:
    """What W&B wrote at each start of the run, oldest first: run-<time>-<id> and offline-run-<time>-<id>."""
    found = [path for path in logs.glob("*run-*-*") if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def wait_for_another_second(earlier: list[Path]) -> None:
    """Until a session that is begun now has another name than the last one: W&B would write both to one folder, and keep one."""
    stamp = earlier[-1].name.split("-")[-2] if earlier else ""
    while stamp in (time.strftime(STAMP), time.strftime(STAMP, time.gmtime())):
        time.sleep(0.05)


def is_sent(session: Path) -> bool:
    """Whether W&B's server has this session: it was online, or `wandb sync` has marked it."""
    return not session.name.startswith("offline-") or any(session.glob("*.synced"))


def pictures(folder: Path) -> dict[str, Any]:
    """The pictures of a run's or a sweep's report, by their names."""
    import wandb

    found = [*sorted(folder.glob("*.png")), *sorted(folder.glob("pictures/*.png"))]
    return {f"pictures/{path.stem}": wandb.Image(str(path)) for path in found}
