"""What a paper says about the set-up of some runs, from their folders: models, data, hardware, software, time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import Job, comparable
from glmtuner.report.paper.references import Registry, Use
from glmtuner.report.ranking import Ranking
from glmtuner.run_folder.files import is_number, read_lines
from glmtuner.run_folder.names import LOSSES, PREDICTIONS


@dataclass(frozen=True)
class ModelFact:
    """A model that was trained or evaluated."""

    id: str  # on the hub, or the folder
    revision: str
    parameters: tuple[int, ...]  # as measured by the runs
    licence: str | None
    cite: tuple[str, ...] | None  # None: the registry does not know it

    @property
    def name(self) -> str:
        """The last part of its id."""
        return Path(self.id).name


@dataclass(frozen=True)
class MethodFact:
    """A method, with what comes with it, and the numbers of parameters that it trained."""

    use: Use | None  # None: the registry does not know it
    kind: str  # finetuning_type of the config
    extras: tuple[Use, ...]
    trained: tuple[int, ...]


@dataclass(frozen=True)
class DataFact:
    """A data set as the runs read it."""

    name: str
    trains: bool
    evaluates: bool
    records: tuple[int, ...]  # as counted by the runs; several if they differ
    skipped: int  # broken records, the most of a run
    shortened: int
    source: str | None
    licence: str | None
    cite: tuple[str, ...] | None


@dataclass(frozen=True)
class Facts:
    """The set-up of the finished runs of a report."""

    jobs: list[Job]
    models: list[ModelFact]
    methods: list[MethodFact]
    data: list[DataFact]
    uses: dict[str, list[Use]]  # objective, optimizer, parallel, metric: those of any run
    evaluated: tuple[int, ...]  # records that runs were evaluated on; several if they differ
    seconds: list[float]  # of training, of each run that measured it
    hardware: list[Mapping[str, Any]]  # entries of `hardware` in provenance.json
    python: list[str]
    packages: dict[str, list[str]]  # versions by distribution
    commits: list[str]  # of glmtuner
    repositories: list[str]  # the commits of the user's own repository
    unreadable: list[str] = field(default_factory=list)  # what could not be read, in sentences

    @property
    def seeds(self) -> list[str]:
        """The seeds of the runs, sorted by their values."""
        return sorted({job.seed for job in self.jobs}, key=lambda seed: (len(seed), seed))

    def values(self, key: str) -> list[Any]:
        """The different values of a key, in the order of the runs."""
        return distinct(job.values.get(key) for job in self.jobs)


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values that differ, each once."""
    found = {comparable(value): value for value in values}
    return list(found.values())


def collect(ranking: Ranking, registry: Registry) -> Facts:
    """The facts about the finished runs of a ranking."""
    jobs = [job for row in ranking.rows for job in row.jobs]
    unreadable: list[str] = []
    provenances = [_provenance(job, unreadable) for job in jobs]
    kinds = ("objective", "optimizer", "parallel", "metric")
    trained = [job for job in jobs if job.values.get("trainer.do_train")]
    commits = [str(each["glmtuner_commit"]) for each in provenances if each.get("glmtuner_commit")]
    repositories = [
        f"{git['commit']}{'-dirty' if git.get('dirty') else ''}" for each in provenances if (git := each.get("git"))
    ]
    return Facts(
        jobs=jobs,
        models=_models(jobs, registry),
        methods=_methods(trained, registry),
        data=_data(jobs, provenances, registry),
        uses={
            kind: distinct_uses(registry, jobs if kind == "metric" else trained, kind) for kind in kinds
        },
        evaluated=tuple(sorted({count for job in jobs if (count := _num_evaluated(job))})),
        seconds=[job.metrics["train_runtime"] for job in jobs if is_number(job.metrics.get("train_runtime"))],
        hardware=distinct(machine for each in provenances for machine in each.get("hardware", []) if isinstance(machine.get("name"), str)),
        python=distinct(each["python"] for each in provenances if isinstance(each.get("python"), str)),
        packages=_packages(provenances),
        commits=distinct(commits),
        repositories=distinct(repositories),
        unreadable=unreadable,
    )  # fmt: skip


def distinct_uses(registry: Registry, jobs: Sequence[Job], kind: str) -> list[Use]:
    """The rules of a kind that fit any of the jobs, each once."""
    return list({id(use): use for job in jobs for use in registry.uses_of(job.values, kind)}.values())


