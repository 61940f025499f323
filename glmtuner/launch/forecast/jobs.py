"""The jobs of a forecast: which cost the same, their probes, and what each of them takes."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.compose import Composed
from glmtuner.config.groups import Engine
from glmtuner.config.paths import PACKAGE_DATA, cache_root, model_source
from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.data.files import local_path
from glmtuner.data.splits import dataset_entries
from glmtuner.distributed import ranks
from glmtuner.distributed.visible import VARIABLES, visible_gpus
from glmtuner.errors import CheckpointError
from glmtuner.launch.forecast.cost import Cost, Counts, Probe, Seconds, cost_of, counts_of, probe_of
from glmtuner.launch.forecast.schedule import Launcher, submissions
from glmtuner.launch.places import catalogue_dirs
from glmtuner.run_folder.acquire import RESUME_IGNORED_KEYS
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, step_of
from glmtuner.run_folder.files import is_number, read_object, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import SPENT
from glmtuner.run_folder.provenance import PACKAGES, version_of
from glmtuner.run_folder.redaction import flatten

# Keys on which no step's duration depends: those of the schedule and the optimizer's rates, and how often a run does what.
FREE = (
    *RESUME_IGNORED_KEYS, "name", "objective", "tracker.*", "trainer.seed", "trainer.data_seed", "trainer.run_name",
    "trainer.learning_rate", "trainer.weight_decay", "trainer.adam_*", "trainer.warmup_*", "trainer.lr_scheduler_*",
    "trainer.layerwise_lr_decay", "finetuning.lora_alpha", "finetuning.loraplus_*", "trainer.max_steps",
    "trainer.num_train_epochs", "trainer.save_steps", "trainer.save_strategy", "trainer.save_total_limit", "trainer.eval_steps",
    "trainer.eval_strategy", "trainer.eval_delay", "trainer.eval_on_start", "trainer.logging_*", "trainer.early_stopping_*",
    "trainer.load_best_model_at_end", "trainer.metric_for_best_model", "trainer.greater_is_better",
)  # fmt: skip
HOURS = 3600.0
NO_TIME = Seconds()
MOST_REASON = 300  # characters of a probe's error


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep, or a single run: its configuration, what to call it, and its folder, if that is known."""

    composed: Composed
    label: str
    folder: Path | None = None
    count: int = 1  # of jobs like it, as the trials of a search


@dataclass(frozen=True, kw_only=True)
class JobForecast:
    """What a job will take; without `cost` the `reason` says why it is not known."""

    label: str
    count: int = 1
    state: str = ""  # finished, or `from step n`
    source: str = ""  # of the times: a probe, or a finished run
    reason: str = ""
    memory_bytes: int | None = None  # the larger of the estimate for the training and what the probe itself took
    estimated_bytes: int | None = None
    measured_bytes: int | None = None  # the probe's own peak
    cost: Cost | None = None
    seconds: Seconds = NO_TIME  # with what submissions repeat, without what jobs of one process share
    submissions: int | None = 1  # None: it would never end
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    kilowatt_hours: float | None = None
    money: float | None = None

    @property
    def known(self) -> bool:
        """Whether its hours are known."""
        return self.state == "finished" or (self.cost is not None and self.submissions is not None)


def cost_key(composed: Composed) -> str:
    """Equal for runs whose steps, evaluations and answers take equally long."""
    values = flatten(OmegaConf.to_container(composed.config, enum_to_str=True))
    kept = {key: value for key, value in values.items() if not any(fnmatchcase(key, free) for free in FREE)}
    trainer = composed.run.trainer
    kept["evaluates"] = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
    return json.dumps(kept, sort_keys=True, default=str)


