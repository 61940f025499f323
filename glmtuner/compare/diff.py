"""`diff` of two or more runs: only what differs, the first run being what the others are compared with."""

from collections.abc import Sequence
from pathlib import Path

from glmtuner.compare.document import Document, Section
from glmtuner.compare.facts import KINDS, Difference, config_differences, facts_of, input_differences
from glmtuner.compare.loaded import LoadedRun, describe, labels_of, load_run
from glmtuner.compare.records import changes
from glmtuner.compare.scores import answers_table, costs_table, metrics_table
from glmtuner.compare.steps import Steps, compare_steps, is_cost, rounding_of
from glmtuner.compare.tensors import Tensors, compare_tensors, starting_weights, weights_in

TITLES = {
    "data": "Data", "weights": "Weights that they start from", "tokenizer": "Tokenizer", "template": "Template", "plugins": "Plugins",
    "packages": "Packages", "code": "Code", "git": "Git state of the folder",
    "machine": "Machine",
}  # fmt: skip
MAX_CODE = 12  # rooms of the package that are listed one by one


def diff_runs(paths: Sequence[Path]) -> Document:
    """The comparison of the runs in these folders. Raises CheckpointError where one cannot be read."""
    runs = [load_run(path, label) for path, label in zip(paths, labels_of(paths), strict=True)]
    sections = [*state_section(runs), *config_sections(runs), *input_sections(runs), *result_sections(runs)]
    title = f"{' and '.join(run.label for run in runs)}"
    names = [section.title for section in sections if section.is_difference]
    if not names:
        verdict = f"The runs are equal: {equal_words(runs)}."
        return Document(title, verdict, [section for section in sections if section.title == NOT_COMPARED])
    listed = ", ".join(name[0].lower() + name[1:] for name in names)
    costs = Section("Time and memory", (), *costs_table(runs), is_difference=False)
    return Document(title, f"The runs differ in: {listed}.", [*sections, *([costs] if costs.rows else [])], runs)


NOT_COMPARED, IRRELEVANT = "Not compared", "Without effect on results"


def equal_words(runs: Sequence[LoadedRun]) -> str:
    """What was compared and found equal, in words."""
    first = runs[0]
    parts = ["configuration", "data", "packages", "code"]
    steps = len(compare_steps(first.history, first.history).common)
    parts += [f"{steps:,} logged steps"] if steps else []
    measured = [name for name in first.metrics if not is_cost(name)]
    parts += [f"{len(measured):,} metrics"] if measured else []
    parts += ["answers"] if (first.folder / "predictions.jsonl").is_file() else []
    parts += ["the bytes of the trained weights"] if weights_in(first.folder) else []
    return ", ".join(parts)


def state_section(runs: Sequence[LoadedRun]) -> list[Section]:
    """The runs and their states, if one of them is not finished."""
    if all(run.is_finished for run in runs):
        return []
    rows = [[run.label, describe(run)] for run in runs]
    same = len({run.job.state for run in runs}) == 1
    return [Section("State", ["They are compared as far as they got."], ["run", "state"], rows, is_difference=not same)]


def config_sections(runs: Sequence[LoadedRun]) -> list[Section]:
    """The settings that differ, and for information those on which no result depends."""
    matters, others = config_differences(runs)
    header = ["key", *(run.label for run in runs)]
    sections = [Section("Configuration", (), header, rows_of(matters))] if matters else []
    if others:
        sections.append(Section(IRRELEVANT, (), header, rows_of(others), is_difference=False))
    return sections


def rows_of(differences: Sequence[Difference]) -> list[list[str]]:
    return [[each.name, *each.shown()] for each in differences]


def input_sections(runs: Sequence[LoadedRun]) -> list[Section]:
    """What they were computed from and differs: data, weights, tokenizer, template, packages, code, machine."""
    found, unknown = input_differences([facts_of(run.provenance) for run in runs])
    sections = []
    for kind in KINDS[1:]:
        own = [each for each in found if each.kind == kind]
        if not own:
            continue
        sentences = []
        if kind == "code" and len(own) > MAX_CODE:
            sentences.append(f"{len(own)} of glmtuner's rooms differ, of which {MAX_CODE} are listed.")
            own = own[:MAX_CODE]
        if kind == "data":
            for other in runs[1:]:
                sentences += data_sentences(runs[0], other)
        if kind == "weights":
            for other in runs[1:]:
                sentences += weight_sentences(runs[0], other)
        sections.append(Section(TITLES[kind], sentences, ["", *(run.label for run in runs)], rows_of(own)))
    lacking = [run.label for run in runs if not facts_of(run.provenance).keys() >= {"packages", "code", "weights"}]
    if unknown:
        sentence = (
            f"{', '.join(unknown)}: not recorded by {', '.join(lacking) or 'one of them'}, an earlier version's run"
        )
        sections.append(Section(NOT_COMPARED, [sentence], is_difference=False))
    return sections


