"""`reproduce`: what is not as it was, then the run again, then both compared step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtuner.compare.again import LEFT_OUT, RESUME, recompose
from glmtuner.compare.document import Document, Section
from glmtuner.compare.facts import Difference, Facts, config_differences, facts_of, input_differences, shown
from glmtuner.compare.loaded import LoadedRun, describe, load_run
from glmtuner.compare.outcome import STEPS, WORDS, Kind, Outcome, outcomes, overall
from glmtuner.compare.records import record_changes, run_records, stored_hashes
from glmtuner.compare.today import Today
from glmtuner.config.compose import Composed
from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.folder import RunFolder

CHECK, CHANGED = "What is not as it was", "Changed"
MAX_CODE = 12


@dataclass(frozen=True)
class Check:
    """What a run would be computed from now, compared with what it was computed from."""

    composed: Composed
    differences: list[Difference]
    document: Document


def check(run: LoadedRun, typed: Sequence[str]) -> Check:
    """Whether code, packages, data, weights, template, tokenizer and machine are those of the run; nothing is run.

    The current folder is that of the run. Raises ConfigError where its configuration cannot be composed today.
    """
    again = recompose(run, typed)
    today = Today(again.composed, run.provenance)
    then, now = facts_of(run.provenance), facts_of(today.provenance)
    if (
        again.composed.run.trainer.resume_from_checkpoint is None and "weights" in then
    ):  # of its own, which it was resumed from
        then["weights"] = {name: value for name, value in then["weights"].items() if not name.startswith(RESUME)}
    both = [kind for kind in then if kind in now]
    found, unknown = input_differences([_only(then, both), _only(now, both)])
    differences = [*again.differences, *found]
    sentences = [*cwd_note(run), *again.notes, *today.problems, *earlier_notes(run)]
    sentences += data_sentences(run, today, found)
    times = today.changed_at(again.composed.run) if found else {}
    started = run.provenance.get("started", "")
    sentences += [
        f"{each.name}: changed last at {times[each.name]}; the run started at {started}"
        for each in found
        if each.name in times
    ]
    lacking = [kind for kind in now if kind not in then and now[kind]]
    if lacking or unknown:
        sentences.append(
            f"{', '.join([*lacking, *unknown])}: not recorded, since an earlier version of glmtuner ran it; whether that is the same "
            "is not known"
        )
    if reasons := why_not_bytes(differences):
        sentences.append(f"Bytes cannot be expected: {reasons}.")
    code = [each for each in differences if each.kind == "code"]
    if len(code) > MAX_CODE:
        sentences.append(f"{len(code)} parts of the code differ, of which {MAX_CODE} are listed.")
        shown_ones = [each for each in differences if each not in code[MAX_CODE:]]
    else:
        shown_ones = differences
    rows = [[each.kind, each.name, *each.shown()] for each in shown_ones]
    section = Section(
        CHECK, sentences, ["", "", "then", "now"], rows, is_difference=bool(differences or today.problems)
    )
    words = "What is listed is not as it was." if section.is_difference else "Nothing that is recorded differs."
    return Check(again.composed, differences, Document(run.label, words, [section] if rows or sentences else []))


def _only(facts: Facts, kinds: Sequence[str]) -> Facts:
    return {kind: facts[kind] for kind in kinds}


def cwd_note(run: LoadedRun) -> list[str]:
    """Where relative paths are looked up, if not where the run was started."""
    if run.cwd is not None:
        return []
    started = run.provenance.get("cwd")
    reason = f"{started}, where it was started, is gone" if started else "it does not record where it was started"
    return [f"Relative paths are looked up in the current folder: {reason}."]


def earlier_notes(run: LoadedRun) -> list[str]:
    """That the run was resumed, and what was another before."""
    times = run.provenance.get("resumed", [])
    if not times:
        return []
    notes = [f"It was resumed {len(times)} {'time' if len(times) == 1 else 'times'}, and is repeated in one go."]
    for before in run.provenance.get("earlier", []):
        found, _ = input_differences([facts_of({**run.provenance, **before}), facts_of(run.provenance)])
        listed = ", ".join(f"{each.name} {shown(each.values[0], each.kind)}" for each in found[:8])
        notes.append(
            f"Its steps before it was resumed were computed with other {', '.join(dict.fromkeys(each.kind for each in found))}: {listed}."
        )
    return notes


def data_sentences(run: LoadedRun, today: Today, found: Sequence[Difference]) -> list[str]:
    """Which records changed, of the datasets whose records, or files, are others now."""
    sentences = []
    for name, now in today.hashes.items():
        own = [each for each in found if each.kind == "data" and each.name.startswith(f"{name}: ")]
        then = stored_hashes(run, name)
        if not own or name not in run.provenance.get("data", {}):
            continue
        if then is None:
            sentences.append(f"{name}: which records changed is not known: the run stored no hashes of them")
        elif then == now:
            sentences.append(f"{name}: its files have other bytes and hold the same records")
        else:
            readers = [run_records(run, name, then), run_records(run, name, now)]
            sentences += record_changes(then, now, name, ("then", "now"), readers)
    return sentences


def why_not_bytes(differences: Sequence[Difference]) -> str:
    """Why the results cannot be the same bytes, as far as the machine tells; empty where nothing speaks against it."""
    reasons = [
        f"{each.values[0]} {each.name} then, {each.values[1]} now" if each.name in ("ranks", "threads")
        else f"{each.name} {each.values[0]} then, {each.values[1]} now"
        for each in differences
        if each.kind == "machine"
    ]  # fmt: skip
    return f"sums are added up in another order on another machine ({'; '.join(reasons)})" if reasons else ""


def repeat(run: LoadedRun, checked: Check, output: Path) -> LoadedRun:
    """The repetition of the run in the folder `output`, after it is finished; the current folder is that of the run.

    Raises whatever a run raises. An unfinished repetition in that folder is resumed.
    """
    from glmtuner.launch.run import launch

    say(f"{run.folder.path} is run again in {output}, without a tracker and without pushing to the hub")
    launch(checked.composed, output_dir=output)
    ranks.destroy_process_group()
    return load_run(output)


def require_free(path: Path, output: Path) -> None:
    """Raise ConfigError where the repetition cannot be written to `output`."""
    if output.resolve() == path.resolve() or path.resolve() in output.resolve().parents:
        raise ConfigError(f"--output {output}: it is the run itself, or inside of it; name another folder")
    folder = RunFolder(output)
    if folder.is_finished:
        raise ConfigError(
            f"--output {output}: it holds a finished run; type --output <another folder>, or python -m glmtuner diff {path} {output} to "
            "compare the two"
        )
    if not folder.is_unused and not folder.is_run:
        raise ConfigError(f"--output {output}: it holds other files; name another folder")


def verdict(run: LoadedRun, again: LoadedRun, checked: Check) -> Document:
    """The comparison of a run with its repetition; its last section is that of the results."""
    found = outcomes(run, again)
    kind = overall(found)
    late = late_differences(run, again, checked.differences)
    rows = [[each.name, WORDS[each.kind], each.words] for each in found]
    sentences = (
        [] if run.is_finished else [f"The run is not finished ({describe(run)}), and is compared as far as it got."]
    )
    sentences += [f"{each.kind} {each.name}: {' then, '.join(each.shown())} now" for each in late]
    sections = [
        *checked.document.sections,
        Section("Step by step", sentences, ["", "", ""], rows, is_difference=kind is Kind.other),
    ]
    words = words_of(kind, found, [*checked.differences, *late])
    return Document(f"{run.label} and {again.label}", words, sections, [run, again])


def late_differences(run: LoadedRun, again: LoadedRun, known: Sequence[Difference]) -> list[Difference]:
    """What the repetition itself recorded otherwise and the check could not know: targets, numbers of tokens and the like."""
    found = [
        *config_differences([run, again])[0],
        *input_differences([facts_of(run.provenance), facts_of(again.provenance)])[0],
    ]
    names = {(each.kind, each.name) for each in known}
    return [
        each for each in found if (each.kind, each.name) not in names and not each.name.startswith((*LEFT_OUT, RESUME))
    ]


def words_of(kind: Kind, found: Sequence[Outcome], differences: Sequence[Difference]) -> str:
    """The verdict in one sentence: how alike, from which step on, and what differs in the inputs."""
    different = ", ".join(dict.fromkeys(each.kind for each in differences))
    compared = ", ".join(each.name for each in found if each.kind is not Kind.missing)
    if kind in (Kind.same, Kind.missing):
        gone = [each.name for each in found if each.kind is Kind.missing]
        behind = f" (not compared: {', '.join(gone)})" if gone else ""
        beside = f", although it has other {different}" if different else ""
        return f"Reproduced to the same bytes: {compared or 'nothing'}{behind}{beside}."
    steps = next((each for each in found if each.name == STEPS), None)
    cause = f"what differs: {different}" if different else "nothing that is recorded differs"
    if kind is Kind.rounding:
        answers = [each.name for each in found if each.kind is Kind.other]
        beside = f"; single records differ by more in {', '.join(answers)}" if answers else ""
        return f"Reproduced but for rounding: {compared}{beside}; {cause}."
    first = next(each for each in found if each.kind is Kind.other)
    where = f"from step {steps.first.step} on" if steps and steps.first else f"in {first.name}"
    return f"Not reproduced: other results {where}; {cause}."


def require_run(path: Path, kind: str) -> None:
    """Raise CheckpointError for a sweep, whose jobs are reproduced one by one."""
    if kind == "sweep":
        jobs = sorted(entry.name for entry in path.iterdir() if RunFolder(entry).is_run)
        raise CheckpointError(
            f"reproduce {path}: it is a sweep, and a run is reproduced; type python -m glmtuner reproduce {path / (jobs[0] if jobs else '<job>')}"
        )