def probes_of(jobs: Sequence[Job], launcher: Launcher) -> dict[str, Probe | str]:
    """A probe for each `cost_key` of the jobs, or the reason why there is none; each is measured once and kept in the cache."""
    found: dict[str, Probe | str] = {}
    firsts = {cost_key(job.composed): job for job in reversed(jobs)}
    for number, (key, job) in enumerate(reversed(firsts.items()), start=1):
        run = job.composed.run
        if reason := not_probed(run, launcher):
            found[key] = reason
            continue
        file = cache_root() / "forecasts" / f"{_digest(key, job.composed)}.json"
        if (known := _read(file)) is not None:
            found[key] = known
            continue
        say(f"forecast: a few steps of {job.label} are measured ({number} of {len(firsts)})")
        found[key] = result = probed(job.composed)
        if isinstance(result, Probe):
            write_json(file, dataclasses.asdict(result))
            if result.tokenizing.wall > 1:
                say(
                    f"forecast: data were tokenized in {result.tokenizing.wall:.0f} s; the jobs read them from the cache"
                )
    return found


def not_probed(run: Run, launcher: Launcher) -> str | None:
    """Why no steps of the run can be measured on this machine; None if they can."""
    if launcher.remote and not visible_gpus() and not run.trainer.use_cpu:
        return "the jobs run on other machines, and this one has no GPU"
    if run.parallel.sharded:
        return f"parallel={run.parallel.name} shards a model over processes, and a probe is one process"
    if (sequence := run.parallel.ranks_per_row) > 1:
        return f"parallel.sequence={sequence} shares a row among processes, and a probe is one process"
    if run.generation.engine is Engine.vllm:
        return "generation.engine=vllm generates in processes of its own"
    source = model_source(run.model.model_name_or_path)
    if not Path(source).is_dir() and not _is_cached(run, source):
        return "its weights are not on this machine yet"
    return None


def _is_cached(run: Run, source: str) -> bool:
    """Whether the hub's cache has weights of the model."""
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    options: dict[str, Any] = {"cache_dir": run.model.cache_dir, "revision": run.model.model_revision}
    return any(isinstance(try_to_load_from_cache(source, name, **options), str) for name in names)


def probed(composed: Composed) -> Probe | str:
    """The probe of a run, in a process of its own; a text with the reason if it failed."""
    overrides = [text for text in composed.overrides if not text.startswith(("trainer.output_dir=", "hydra"))]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    with tempfile.TemporaryDirectory(prefix="glmtuner-forecast-") as folder:
        result = Path(folder) / "probe.json"
        command = [
            sys.executable,
            "-m",
            "glmtuner.launch.forecast.probe",
            "--result",
            str(result),
            *composed.flags,
            *overrides,
        ]
        before = os.times()
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        if done.returncode == 0 and result.is_file():
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            probe = probe_of(read_object(result))
            # it has written when it was done; what came after is the end of a process
            return dataclasses.replace(probe, ending=Seconds(time.time(), used) - probe.ending)
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"its probe failed: {last[0][:MOST_REASON]}"


