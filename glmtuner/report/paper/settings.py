"""The hyper-parameters of a paper's tables: what was varied, and what all runs have in common."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from glmtuner.config.schema import key_defaults
from glmtuner.report.jobs import IRRELEVANT_KEYS, PRESET_KEYS, SEEDS, Job, comparable, format_value, value_of
from glmtuner.report.paper.facts import distinct
from glmtuner.report.paper.latex import Cell, Tex, latex_text
from glmtuner.report.paper.words import Words
from glmtuner.report.ranking import Ranking

TRAINING = (  # what a reader expects of every training, at its default too
    "trainer.learning_rate", "trainer.lr_scheduler_type", "trainer.warmup_steps", "trainer.optim", "trainer.weight_decay",
    "trainer.max_grad_norm", "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps",
    "trainer.num_train_epochs", "trainer.max_steps",
)  # fmt: skip
LENGTHS = ("data.max_source_length", "data.max_target_length")
# What the set-up says in words, what only chat and serving read, and what concerns logging, saving and the machine.
IN_WORDS = {
    *IRRELEVANT_KEYS, *SEEDS, *PRESET_KEYS.values(), "data.dataset", "data.eval_dataset", "data.dataset_dir", "data.dev_ratio",
    "data.eval_num_beams", "model.family", "model.template", "model.model_revision", "parallel.name", "generation.do_sample",
    "generation.repetition_penalty", "generation.max_new_tokens", "plugins", "finetuning.use_dora", "finetuning.use_rslora",
}  # fmt: skip
BESIDE = (
    "generation.", "metric.", "tracker.", "hydra", "trainer.logging_", "trainer.save_", "trainer.eval_", "trainer.hub_", "trainer.do_",
    "trainer.dataloader_", "trainer.predict_with_generate", "trainer.per_device_eval_batch_size", "trainer.report_to", "trainer.push_to_hub",
    "trainer.disable_tqdm", "trainer.log_", "trainer.use_cpu", "trainer.load_best", "trainer.metric_for_best", "trainer.greater_is_better",
    "model.plot_loss", "data.preprocessing_", "data.max_bad_records",
)  # fmt: skip
POWER = re.compile(r"(-?[\d.]+)e([+-]\d+)")


def title(key: str, words: Words) -> Tex:
    """The name of a hyper-parameter: in words, or as it is typed."""
    known = words.titles.get(key)
    return Tex(known if known else rf"\texttt{{{latex_text(key.rpartition('.')[2], words.chinese)}}}")


def varied(ranking: Ranking, jobs: Sequence[Job], words: Words) -> list[list[Cell]]:
    """A row for each varied key: its name and its values among the jobs, in the order of their sizes."""
    rows: list[list[Cell]] = []
    for knob in ranking.knobs:
        values = distinct(value_of(job, knob) for job in jobs)
        numbers = all(isinstance(value, (int, float)) for value in values)
        values.sort(key=lambda value: value if numbers else 0)
        rows.append([title(knob, words), Tex(words.comma.join(value_tex(value, words) for value in values))])
    return rows


def common(jobs: Sequence[Job], ranking: Ranking, words: Words) -> list[list[Cell]]:
    """A row for each hyper-parameter that was not varied: those of TRAINING and LENGTHS, and any that is not at its default.

    What belongs to some methods only, or comes with the choice of one, has a row for each with the choice in parentheses.
    """
    defaults = key_defaults()
    rows: list[list[Cell]] = []
    for key in _ordered({key for job in jobs for key in job.values}, jobs):
        having = [job for job in jobs if key in job.values]
        if key in ranking.knobs or not _is_shown(key, having, defaults):
            continue
        name, by_choice = title(key, words).text, _by_choice(key, having, ranking)
        if len(having) == len(jobs) and len(distinct(job.values[key] for job in having)) == 1:
            by_choice = {"": [having[0].values[key]]}
        for choice, values in by_choice.items():
            remark = words.in_brackets([latex_text(choice, words.chinese)] if choice else [])
            rows.append([Tex(f"{name}{remark}"), Tex(words.comma.join(value_tex(value, words) for value in values))])
    return rows


def _by_choice(key: str, jobs: Sequence[Job], ranking: Ranking) -> dict[str, list[Any]]:
    """The values of the key by what decides them: the presets of its group that were varied, else that of its group."""
    group = key.partition(".")[0]
    deciding = [knob for knob in ranking.knobs if knob in ("experiment", group)] or [
        PRESET_KEYS.get(group, "finetuning.finetuning_type")
    ]
    found: dict[str, list[Any]] = {}
    for job in jobs:
        found.setdefault(", ".join(format_value(value_of(job, knob)) for knob in deciding), []).append(job.values[key])
    values = {choice: distinct(each) for choice, each in found.items()}
    if len({repr(each) for each in values.values()}) == 1:
        return {", ".join(values): next(iter(values.values()))}
    return values


def _ordered(keys: Iterable[str], jobs: Sequence[Job]) -> list[str]:
    """Those of TRAINING and LENGTHS first, then the others in the order of the configurations."""
    first = [*TRAINING, *LENGTHS]
    found = dict.fromkeys([*first, *(key for job in jobs for key in job.values)])
    return [key for key in found if key in keys]


def _is_shown(key: str, jobs: Sequence[Job], defaults: dict[str, Any]) -> bool:
    if key in IN_WORDS or key.startswith(BESIDE):
        return False
    if key.startswith("trainer.") and not any(job.values.get("trainer.do_train") for job in jobs):
        return False
    by_steps = all(_is_positive(job.values.get("trainer.max_steps")) for job in jobs)
    if key == ("trainer.num_train_epochs" if by_steps else "trainer.max_steps"):
        return False  # the other one decides
    if key in TRAINING or key in LENGTHS:
        return True
    if key.startswith("quant.") and not any(job.values.get("quant.quantization_bit") for job in jobs):
        return False
    values = [value for job in jobs if (value := job.values[key]) not in (None, [], {}, "")]
    return any(key not in defaults or comparable(value) != comparable(defaults[key]) for value in values)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def value_tex(value: Any, words: Words) -> str:
    """A value as it is typed, a number with an exponent as a power of ten; a dash for null."""
    if value is None:
        return "--"
    text = format_value(value)
    if isinstance(value, float) and (power := POWER.fullmatch(text)):
        factor = "" if power[1] == "1" else rf"{power[1]} \cdot "
        return f"${factor}10^{{{int(power[2])}}}$"
    return latex_text(text, words.chinese)
