"""The experimental set-up in words, and the table of models, data and software with their licences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from glmtuner.report.bootstrap import RESAMPLES
from glmtuner.report.jobs import format_value
from glmtuner.report.leaderboard import format_duration
from glmtuner.report.paper.facts import DataFact, Facts, MethodFact, ModelFact
from glmtuner.report.paper.latex import Cell, Tex, latex_text, table
from glmtuner.report.paper.references import Registry, Use, cite
from glmtuner.report.paper.results import level, state_name
from glmtuner.report.paper.settings import common, varied
from glmtuner.report.paper.significance import EXCHANGES, MOST_EXACT
from glmtuner.report.paper.words import Words
from glmtuner.report.ranking import Ranking
from glmtuner.run_folder.files import is_number

SHORT_COMMIT = 12
NAMED_SOFTWARE = (
    "glmtuner",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "hydra-core",
)  # in the sentence


def setup_text(ranking: Ranking, facts: Facts, num_tests: int, registry: Registry, words: Words) -> str:
    """The paragraphs of the set-up, and the tables of what was varied and of the common hyper-parameters."""
    if not facts.jobs:
        return _paragraph("left_out", [words.say("nothing"), *_left_out(ranking, words)], words)
    varied_rows, common_rows = varied(ranking, facts.jobs, words), common(facts.jobs, ranking, words)
    parts = [
        _paragraph("models", _models(facts, words), words),
        _paragraph("data", _data(facts, words), words),
        _paragraph("training", _training(ranking, facts, bool(varied_rows), bool(common_rows), words), words),
        _paragraph("decoding", _decoding(facts, words), words),
        _paragraph("statistics", _statistics(ranking, num_tests, words), words),
        _paragraph("software", _software(facts, registry, words), words),
        _paragraph("left_out", _left_out(ranking, words), words),
    ]
    if varied_rows:
        header = [Tex(words.say("h_key")), Tex(words.say("h_values"))]
        parts.append(_table(header, varied_rows, "varied", r"lp{0.6\linewidth}", words))
    if common_rows:
        header = [Tex(words.say("h_key")), Tex(words.say("h_value"))]
        parts.append(_table(header, common_rows, "common", r"lp{0.6\linewidth}", words))
    return "\n".join(filter(None, parts))


def _paragraph(title: str, sentences: Sequence[str], words: Words) -> str:
    found = words.sentence_space.join(filter(None, sentences))
    return rf"\paragraph{{{words.say(title)}}} {found}" + "\n" if found else ""


def _table(header: Sequence[Cell], rows: Sequence[Sequence[Cell]], label: str, columns: str, words: Words) -> str:
    return table(
        header, rows, label=label, caption=words.say(f"{label}_caption"), columns=columns, chinese=words.chinese,
        continued=words.continued,
    )  # fmt: skip


def _plain(text: str, words: Words) -> str:
    return latex_text(text, words.chinese)


def counts(numbers: Sequence[int], words: Words) -> str:
    """1,234, or 1,234 to 5,678 where runs differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else words.say("range", low=f"{low:,}", high=f"{high:,}")


# -- models, methods, data -----------------------------------------------------------------------------------------------


def _models(facts: Facts, words: Words) -> list[str]:
    models = words.listed([_model(model, words) for model in facts.models])
    templates = [_plain(str(each), words) for each in facts.values("model.template") if each]
    template = words.say("template", templates=words.listed(templates)) if templates else ""
    if not facts.methods:
        return [words.say("not_trained", models=models), template]
    methods = words.listed([_method(method, words) for method in facts.methods])
    objectives = words.listed([use_text(use, words) for use in facts.uses["objective"]]) or words.unknown
    return [words.say("fine_tune", models=models, objectives=objectives, methods=methods), template]


def _model(model: ModelFact, words: Words) -> str:
    remarks = [words.say("parameters", number=counts(model.parameters, words))] if model.parameters else []
    remarks += [words.say("revision", revision=_plain(model.revision, words))] if model.revision != "main" else []
    return f"{_plain(model.name, words)}{cite(model.cite or ())}{words.in_brackets(remarks)}"


def use_text(use: Use, words: Words) -> str:
    """A method's name with its citation."""
    return f"{use.name['zh' if words.chinese else 'en']}{cite(use.cite)}"


def _method(method: MethodFact, words: Words) -> str:
    name = use_text(method.use, words) if method.use else rf"\texttt{{{_plain(method.kind, words)}}}"
    if method.extras:
        name = words.say("with", method=name, extras=words.listed([use_text(use, words) for use in method.extras]))
    remarks = [words.say("trained", number=counts(method.trained, words))] if method.trained else []
    return f"{name}{words.in_brackets(remarks)}"


