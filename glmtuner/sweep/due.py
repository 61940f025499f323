"""Which jobs of a sweep are to be submitted to SLURM, and which are queued, finished or given up already."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import get_overrides_dirname
from omegaconf import DictConfig, open_dict, read_write

from glmtuner.config.overrides import parse
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.sweep.attempts import read_attempts
from glmtuner.sweep.queue import in_queue
from glmtuner.sweep.submissions import FOLDER, JOBS, Submission, read_submissions
from glmtuner.sweep.sweepers import BASIC_TARGET

Jobs = Sequence[tuple[int, Sequence[str]]]  # numbers and overrides


def check_detached(hydra: DictConfig) -> None:
    """Raise ConfigError if `hydra.launcher.wait` is no boolean, or false for a sweeper that needs results between its jobs."""
    wait = hydra.launcher.get("wait", True)
    if not isinstance(wait, bool):
        raise ConfigError(
            f"hydra.launcher.wait={wait}: legal: true (wait for the jobs) and false (submit them and return)"
        )
    if not wait and hydra.sweeper._target_ != BASIC_TARGET:
        name = hydra.runtime.choices.get("hydra/sweeper", hydra.sweeper._target_)
        raise ConfigError(
            f"hydra.launcher.wait=false with hydra/sweeper={name}: a search chooses its next jobs by the results of the earlier ones, "
            "so its command has to stay; leave hydra.launcher.wait=false out and type the command in tmux or screen, or leave out the "
            "sweeper to submit every combination"
        )


def folder_names(config: DictConfig, jobs: Jobs) -> list[str]:
    """The name of each job's folder, as Hydra will compute it."""
    own = copy.deepcopy(config)
    dirname = own.hydra.job.config.override_dirname
    names = []
    with read_write(own), open_dict(own):
        for number, overrides in jobs:
            own.hydra.job.num = number
            own.hydra.job.override_dirname = get_overrides_dirname(
                parse(overrides), [*dirname.exclude_keys], dirname.item_sep, dirname.kv_sep
            )
            names.append(str(own.hydra.sweep.subdir))
    return names


def queued_submissions(root: Path, names: Sequence[str]) -> dict[str, str]:
    """SLURM's id of each of these jobs that was submitted before and is in the queue; raises ConfigError if SLURM cannot tell."""
    known = {name: each.id for name, each in read_submissions(root).items() if name in names}
    queued = in_queue(known.values())
    if queued is None:
        attempts = {name: read_attempts(root, name) for name in known}
        lost = [number for name, number in known.items() if not ((found := attempts[name]) and found.has_ended)]
        if lost:
            raise ConfigError(
                f"hydra/launcher=slurm: squeue does not answer, and SLURM's jobs {', '.join(lost[:5])} of this sweep, which were "
                "submitted before, may still be in the queue; type the same command once squeue answers, or remove "
                f"{root / FOLDER / JOBS} if they are not"
            )
        return {}
    return {name: number for name, number in known.items() if number in queued}


def is_due(root: Path, name: str, overrides: Sequence[str], detached: bool) -> bool:
    """Whether the job is to be submitted; one that SLURM stopped is not, and of a detached sweep no finished one."""
    attempts, folder = read_attempts(root, name), RunFolder(root / name)
    if attempts is not None and attempts.stopped is not None:
        say(f"not submitted: {name}: {attempts.stopped}")
        return False
    if not detached or "trainer.overwrite_output_dir=true" in overrides:
        return True
    failure = folder.failure()
    if folder.is_finished:
        say(f"finished before, not submitted: {folder.path}")
    elif failure and failure["kind"] == "infeasible":
        say(
            f"did not fit into memory before, not submitted (trainer.overwrite_output_dir=true runs it again): {folder.path}"
        )
    else:
        return True
    return False


def has_queued_jobs(root: Path, since: Mapping[str, Submission]) -> bool:
    """Whether jobs of the sweep were submitted after it had those of `since`, or are in the queue."""
    known = read_submissions(root)
    return known != since or bool(in_queue(each.id for each in known.values()))