def _provenance(job: Job, unreadable: list[str]) -> dict[str, Any]:
    """provenance.json of the job; empty, with a sentence in `unreadable`, if it is damaged or missing."""
    try:
        found = job.folder.provenance()
    except CheckpointError as error:
        unreadable.append(f"{job.name}: {' '.join(str(error).split())}")
        return {}
    if not found:
        unreadable.append(f"{job.name}: it has no provenance.json")
    return found


def _models(jobs: Sequence[Job], registry: Registry) -> list[ModelFact]:
    sizes: dict[tuple[str, str], set[int]] = {}
    for job in jobs:
        key = str(job.values.get("model.model_name_or_path", "")), str(job.values.get("model.model_revision", "main"))
        size = job.metrics.get("total_parameters")
        sizes.setdefault(key, set()).update([int(size)] if is_number(size) else [])
    facts = []
    for (name, revision), found in sizes.items():
        asset = registry.model(name)
        cite = tuple(asset.cite) if asset else None
        facts.append(ModelFact(name, revision, tuple(sorted(found)), asset.licence if asset else None, cite))
    return facts


def _methods(jobs: Sequence[Job], registry: Registry) -> list[MethodFact]:
    found: dict[tuple[Any, ...], set[int]] = {}
    uses: dict[tuple[Any, ...], tuple[Use | None, str, tuple[Use, ...]]] = {}
    for job in jobs:
        method, extras = registry.uses_of(job.values, "method"), registry.uses_of(job.values, "with")
        kind = str(job.values.get("finetuning.finetuning_type"))
        if kind == "peft":
            kind = str(job.values.get("finetuning.peft_type"))
        key = (kind, *map(id, extras))
        uses[key] = (method[0] if method else None, kind, tuple(extras))
        size = job.metrics.get("trained_parameters")
        found.setdefault(key, set()).update([int(size)] if is_number(size) else [])
    return [MethodFact(*uses[key], tuple(sorted(sizes))) for key, sizes in found.items()]


def _data(jobs: Sequence[Job], provenances: Sequence[Mapping[str, Any]], registry: Registry) -> list[DataFact]:
    names = dict.fromkeys(
        str(name)
        for job in jobs
        for key in ("data.dataset", "data.eval_dataset")
        for name in (job.values.get(key) or [])
    )
    facts = []
    for name in names:
        entries = [entry for each in provenances if isinstance(entry := each.get("data", {}).get(name), dict)]
        sources = distinct(entry.get("source") for entry in entries if isinstance(entry.get("source"), str))
        licences = distinct(entry.get("license") for entry in entries if isinstance(entry.get("license"), str))
        asset = registry.dataset(sources[0]) if len(sources) == 1 else None
        facts.append(
            DataFact(
                name,
                trains=any(_trains_on(job, name) for job in jobs),
                evaluates=any(_is_evaluated_on(job, name) for job in jobs),
                records=tuple(sorted({int(entry["records"]) for entry in entries if is_number(entry.get("records"))})),
                skipped=max((int(_number(entry, "bad_records")) for entry in entries), default=0),
                shortened=max((int(_number(entry, "prompts_cut") + _number(entry, "answers_cut")) for entry in entries), default=0),
                source=sources[0] if len(sources) == 1 else None,
                licence=licences[0] if len(licences) == 1 and licences[0] != "unknown" else None,
                cite=tuple(asset.cite) if asset else None,
            )
        )  # fmt: skip
    return facts


def _trains_on(job: Job, name: str) -> bool:
    return bool(job.values.get("trainer.do_train")) and name in (job.values.get("data.dataset") or [])


def _is_evaluated_on(job: Job, name: str) -> bool:
    if not (job.values.get("trainer.do_eval") or job.values.get("trainer.do_predict")):
        return False
    held_out = job.values.get("data.dev_ratio") or not job.values.get("trainer.do_train")
    return name in (job.values.get("data.eval_dataset") or (job.values.get("data.dataset") if held_out else None) or [])


def _number(entry: Mapping[str, Any], key: str) -> float:
    return entry[key] if is_number(entry.get(key)) else 0


def _num_evaluated(job: Job) -> int:
    """The records that the job was evaluated on, by the files that hold their scores; 0 without any."""
    try:
        return max(sum(1 for _ in read_lines(job.folder / name)) for name in (PREDICTIONS, LOSSES))
    except CheckpointError:  # the ranking has named it
        return 0


def _packages(provenances: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for each in provenances for name in each.get("packages", {}))
    versions = {
        name: distinct(
            version for each in provenances if isinstance(version := each.get("packages", {}).get(name), str)
        )
        for name in names
    }
    return {name: found for name, found in versions.items() if found}