def _data(facts: Facts, words: Words) -> list[str]:
    train = [_data_item(each, words) for each in facts.data if each.trains]
    evaluation = [_data_item(each, words) for each in facts.data if each.evaluates and not each.trains]
    shares = [share for share in facts.values("data.dev_ratio") if share]
    evaluated = [count for count in facts.evaluated if count]
    return [
        words.say("train_data", items=words.listed(train)) if train else "",
        words.say("eval_data", items=words.listed(evaluation)) if evaluation else "",
        words.say("held_out", share=words.listed([format_value(share) for share in shares])) if shares else "",
        words.say("evaluated", number=counts(evaluated, words)) if evaluated else words.say("no_evaluation"),
    ]


def _data_item(data: DataFact, words: Words) -> str:
    remarks = [words.say("records", number=counts(data.records, words))] if data.records else []
    remarks += [words.say("skipped", number=f"{data.skipped:,}")] if data.skipped else []
    remarks += [words.say("shortened", number=f"{data.shortened:,}")] if data.shortened else []
    return f"{_plain(data.name, words)}{cite(data.cite or ())}{words.in_brackets(remarks)}"


# -- training, decoding, statistics --------------------------------------------------------------------------------------


def _training(ranking: Ranking, facts: Facts, has_varied: bool, has_common: bool, words: Words) -> list[str]:
    if not facts.methods:
        return []
    optimizers = words.listed([use_text(use, words) for use in facts.uses["optimizer"]])
    strategies = words.listed([use_text(use, words) for use in facts.uses["parallel"]])
    hyper = words.say("hyper", optimizers=optimizers) if optimizers else words.say("hyper_alone")
    seeds = [_plain(seed, words) for seed in facts.seeds]
    runs = [len(row.jobs) for row in ranking.rows]
    return [
        hyper if has_common else "",
        words.say("varied") if has_varied else "",
        words.say("parallel", strategies=strategies) if strategies else "",
        words.say("one_seed", seed=seeds[0]) if len(seeds) == 1
        else words.say("seeds", seeds=words.listed(seeds), counts=counts(runs, words)),
    ]  # fmt: skip


def _decoding(facts: Facts, words: Words) -> list[str]:
    answering = [job.values for job in facts.jobs if job.values.get("trainer.predict_with_generate")]
    if not answering:
        return []
    beams = sorted({int(values.get("data.eval_num_beams") or 1) for values in answering})
    tokens = sorted(
        {
            int(values.get("generation.max_new_tokens") or values.get("data.max_target_length") or 0)
            for values in answering
        }
    )
    penalties = sorted({float(values.get("generation.repetition_penalty") or 1.0) for values in answering})
    limit = counts(tokens, words)
    return [
        words.say("greedy", tokens=limit) if beams == [1] else words.say("beams", beams=counts(beams, words), tokens=limit),
        "" if penalties == [1.0] else words.say("penalty", penalty=words.listed([format_value(each) for each in penalties])),
        words.say("metrics", metrics=words.listed([use_text(use, words) for use in facts.uses["metric"]])) if facts.uses["metric"] else "",
    ]  # fmt: skip


def _statistics(ranking: Ranking, num_tests: int, words: Words) -> list[str]:
    if ranking.objective is None:
        return []
    if not ranking.has_intervals:
        return [words.say("no_statistics")]
    sentences = [
        words.say("intervals", level=level(words), resamples=f"{RESAMPLES:,}", efron=cite(["efron1979bootstrap"]))
    ]
    if ranking.has_differences:
        sentences.append(words.say("paired", koehn=cite(["koehn2004significance"])))
    if num_tests:
        sentences.append(
            words.say(
                "p_values", noreen=cite(["noreen1989"]), holm=cite(["holm1979"]), count=num_tests, exact=MOST_EXACT,
                sample=f"{EXCHANGES:,}",
            )
        )  # fmt: skip
        sentences.append(words.say("averaged") if any(row.seeds for row in ranking.rows) else "")
        sentences.append(words.say("limits"))
    elif len(ranking.rows) > 1:
        sentences.append(words.say("no_test"))
    return sentences


# -- software, hardware, what is missing ---------------------------------------------------------------------------------


def _software(facts: Facts, registry: Registry, words: Words) -> list[str]:
    packages = [_package(name, facts, registry, words) for name in NAMED_SOFTWARE if name in facts.packages]
    python = words.listed([_plain(each, words) for each in facts.python]) or words.unknown
    repositories = [rf"\texttt{{{_plain(short(commit), words)}}}" for commit in facts.repositories]
    machines = [_machine(each, words) for each in facts.hardware]
    return [
        words.say("software_used", packages=words.listed(packages), python=python) if packages else "",
        words.say("repository", commits=words.listed(repositories)) if repositories else "",
        words.say("hardware", machines=words.listed(machines)) if machines else words.say("no_hardware"),
        _hours(facts, words),
        words.say("unreadable", count=len(facts.unreadable)) if facts.unreadable else "",
    ]


