"""`diff` of sweeps: jobs are matched by their swept values, then compared as runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtuner.compare.diff import TITLES, data_sentences
from glmtuner.compare.document import Document, Section
from glmtuner.compare.facts import config_differences, facts_of, input_differences
from glmtuner.compare.loaded import LoadedRun, labels_of, load_run
from glmtuner.compare.scores import MetricDifference, metric_differences, metric_value
from glmtuner.compare.steps import compare_steps
from glmtuner.compare.tensors import same_content, weights_in
from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import SEEDS, Job, comparable, read_jobs, value_of, varied_knobs
from glmtuner.report.leaderboard import method_note
from glmtuner.report.ranking import resolve_objective


@dataclass(frozen=True)
class Matched:
    """The jobs of two sweeps that have the same swept values."""

    label: str
    before: LoadedRun
    after: LoadedRun


def diff_sweeps(paths: Sequence[Path]) -> Document:
    """The comparison of each sweep with the first one. Raises CheckpointError where a sweep has no job that can be compared."""
    labels = labels_of(paths)
    jobs = [read_jobs(path) for path in paths]
    for path, each in zip(paths, jobs, strict=True):
        if not each:
            raise CheckpointError(
                f"diff {path}: the sweep has no job yet; wait until one has started, or name another sweep"
            )
    sections: list[Section] = []
    compared = 0
    for label, other in zip(labels[1:], jobs[1:], strict=True):
        found, count = pair_sections(jobs[0], other, (labels[0], label), len(paths) > 2)
        sections, compared = [*sections, *found], compared + count
    names = dict.fromkeys(section.title.partition(" (")[0].lower() for section in sections if section.is_difference)
    verdict = (
        f"The sweeps differ in: {', '.join(names)}." if names
        else f"The sweeps are equal: {compared:,} pairs of jobs with the same configuration, data, packages, code, history, metrics "
        "and trained weights."
    )  # fmt: skip
    return Document(" and ".join(labels), verdict, sections)


def swept_keys(*sweeps: Sequence[Job]) -> list[str]:
    """The keys that any of the sweeps varies, seeds last."""
    keys = dict.fromkeys(key for jobs in sweeps for key in varied_knobs(jobs))
    for seed in SEEDS:
        if any(len({comparable(value_of(job, seed)) for job in jobs}) > 1 for jobs in sweeps):
            keys[seed] = None
    return list(keys)


def by_setting(jobs: Sequence[Job], keys: Sequence[str]) -> dict[tuple[str, ...], Job]:
    """The jobs by their values of the keys; of two jobs with the same ones, the first."""
    found: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        found.setdefault(tuple(comparable(value_of(job, key)) for key in keys), job)
    return found


def pair_sections(
    before: Sequence[Job], after: Sequence[Job], labels: tuple[str, str], named: bool
) -> tuple[list[Section], int]:
    """What differs between two sweeps, and the number of jobs that were matched; `named`: titles say which two they are."""
    keys = swept_keys(before, after)
    one, other = by_setting(before, keys), by_setting(after, keys)
    behind = f" ({labels[0]} and {labels[1]})" if named else ""
    sections = []
    lonely = [
        [job.label(keys), label, job.state.value]
        for label, own, others in ((labels[0], one, other), (labels[1], other, one))
        for setting, job in own.items()
        if setting not in others
    ]
    if lonely:
        sections.append(Section(f"Jobs that only one has{behind}", (), ["job", "only in", "state"], lonely))
    for label, jobs, found in ((labels[0], before, one), (labels[1], after, other)):
        if len(found) < len(jobs):
            sentence = (
                f"{label}: {len(jobs) - len(found)} jobs have the same swept values as another one, and are left out"
            )
            sections.append(Section(f"Not compared{behind}", [sentence], is_difference=False))
    common = [(setting, job, other[setting]) for setting, job in one.items() if setting in other]
    states = [
        [job.label(keys), job.state.value, twin.state.value] for _, job, twin in common if job.state != twin.state
    ]
    if states:
        sections.append(Section(f"States{behind}", (), ["job", *labels], states))
    matched = [
        Matched(job.label(keys), load_run(job.folder.path, labels[0]), load_run(twin.folder.path, labels[1]))
        for _, job, twin in common
        if job.values and twin.values
    ]
    if not matched:
        sentence = (
            f"no job of {labels[0]} has the swept values of one of {labels[1]}: {', '.join(keys) or 'none is swept'}"
        )
        return [*sections, Section(f"Jobs{behind}", [sentence])], 0
    sections += [
        *fixed_sections(matched, labels, behind),
        *metric_sections(matched, labels, behind),
        *output_sections(matched, behind),
    ]
    return sections, len(matched)


def fixed_sections(matched: Sequence[Matched], labels: tuple[str, str], behind: str) -> list[Section]:
    """What differs in matched jobs, and so is not swept: settings, data, packages and so on, with the number of jobs."""
    settings: Counter[tuple[str, ...]] = Counter()
    inputs: dict[str, Counter[tuple[str, ...]]] = {}
    sentences: dict[str, None] = {}
    for pair in matched:
        runs = (pair.before, pair.after)
        settings.update((each.name, *each.shown()) for each in config_differences(runs)[0])
        for each in input_differences([facts_of(run.provenance) for run in runs])[0]:
            inputs.setdefault(each.kind, Counter())[(each.name, *each.shown())] += 1
        sentences |= dict.fromkeys(data_sentences(*runs))
    header = ["", *labels, f"jobs, of {len(matched)}"]

    def rows(counted: Counter[tuple[str, ...]]) -> list[list[str]]:
        return [[*cells, str(count)] for cells, count in counted.items()]

    sections = [Section(f"Settings that are not swept{behind}", (), header, rows(settings))] if settings else []
    for kind, counted in inputs.items():
        told = [*sentences] if kind == "data" else []
        sections.append(Section(f"{TITLES[kind]}{behind}", told, header, rows(counted)))
    return sections


def metric_sections(matched: Sequence[Matched], labels: tuple[str, str], behind: str) -> list[Section]:
    """The objective of each pair of jobs in which it differs, and how often the other metrics do."""
    objective, _ = resolve_objective([run.job for pair in matched for run in (pair.before, pair.after)])
    found: list[tuple[str, MetricDifference]] = [
        (pair.label, each) for pair in matched for each in metric_differences(pair.before, pair.after)
    ]
    if not found:
        return []
    rows = [
        [
            label,
            *(metric_value(value) for value in (each.before, each.after)),
            each.shown(),
        ]
        for label, each in found
        if each.name == objective
    ]
    others = Counter(each.name for _, each in found if each.name != objective)
    notes = [f"{name} differs in {count} of {len(matched)} pairs of jobs" for name, count in others.items()]
    reasons = dict.fromkeys(each.why_not for _, each in found if each.name == objective and each.why_not)
    notes += [f"{objective}: no interval where {reason}" for reason in reasons]
    notes += [method_note()] if any(each.interval for _, each in found if each.name == objective) else []
    header = ["job", *(f"{objective} of {label}" for label in labels), f"{labels[1]} - {labels[0]}"] if rows else []
    return [Section(f"Metrics{behind}", notes, header, rows)]


def output_sections(matched: Sequence[Matched], behind: str) -> list[Section]:
    """In how many pairs of jobs histories and trained weights are not the same."""
    sections, partings, weights = [], [], 0
    for pair in matched:
        steps = compare_steps(pair.before.history, pair.after.history)
        if not steps.are_equal:
            partings.append(
                steps.first.step
                if steps.first
                else min([*steps.only[0], *steps.only[1], *(step for step, _ in steps.missing)])
            )
        one, other = weights_in(pair.before.folder), weights_in(pair.after.folder)
        weights += one.keys() != other.keys() or not all(same_content(one[name], other[name]) for name in one)
    if partings:
        sentence = f"the histories of {len(partings)} of {len(matched)} pairs of jobs differ, the first at step {min(partings)}"
        sections.append(Section(f"History{behind}", [sentence]))
    if weights:
        sections.append(
            Section(f"Trained weights{behind}", [f"those of {weights} of {len(matched)} pairs of jobs differ"])
        )
    return sections