def data_sentences(before: LoadedRun, after: LoadedRun) -> list[str]:
    """Which records of the datasets of both changed, and datasets of other names that hold the same records."""
    one, other = (run.provenance.get("data", {}) for run in (before, after))
    labels = (before.label, after.label)
    sentences = []
    for name in one:
        if name in other and one[name].get("records_sha256") != other[name].get("records_sha256"):
            sentences += changes(before, after, name, labels)
        elif name in other and one[name].get("sha256") != other[name].get("sha256"):
            sentences.append(f"{name}: its files have other bytes and hold the same records")
    for name in one.keys() - other.keys():
        content = one[name].get("records_sha256")
        same = [new for new in other.keys() - one.keys() if content and other[new].get("records_sha256") == content]
        sentences += [f"{name} of {labels[0]} and {new} of {labels[1]} hold the same records" for new in same]
    return sentences


def weight_sentences(before: LoadedRun, after: LoadedRun) -> list[str]:
    """Which tensors of the base models differ, where the files of both are still there."""
    one, other = starting_weights(before), starting_weights(after)
    if one is None or other is None:
        gone = [run.label for run, files in ((before, one), (after, other)) if files is None]
        return [
            f"which tensors differ is not known: the files of {' and '.join(gone)} are no longer there as they were"
        ]
    tensors = compare_tensors(one, other)
    return [] if tensors.same_bytes else [f"{before.label} and {after.label}: {tensor_sentence(tensors)}"]


def result_sections(runs: Sequence[LoadedRun]) -> list[Section]:
    """What came out and differs: history, metrics, answers, weights."""
    sections = []
    first, *others = runs
    sentences: list[str] = []
    for other in others:
        steps = compare_steps(first.history, other.history)
        if not steps.are_equal:
            sentences += history_sentences(steps, first, other)
    if sentences:
        sections.append(Section("History", sentences))
    header, rows, notes = metrics_table(runs)
    if rows:
        sections.append(Section("Metrics", notes, header, rows))
    header, rows, notes = answers_table(runs)
    if rows or notes:
        sections.append(Section("Answers", notes, header, rows, has_texts=True))
    sentences = []
    for other in others:
        files = weights_in(first.folder), weights_in(other.folder)
        tensors = compare_tensors(*files)
        if not tensors.same_bytes:
            sentences.append(f"{first.label} and {other.label}: {tensor_sentence(tensors)}")
    if sentences:
        sections.append(Section("Trained weights", sentences))
    return sections


def history_sentences(steps: Steps, before: LoadedRun, after: LoadedRun) -> list[str]:
    """Where two histories part, by how much at most, and which steps only one of them has."""
    labels = f"{before.label} and {after.label}"
    sentences = []
    if steps.first is not None:
        sentences.append(
            f"{labels}: first different at step {steps.first.step}, {steps.first.name} {steps.first.before:.6g} and {steps.first.after:.6g}"
        )
    beyond = steps.first_beyond(max(rounding_of(before.values), rounding_of(after.values)))
    if beyond is not None and beyond is not steps.first:
        sentences.append(
            f"{labels}: by more than rounding from step {beyond.step} on, {beyond.name} {beyond.before:.6g} and {beyond.after:.6g}"
        )
    if (largest := steps.largest_loss or steps.largest) is not None:
        sentences.append(
            f"{labels}: largest difference at step {largest.step}, {largest.name} {largest.before:.6g} and {largest.after:.6g} "
            f"(relative {largest.relative:.2g})"
        )
    for label, only in zip((before.label, after.label), steps.only, strict=True):
        if only:
            sentences.append(f"only {label} logged {_range(only)}")
    if steps.missing:
        step, name = steps.missing[0]
        sentences.append(
            f"{labels}: {name} at step {step} is only in one of them"
            + (f", and {len(steps.missing) - 1} more" if len(steps.missing) > 1 else "")
        )
    return sentences


def _range(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps):,} steps, {steps[0]} to {steps[-1]}"


def tensor_sentence(tensors: Tensors) -> str:
    """How far apart trained weights are, in words."""
    parts = []
    if tensors.differing:
        parts.append(
            f"{tensors.differing:,} of {tensors.tensors:,} tensors differ, by at most {tensors.largest:.2g} in {tensors.name} "
            f"(norm of the difference {tensors.relative:.2g} of the tensor's)"
        )
    elif tensors.other_bytes and tensors.tensors:
        parts.append("the same values in files with other headers")
    if tensors.unlike:
        more = f" and {len(tensors.unlike) - 4} more" if len(tensors.unlike) > 4 else ""
        parts.append("; ".join(tensors.unlike[:4]) + more)
    return "; ".join(parts)
