"""Scores a run's model on its benchmarks: one task after the other, each kept as soon as it is finished."""

import importlib.metadata
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from glmtuner.benchmarks.tasks import Asked, load_asked, local_sets, roots_of
from glmtuner.config.objective import less_is_better
from glmtuner.console import complain, say
from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError, GlmtunerError
from glmtuner.inference.context import RunContext
from glmtuner.report.benchmarks import SCORES, bounds_of, names_of, subject_name, task_file
from glmtuner.run_folder.files import is_number, read_lines, read_object, strict_json, write_json, write_text
from glmtuner.run_folder.names import BENCHMARKS

if TYPE_CHECKING:
    from pathlib import Path

    from glmtuner.benchmarks.model import LoadedModel


def score_benchmarks(context: RunContext) -> dict[str, float]:
    """The scores of the run's benchmarks, under their names in metrics.json; those of all records are in benchmarks/.

    A task that an interrupted run has finished is not asked again.
    """
    from glmtuner.benchmarks.model import LoadedModel

    benchmark = context.run.benchmark
    asked = load_asked(benchmark)
    require_one_way(asked)
    was_training = context.model.training
    context.model.eval()
    tasks: dict[str, dict[str, Any]] = {}
    try:
        model = LoadedModel(context)
        every = {name: task for each in asked for name, task in each.tasks.items()}
        for number, (name, task) in enumerate(every.items(), 1):
            done = ranks.broadcast_from_rank0(partial(finished_task, context, name))
            if done is None:
                done = ask(context, model, name, task)
            tasks[name] = done
            if ranks.is_main():
                say(f"benchmark {number}/{len(every)} {name}: {_shown(done)}")
    finally:
        context.model.train(was_training)
    summaries = [summary_of(each, tasks, context.folder.path) for each in asked]
    if ranks.is_main():
        write_json(
            context.folder / BENCHMARKS / SCORES,
            {
                "settings": settings_of(context),
                "benchmarks": summaries,
                "tasks": {name: _about(task) for name, task in tasks.items()},
            },
        )
    return metrics_of(summaries, tasks)


