"""The trials of a search, which several processes may share: which one to run next, and what became of it.

A trial is created with all of its values at once, as running, under the name of the process that runs it. It is another's no
longer when that process has ended: its values are then run again, in the same folder, before new ones are drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.objective import measured_as
from glmtuner.config.search_space import SearchSpace
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.report.race import pruned_reason
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.redaction import redact_overrides
from glmtuner.sweep.search_samplers import draw, without_pickles
from glmtuner.sweep.search_settings import Settings
from glmtuner.sweep.search_storage import Locks

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# User attributes of a trial.
WORKER, OVERRIDES, FOLDER, RETRIES = "worker", "overrides", "folder", "retries"  # FOLDER is in the sweep's
ENDED, REASON = (
    "ended",
    "reason",
)  # how a trial without a result ended: pruned, error, diverged, infeasible or withdrawn
SPACE, OBJECTIVES, FIXED = "space", "objectives", "fixed"  # of the study


@dataclass(frozen=True)
class Outcome:
    """What a job left in its folder."""

    kind: str  # complete, pruned, error, diverged, infeasible; busy or interrupted if it has not ended
    values: tuple[float, ...] = ()
    reason: str = ""


def outcome_of(folder: RunFolder, objectives: Sequence[str]) -> Outcome:
    """How the job in the folder ended; a result that is not a finite number counts as a diverged training."""
    if folder.is_running:
        return Outcome("busy")
    try:
        if failure := folder.failure():
            return Outcome(str(failure["kind"]), reason=str(failure["reason"]))
        if not folder.is_finished:
            reason = pruned_reason(folder)
            return Outcome("interrupted") if reason is None else Outcome("pruned", reason=reason)
        metrics = folder.metrics()
    except CheckpointError as damaged:
        return Outcome("error", reason=str(damaged))
    keys = [measured_as(name, metrics) for name in objectives]
    if None in keys:
        return Outcome("error", reason=f"the run measured no {objectives[keys.index(None)]}")
    values = tuple(metrics[key] for key in keys if key is not None)
    if wrong := [name for name, value in zip(objectives, values, strict=True) if not math.isfinite(value)]:
        return Outcome("diverged", reason=f"its {wrong[0]} is not a finite number")
    return Outcome("complete", values)


class SharedStudy:
    """An Optuna study whose trials are drawn, run and told by several processes, each trial by one of them."""

    def __init__(
        self,
        settings: Settings,
        space: SearchSpace,
        storage: "BaseStorage",
        locks: Locks,
        sweep: Path,
        subdir_of: Callable[[list[str], int], str],
    ) -> None:
        self.settings, self.space, self.storage, self.locks = settings, space, storage, locks
        self.sweep, self.subdir_of = sweep, subdir_of
        with locks.exclusive("search"):
            self.study = self._load_or_create()
        # failures of earlier commands are tried again, and those of this one are not
        self.failed_before = {trial.number for trial in self.trials() if self._may_be_retried(trial)}
        self._interrupted: set[int] = set()  # trials of this process whose jobs ended without a result or a reason

    # -- the study -----------------------------------------------------------------------------------------------------------

    def _load_or_create(self) -> "Study":
        import optuna

        settings = self.settings
        sampler = optuna.samplers.RandomSampler(seed=0)  # draws nothing here
        name = settings.study_name
        if name in {study.study_name for study in self.storage.get_all_studies()}:
            study = optuna.load_study(study_name=name, storage=self.storage, sampler=sampler)
            self._check_same(study)
            return study
        study = optuna.create_study(
            study_name=name, storage=self.storage, directions=settings.direction, sampler=sampler
        )
        self._describe(study)
        return study

    def _describe(self, study: "Study") -> None:
        study.set_user_attr(OBJECTIVES, self.settings.objectives)
        study.set_user_attr(FIXED, self._fixed())
        study.set_user_attr(SPACE, self.space.description())

    def _fixed(self) -> list[str]:
        return sorted(redact_overrides([*self.space.fixed]))

    def _check_same(self, study: "Study") -> None:
        """Raise ConfigError if the study searches another space or for something else; say what else has changed."""
        settings, stored = self.settings, study.user_attrs
        another = "type another name=…, or hydra.sweeper.study_name=…, for another search"
        directions = [direction.name.lower() for direction in study.directions]
        before = stored.get(OBJECTIVES, settings.objectives)
        if directions != settings.direction or before != settings.objectives:
            raise ConfigError(
                f"objective={_listed(settings.objectives)}: the study {settings.study_name!r} searches for {_listed(before)} "
                f"({_listed(directions)}); {another}"
            )
        if SPACE not in stored:  # made by another program, or by a process that was killed before it described it
            if any(trial.user_attrs.get(OVERRIDES) is None for trial in study.get_trials(deepcopy=False)):
                say(f"search {settings.study_name!r}: the study has trials of another program, which count as they are")
            self._describe(study)
            return
        space = self.space.description()
        if space != stored[SPACE]:
            changed = sorted(
                key for key in space.keys() | stored[SPACE].keys() if space.get(key) != stored[SPACE].get(key)
            )
            listing = "; ".join(f"{key} was {stored[SPACE].get(key, 'not searched')}" for key in changed)
            raise ConfigError(f"the study {settings.study_name!r} searches another space ({listing}); {another}")
        fixed = self._fixed()
        if fixed != stored.get(FIXED):
            others = sorted({*fixed} ^ {*stored.get(FIXED, [])})
            say(
                f"search {settings.study_name!r}: its earlier trials may have run with other values ({', '.join(others)}); their "
                "results count"
            )

    def folder(self, trial: "FrozenTrial") -> RunFolder:
        """The folder of the trial's job."""
        return RunFolder(self.sweep / str(trial.user_attrs[FOLDER]))

    def trials(self) -> list["FrozenTrial"]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    # -- which trials are whose ----------------------------------------------------------------------------------------------

    def own(self, trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
        """The running trials of this process that are to be run, interrupted ones left out."""
        return [
            trial
            for trial in trials
            if _is_running(trial)
            and trial.user_attrs.get(WORKER) == self.locks.worker
            and trial.number not in self._interrupted
        ]

    def _take_over(self, trials: Sequence["FrozenTrial"]) -> int:
        """Make the running trials of processes that have ended this process's; returns how many."""
        stale = self._stale_in_database()
        dead = [trial for trial in trials if _is_running(trial) and self._is_abandoned(trial, stale)]
        for trial in dead:
            self.storage.set_trial_user_attr(self._id_of(trial), WORKER, self.locks.worker)
        if dead:
            self.locks.forget_dead()
        return len(dead)

    def _is_abandoned(self, trial: "FrozenTrial", stale: set[int]) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is None or worker == self.locks.worker:  # of another program, or of this process
            return False
        alive = self.locks.is_alive(worker)
        if (
            alive is None
        ):  # its lock file is not here: of a journal it is gone, of a database on a disk that is not shared
            return not self._has_heartbeat or trial.number in stale
        return not alive

    @property
    def _has_heartbeat(self) -> bool:
        from optuna.storages._heartbeat import is_heartbeat_enabled

        return is_heartbeat_enabled(self.storage)

    def _stale_in_database(self) -> set[int]:
        """The numbers of the running trials of a database whose heartbeat has stopped."""
        if not self._has_heartbeat:
            return set()
        stale = {*self.storage._get_stale_trial_ids(self.study._study_id)}  # type: ignore[attr-defined]
        return {trial.number for trial in self.trials() if self._id_of(trial) in stale}

    def _id_of(self, trial: "FrozenTrial") -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, trial.number)

    def heartbeat(self, trial: "FrozenTrial") -> Any:
        """A context that tells other machines, by the database, that the trial is alive; of a journal it does nothing."""
        from optuna.storages._heartbeat import get_heartbeat_thread

        return get_heartbeat_thread(self._id_of(trial), self.storage)

    # -- counting ------------------------------------------------------------------------------------------------------------

    def spent(self, trials: Sequence["FrozenTrial"]) -> int:
        """How many of `n_trials` are finished or running, or have failed since this process began."""
        retried = {trial.user_attrs.get(RETRIES) for trial in trials}
        return sum(self._is_spent(trial, retried) for trial in trials)

    def _is_spent(self, trial: "FrozenTrial", retried: set[Any]) -> bool:
        if is_finished(trial):
            return True
        if _is_running(trial):
            return WORKER in trial.user_attrs
        return self._may_be_retried(trial) and trial.number not in self.failed_before | retried

    def _may_be_retried(self, trial: "FrozenTrial") -> bool:
        return trial.state.name == "FAIL" and trial.user_attrs.get(ENDED) == "error" and OVERRIDES in trial.user_attrs

    def _to_retry(self, trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
        retried = {trial.user_attrs.get(RETRIES) for trial in trials}
        return [trial for trial in trials if trial.number in self.failed_before - retried]

    # -- the next trials -----------------------------------------------------------------------------------------------------

    def status(self) -> str:
        """What there is to do, in one line."""
        with self.locks.exclusive("search"):
            trials = self.trials()
            stale = self._stale_in_database()
            abandoned = sum(_is_running(trial) and self._is_abandoned(trial, stale) for trial in trials)
            others = {
                "interrupted, which go on": abandoned,
                "failed, which are tried again": len(self._to_retry(trials)),
                "running in other processes": sum(map(_is_running, trials)) - abandoned,
            }
        finished = f"{sum(map(is_finished, trials))} of {self.settings.n_trials} trials are finished"
        listed = [finished, *(f"{what}: {count}" for what, count in others.items() if count)]
        return f"search {self.settings.study_name!r}: {'; '.join(listed)}"

    def next_batch(self) -> tuple[list["FrozenTrial"], bool]:
        """The trials of this process to run now, at most `n_jobs`, each in a folder of its own; and whether others are left.

        Interrupted trials come first, then failed ones with the same values, then new ones. New values are drawn from the results
        of earlier batches only, and a batch begins at a multiple of `n_jobs`: so an interrupted search draws the same.
        """
        with self.locks.exclusive("search"):
            trials = self.trials()
            if self._take_over(trials):
                trials = self.trials()
            own = self.own(trials)
            batch, busy = self._startable(own)
            while len(batch) < self.settings.n_jobs and self.spent(trials) < self.settings.n_trials:
                begins = len(trials) % self.settings.n_jobs == 0
                if retried := self._to_retry(trials):
                    new = self._again(retried[0], len(trials))
                elif batch and begins:
                    break
                else:
                    new = self._draw(trials)
                created = self._create(new, len(trials))
                trials = self.trials()
                if created is not None:
                    started, waits = self._startable([*batch, created])
                    batch, busy = started, busy or waits
            return batch, busy

    def _startable(self, own: Sequence["FrozenTrial"]) -> tuple[list["FrozenTrial"], bool]:
        """The first trials whose folders nobody uses, and whether some have to wait: for another process, or for their like."""
        chosen: dict[str, FrozenTrial] = {}
        for trial in own:
            folder = str(trial.user_attrs[FOLDER])
            if folder not in chosen and not self.folder(trial).is_running:
                chosen[folder] = trial
        batch = [*chosen.values()][: self.settings.n_jobs]
        return batch, len(batch) < len(own)

    def _again(self, failed: "FrozenTrial", number: int) -> "FrozenTrial":
        """A new trial with the values of a failed one."""
        import optuna

        overrides = failed.user_attrs[OVERRIDES]
        attributes = self._attributes(overrides, number) | {RETRIES: failed.number}
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, params=failed.params, distributions=failed.distributions,
            user_attrs=attributes, system_attrs=without_pickles(failed.system_attrs),
        )  # fmt: skip

    def _draw(self, trials: Sequence["FrozenTrial"]) -> "FrozenTrial":
        known = len(trials) - len(trials) % self.settings.n_jobs
        new, overrides = draw(self.settings.sampler, self.space, self.settings.direction, trials, known)
        new.user_attrs = self._attributes(overrides, len(trials))
        return new

    def _attributes(self, overrides: list[str], number: int) -> dict[str, Any]:
        return {WORKER: self.locks.worker, OVERRIDES: overrides, FOLDER: self.subdir_of(overrides, number)}

    def _create(self, new: "FrozenTrial", number: int) -> "FrozenTrial | None":
        """The stored trial; None if another machine, which shares the database but no lock, has come before it."""
        self.study.add_trial(new)
        for trial in reversed(self.trials()):
            if trial.user_attrs.get(WORKER) == self.locks.worker:
                break
        if trial.number == number:
            return trial
        self.tell(trial, Outcome("withdrawn", reason=f"another process created trial {number} at the same time"))
        return None

    def report(self, trial: "FrozenTrial", value: float, step: int) -> None:
        """Store the objective of a trial at a rung, once."""
        if step not in self.trials()[trial.number].intermediate_values:
            self.storage.set_trial_intermediate_value(self._id_of(trial), step, value)

    # -- results -------------------------------------------------------------------------------------------------------------

    def tell(self, trial: "FrozenTrial", outcome: Outcome) -> None:
        """Store how the trial ended, and say it; one that has not ended stays running.

        A trial that was stopped at a rung is PRUNED, with its values there. So are a diverged training and one that did not fit into
        memory, which TPE takes for the worst results, since the same values end the same way; any other failure is FAIL, from which no sampler learns, and which the same command tries again.
        """
        if outcome.kind == "busy":
            say(
                f"trial {trial.number}: another process is running in {self.folder(trial).path}; its result is waited for"
            )
            return
        if outcome.kind == "interrupted":
            self._interrupted.add(trial.number)
            say(f"trial {trial.number}: interrupted; the same command goes on with it")
            return
        from optuna.trial import TrialState

        if outcome.kind == "complete":
            self.study.tell(trial.number, list(outcome.values), skip_if_finished=True)
            measured = zip(self.settings.objectives, outcome.values, strict=True)
            say(f"trial {trial.number}: " + ", ".join(f"{name} {value:.6g}" for name, value in measured))
            return
        number = self._id_of(trial)
        self.storage.set_trial_user_attr(number, REASON, outcome.reason[:1000])
        self.storage.set_trial_user_attr(number, ENDED, outcome.kind)
        state = TrialState.PRUNED if outcome.kind in ("pruned", "diverged", "infeasible") else TrialState.FAIL
        self.study.tell(trial.number, state=state, skip_if_finished=True)
        how = {"error": "failed", "infeasible": "did not fit into memory"}.get(outcome.kind, outcome.kind)
        say(f"trial {trial.number}: {how}: {outcome.reason[:300]}")


def is_finished(trial: "FrozenTrial") -> bool:
    """Whether the trial has a result, or ended as its values always will."""
    return trial.state.name in ("COMPLETE", "PRUNED")


def _is_running(trial: "FrozenTrial") -> bool:
    return trial.state.name == "RUNNING"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"