def _digest(key: str, composed: Composed) -> str:
    """The name of a probe in the cache: of the run, its files, the versions, the machine, and how much of it this process may use."""
    threads = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *VARIABLES.values())]
    versions = {name: version_of(name) for name in PACKAGES}
    machine = [platform.node(), platform.machine(), os.cpu_count(), *threads]
    text = json.dumps([key, _files(composed), versions, machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _files(composed: Composed) -> list[tuple[str, int, int]]:
    """The local files of a run's data, model and checkpoints: path, size and time of the last change."""
    run = composed.run
    specs = dataset_entries(run, catalogue_dirs(composed))
    places = [local_path(spec, Path(run.data.dataset_dir).expanduser(), PACKAGE_DATA) for spec in specs.values()]
    places += [
        Path(model_source(name)).expanduser() for name in (run.model.model_name_or_path, *run.model.checkpoint_dir)
    ]
    found = []
    for place in filter(None, places):
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        found += [(str(file.resolve()), (about := file.stat()).st_size, about.st_mtime_ns) for file in files]
    return found


def _read(file: Path) -> Probe | None:
    """A probe from the cache; None if there is none, or if it is damaged or of another version."""
    if not file.is_file():
        return None
    try:
        return probe_of(read_object(file))
    except (CheckpointError, KeyError, TypeError, ValueError):
        say(f"forecast: {file} is damaged and is measured again")
        return None


def counts_in(run: Run, probe: Probe, world: int) -> Counts:
    """How often a run on so many processes does what."""
    trainer = run.trainer
    rows = dataclasses.replace(probe.train, batches=-(-probe.train.batches // world))
    generates = trainer.predict_with_generate
    return counts_of(
        trainer,
        rows,
        evaluates=trainer.do_eval,
        predicts=trainer.do_predict,
        generates=generates and probe.evaluated.records > 0,
    )


def steps_done(folder: Path | None) -> int:
    """The step of the newest complete checkpoint of an unfinished job, from which it will go on; 0 without one."""
    if folder is None or not folder.is_dir():
        return 0
    checkpoint, _ = latest_complete_checkpoint(folder)
    return step_of(checkpoint) if checkpoint is not None else 0


def forecast_job(
    job: Job, probe: Probe | str, launcher: Launcher, memory: int | None, *, follows: bool, seen: Seconds | None
) -> JobForecast:
    """The forecast of one job; `follows`: it runs in the process of an earlier one. `seen` is how long an equal run took."""
    run = job.composed.run
    name: dict[str, Any] = {"label": job.label, "count": job.count}
    if job.folder is not None and RunFolder(job.folder).is_finished and not run.trainer.overwrite_output_dir:
        return JobForecast(**name, state="finished", memory_bytes=memory)
    if isinstance(probe, str):
        return JobForecast(**name, reason=probe, memory_bytes=memory)
    world = 1 if launcher.remote else ranks.processes_to_start(run.parallel)
    done = 0 if run.trainer.overwrite_output_dir else steps_done(job.folder)
    cost = cost_of(probe, counts_in(run, probe, world).left(done), world)
    whole, source = cost.seconds, "probe"
    if follows:
        whole = whole - cost.own_process
    if seen is not None and not done:
        whole, source = seen, "finished run"
    times = submissions(cost.start.wall, (whole - cost.start).wall, launcher.limit_s, launcher.notice_s)
    whole += cost.start * ((times or 1) - 1)
    on_gpu = probe.device != "cpu"
    gpus = (launcher.gpus or world) if on_gpu else 0
    gpu_hours, cpu_hours = whole.wall * gpus / HOURS, 0.0 if on_gpu else whole.cpu * world / HOURS
    watts = probe.watts if probe.watts is not None else run.budget.watts
    hours = gpu_hours if on_gpu else whole.wall / HOURS / launcher.at_once
    return JobForecast(
        **name,
        state=f"from step {done}" if done else "",
        source=source,
        memory_bytes=max(memory or 0, probe.peak_bytes),
        estimated_bytes=memory,
        measured_bytes=probe.peak_bytes,
        cost=cost,
        seconds=whole,
        submissions=times,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        kilowatt_hours=None if watts is None else watts * hours / 1000,
        money=run.budget.cost(gpu_hours, cpu_hours),
    )


def seen_runs(root: Path | None) -> dict[str, Seconds]:
    """How long the finished jobs of the sweep took that ended in one attempt, by the name of their folder."""
    if root is None:
        return {}
    attempts: dict[str, list[Seconds]] = {}
    for path in (root / SPENT).glob("*.json"):
        values = read_object(path)
        job, seconds, wall = values.get("job"), values.get("seconds"), values.get("wall")
        if isinstance(job, str) and is_number(seconds) and is_number(wall):
            attempts.setdefault(job, []).append(Seconds(wall, seconds))
    return {job: times[0] for job, times in attempts.items() if len(times) == 1 and RunFolder(root / job).is_finished}