def metrics_of(summaries: Sequence[Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The scores under their names in metrics.json: all of each benchmark, then the main one of each task of a group."""
    metrics: dict[str, float] = {}
    for summary in summaries:
        metrics |= {name: summary["scores"][metric]["value"] for name, metric in names_of(summary).items()}
    for summary in summaries:
        for name in summary["tasks"] if summary["is_group"] else ():
            metrics |= {
                key: tasks[name]["scores"][metric]["value"] for key, metric in subject_name(tasks[name]).items()
            }
    for name in metrics:
        unclear = [
            metric
            for summary in summaries
            for key, metric in names_of(summary).items()
            if key == name and metric in summary["less_is_better"] and not less_is_better(name)
        ]
        for metric in unclear:
            complain(f"{name}: less is better of {metric}, which sweeps and reports do not know: do not rank by it")
    return metrics


def settings_of(context: RunContext) -> dict[str, Any]:
    """What a task's scores depend on, besides the model and the task."""
    benchmark = context.run.benchmark
    return {
        "num_fewshot": benchmark.num_fewshot,
        "limit": benchmark.limit,
        "template": context.template_name if benchmark.chat_template else None,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def require_one_way(asked: Sequence[Asked]) -> None:
    """Raise ConfigError where two benchmarks ask one task in different ways."""
    seen: dict[str, tuple[str, str]] = {}
    for each in asked:
        for name, task in each.tasks.items():
            config = json.dumps(
                {key: value for key, value in task.dump_config().items() if key != "metadata"}, default=str
            )
            before, other = seen.setdefault(name, (config, each.name))
            if before != config:
                raise ConfigError(
                    f"benchmark={other},{each.name}: both have the task {name}, with other settings; ask them in two runs"
                )


def finished_task(context: RunContext, name: str) -> dict[str, Any] | None:
    """What an earlier attempt of this run has stored of a task; None if it has not finished it in this way."""
    path = about_file(context.folder.path, name)
    if not path.is_file():
        return None
    about = read_object(path)
    lines = sum(1 for _ in read_lines(task_file(context.folder.path, name)))
    if about.get("settings") != settings_of(context) or about.get("records") != lines:
        say(f"{path}: of other settings, or not whole; the task is asked again")
        return None
    return about


def about_file(folder: "Path", name: str) -> "Path":
    """The file with a task's scores, which is written when all of its records are."""
    return task_file(folder, name).with_suffix(".json")


def ask(context: RunContext, model: "LoadedModel", name: str, task: Any) -> dict[str, Any]:
    """Ask all records of a task, and write what they scored; returns the task's scores."""
    import numpy
    from lm_eval.evaluator import evaluate

    from glmtuner.benchmarks.model import SEED

    benchmark = context.run.benchmark
    set_examples(name, task, benchmark.num_fewshot)
    states = random.getstate(), numpy.random.get_state()
    random.seed(0)  # as the harness' own command does
    numpy.random.seed(SEED)
    task.set_fewshot_seed(seed=SEED)
    try:
        with local_sets(name, roots_of(benchmark)):
            found = evaluate(
                lm=model,
                task_dict={"tasks": {name: task}},
                limit=benchmark.limit,
                bootstrap_iters=0,  # intervals are computed from the records
                apply_chat_template=benchmark.chat_template,
                fewshot_as_multiturn=benchmark.chat_template,
            )
    except GlmtunerError:
        raise
    except Exception as error:
        if not is_of_task(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"benchmark {name}: the task failed on its records ({reason}); check its YAML and its set"
        ) from error
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
    return ranks.broadcast_from_rank0(lambda: stored(context, name, task, found))


def is_of_task(error: BaseException) -> bool:
    """Whether an error was raised by a task's own templates and functions: this package's code stands in no deeper frame than `ask`."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return not any(module.startswith("glmtuner.") and module != __name__ for module in modules)


def set_examples(name: str, task: Any, asked: int | None) -> None:
    """Set the number of a task's examples: the run's, unless the task says that it has none."""
    own = task.get_config("num_fewshot")
    if asked is not None and own == 0 != asked:
        say(f"benchmark.num_fewshot={asked}: the task {name} says that it has no examples, and is asked without")
    elif asked is not None:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def stored(context: RunContext, name: str, task: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write a task's records and, last, its scores; returns the latter."""
    results, samples = found["results"][name], found["samples"][name]
    labels = {key: label_of(key) for key in results if "," in key and "_stderr," not in key}
    values = {label: float(results[key]) for key, label in labels.items() if is_number(_plain(results[key]))}
    if left_out := sorted({*labels.values()} - values.keys()):
        say(f"benchmark {name}: no numbers, and left out: {', '.join(left_out)}")
    records: dict[int, dict[str, Any]] = {}
    for sample in samples:
        line = records.setdefault(
            sample["doc_id"],
            {"index": sample["doc_id"], "hash": sample["doc_hash"][:16], "record": _json(sample["doc"]), "target": _json(sample["target"]),
             "answers": {}, "scores": {}},
        )  # fmt: skip
        line["answers"][sample["filter"]] = _json(sample["filtered_resps"])
        for metric in sample["metrics"]:
            value = _plain(sample[metric])
            if is_number(value):
                line["scores"][label_of(f"{metric},{sample['filter']}")] = float(value)
    lines = [records[index] for index in sorted(records)]
    better = found["higher_is_better"].get(name, {})
    less = [label for key, label in labels.items() if better.get(key.partition(",")[0]) is False and label in values]
    path = task_file(context.folder.path, name)
    write_text(path, "".join(strict_json(line) + "\n" for line in lines))
    about = {
        "name": name,
        "settings": settings_of(context),
        "version": str(found["versions"].get(name)),
        "num_fewshot": task.get_config("num_fewshot"),
        "records": len(lines),
        "of": len(task.eval_docs),
        "main": next(iter(values), None),
        "less_is_better": less,
        "scores": {
            label: {"value": value, **bounds_of(value, _scores(lines, label))} for label, value in values.items()
        },
        "results": {key: _plain(value) for key, value in results.items() if is_number(_plain(value))},
        "first_prompt": _json(samples[0]["arguments"][0][0]) if samples else None,
    }
    write_json(about_file(context.folder.path, name), about)
    return about


def summary_of(asked: Asked, tasks: Mapping[str, Mapping[str, Any]], folder: "Path") -> dict[str, Any]:
    """What scores.json says of a benchmark: its one task's scores, or the means that its group declares."""
    members = [tasks[name] for name in asked.tasks]
    shots = sorted({member["num_fewshot"] for member in members})
    summary: dict[str, Any] = {
        "name": asked.name, "tasks": [*asked.tasks], "is_group": not asked.is_one,
        "records": sum(member["records"] for member in members),
        "num_fewshot": shots[0] if len(shots) == 1 else f"{shots[0]} to {shots[-1]}",
    }  # fmt: skip
    if asked.is_one:
        return summary | {key: members[0][key] for key in ("main", "less_is_better", "scores")}
    less = sorted({label for member in members for label in member["less_is_better"]})
    if asked.group is None:
        say(f"benchmark={asked.name}: it declares no mean of its tasks, which have scores of their own")
        return summary | {"main": None, "less_is_better": less, "scores": {}}
    means = asked.group.aggregate({member["name"]: dict(member["results"]) for member in members})
    values = {
        label_of(key): float(value)
        for key, value in means.items()
        if "," in key and "_stderr," not in key and is_number(_plain(value))
    }
    lines = [line for member in members for line in read_lines(task_file(folder, member["name"]))]
    return summary | {
        "main": next(iter(values), None),
        "less_is_better": [label for label in less if label in values],
        "scores": {
            label: {"value": value, **bounds_of(value, _scores(lines, label))} for label, value in values.items()
        },
    }


def label_of(key: str) -> str:
    """`acc,none` as acc, and `exact_match,strict-match` as exact_match_strict-match."""
    metric, _, kind = key.partition(",")
    return metric if kind == "none" else f"{metric}_{kind}"


def _scores(lines: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    return [line["scores"][label] for line in lines if label in line["scores"]]


def _about(task: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key not in ("results", "settings", "first_prompt")}


def _shown(about: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{label} {score['value']:.4f}" for label, score in about["scores"].items())
    return f"{scores or 'no score'} ({about['records']:,} records)"


def _plain(value: Any) -> Any:
    """A number of numpy or a truth value as a number."""
    return float(value) if isinstance(value, bool) or hasattr(value, "dtype") else value


def _json(value: Any) -> Any:
    """The value as JSON can hold it."""
    return json.loads(json.dumps(value, default=str))