def _package(name: str, facts: Facts, registry: Registry, words: Words) -> str:
    asset = registry.software.get(name)
    versions = words.listed([_plain(each, words) for each in facts.packages[name]])
    shown = words.say("package", name=asset.title if asset and asset.title else _plain(name, words), version=versions)
    commits = [words.say("commit", commit=rf"\texttt{{{_plain(short(each), words)}}}") for each in facts.commits]
    remarks = words.in_brackets(commits) if name == "glmtuner" else ""
    return f"{shown}{remarks}{cite(asset.cite) if asset else ''}"


def short(commit: str) -> str:
    """The first characters of a commit, with its `-dirty`."""
    return commit[:SHORT_COMMIT] + ("-dirty" if commit.endswith("-dirty") else "")


def _machine(machine: Mapping[str, Any], words: Words) -> str:
    name, memory, processes = _plain(str(machine["name"]), words), machine.get("memory_gib"), machine.get("processes")
    if machine.get("device") == "cpu":
        return words.say("machine_cpu", name=name, cores=machine.get("cores"), threads=machine.get("threads"))
    times = rf"{processes} $\times$ " if isinstance(processes, int) and processes > 1 else ""
    remarks = [words.say("memory", memory=format_value(memory))] if is_number(memory) else []
    return f"{times}{name}{words.in_brackets(remarks)}"


def _hours(facts: Facts, words: Words) -> str:
    if not facts.seconds:
        return ""
    low, high = (format_duration(each) for each in (min(facts.seconds), max(facts.seconds)))
    shown = low if low == high else words.say("range", low=low, high=high)
    return words.say("hours", total=format_duration(sum(facts.seconds)), count=len(facts.seconds), range=shown)


def _left_out(ranking: Ranking, words: Words) -> list[str]:
    if not ranking.unranked:
        return []
    states = Counter(job.state for job in ranking.unranked)
    summary = words.comma.join(
        words.say("state_count", count=count, state=state_name(state, words).text) for state, count in states.items()
    )
    return [words.say("left_out_runs", summary=summary)]


# -- the table of assets -------------------------------------------------------------------------------------------------


def assets_table(facts: Facts, registry: Registry, words: Words) -> str:
    """A sentence, and models, data sets and packages with licences and references; what is not known is said to be unknown."""
    rows: list[list[Cell]] = []
    for model in facts.models:
        shown = (
            model.name if PurePath(model.id).is_absolute() else model.id
        )  # a folder of this machine is nobody's concern
        rows.append(["", shown, model.licence or Tex(words.unknown), _reference(model.cite, words)])
    firsts = {0: "k_model", len(rows): "k_data"} if facts.data else {0: "k_model"}
    for data in facts.data:
        name = f"{data.name} ({data.source})" if data.source and data.source != data.name else data.name
        rows.append(["", name, data.licence or Tex(words.unknown), _reference(data.cite, words)])
    packages = [name for name in facts.packages if name in registry.software and _is_used(name, facts)]
    firsts |= {len(rows): "k_software"} if packages else {}
    for name in packages:
        asset = registry.software[name]
        shown = f"{asset.title or name} {', '.join(facts.packages[name])}"
        rows.append(["", shown, asset.licence or Tex(words.unknown), _reference(tuple(asset.cite), words)])
    for place, kind in firsts.items():
        if place < len(rows):
            rows[place][0] = Tex(words.say(kind))
    header = [Tex(words.say(name)) for name in ("h_kind", "h_name", "h_licence", "h_reference")]
    return words.say("assets") + "\n\n" + table(
        header, rows, label="assets", caption=words.say("assets_caption"), columns="llll", chinese=words.chinese,
        continued=words.continued, note=words.say("asset_note"), rules_before=[*firsts],
    )  # fmt: skip


def _is_used(package: str, facts: Facts) -> bool:
    """Whether the runs used an installed package: bitsandbytes stores a base in integers, and has optimizers in 8 bits."""
    return package != "bitsandbytes" or any(
        job.values.get("quant.quantization_bit") or "8bit" in str(job.values.get("trainer.optim")) for job in facts.jobs
    )


def _reference(keys: tuple[str, ...] | None, words: Words) -> Tex:
    """The citation; unknown for what the registry lacks, a dash for what has none."""
    if keys is None:
        return Tex(words.unknown)
    return Tex(cite(keys).removeprefix("~") or "--")


def unknowns(facts: Facts) -> list[str]:
    """A sentence for each kind of thing whose licence or citation is not known, in English, for the terminal."""
    sentences = []
    for what, named in (
        ("licence", [model.id for model in facts.models if not model.licence] + [data.name for data in facts.data if not data.licence]),
        ("citation", [model.id for model in facts.models if model.cite is None]
         + [data.name for data in facts.data if data.cite is None]
         + [method.kind for method in facts.methods if method.use is None]),
    ):  # fmt: skip
        if named:
            sentences.append(f"unknown {what}: {', '.join(named)}; the paper says so, complete it by hand")
    return sentences
