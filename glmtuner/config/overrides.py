"""The user's overrides: the comma rule, keys of other tools, unknown keys and presets.

All of it works on Hydra's own parse of the overrides, before anything is composed.
"""

import re
from collections.abc import Iterable, Mapping

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from glmtuner.config.benchmarks import GROUP as BENCHMARK
from glmtuner.config.benchmarks import TASKS as BENCHMARKS
from glmtuner.config.dictionaries import is_dictionary
from glmtuner.config.removed import removed_key, removed_preset
from glmtuner.config.schema import legal_keys, list_keys, needed_groups
from glmtuner.errors import ConfigError, did_you_mean, nearest

# Keys of other tools and of ChatGLM-Efficient-Tuning, and what to type instead.
MOVED = {
    "model.quantization_bit": "type quant=int4, quant=int8 or quant=none",
    "quant.quantization_bit": "the preset chooses the bits: type quant=int4, quant=int8 or quant=none",
    "model.quantization_type": "type quant.quantization_type=… with quant=int4",
    "model.double_quantization": "type quant.double_quantization=… with quant=int4",
    "finetuning.finetuning_type": "the preset is the method: type finetuning={value}",
    "stage.name": "the preset is the stage: type stage={value}",
    "tracker.name": "the preset is the tracker: type tracker={value}",
    "metric.name": "the preset is the metric: type metric={value}",
    "parallel.name": "the preset is the strategy: type parallel={value}",
    "trainer.evaluation_strategy": "transformers calls it eval_strategy: type trainer.eval_strategy={value}",
    "trainer.per_gpu_train_batch_size": "type trainer.per_device_train_batch_size={value}",
    "trainer.per_gpu_eval_batch_size": "type trainer.per_device_eval_batch_size={value}",
    "trainer.fp16_backend": "type trainer.fp16=true",
    "trainer.half_precision_backend": "type trainer.fp16=true",
    "trainer.use_mps_device": "a Mac's GPU is used when there is one: leave it out",
    "trainer.tpu_num_cores": "leave it out",
    "trainer.push_to_hub_model_id": "type trainer.hub_model_id={value}",
    "trainer.lora_rank": "type finetuning.lora_rank={value}",
    "dataset": "datasets are named by data.dataset: type data.dataset={value}",
    "seed": "type trainer.seed={value}",
    "output_dir": "type trainer.output_dir={value}",
    "lr": "type trainer.learning_rate={value}",
    "batch_size": "type trainer.per_device_train_batch_size={value}",
    "epochs": "type trainer.num_train_epochs={value}",
    "cutoff_len": "type data.max_source_length=… and data.max_target_length=…",
    "quantization": "type quant={value}",
    "template": "type model.template={value}",
    "benchmark_dir": "type benchmark.data_dir={value}",
    "benchmark_tasks": "type benchmark.include_path={value}",
}
# Keys of hydra-optuna-sweeper, and what to type instead.
OF_OPTUNA_SWEEPER = {
    "hydra.sweeper.search_space": "a key has its search space itself: type 'trainer.learning_rate=interval(1e-5, 1e-3)', say",
    "hydra.sweeper.custom_search_space": "a condition is a tag: type 'finetuning.lora_rank=tag(\"finetuning=lora\", int(interval(4, 64)))'",
    "hydra.sweeper.sampler": "the preset is the sampler: type hydra/sweeper/sampler={value}",
}


def parse(overrides: Iterable[str]) -> list[Override]:
    """Hydra's parse of each override; raises ConfigError for one that has no `=` or that Hydra cannot parse."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if text.startswith("-"):
            name = text.lstrip("-").partition("=")[0]
            key = _full_key_of(name)
            hint = f"type {key}=…" if key else "`python -m glmtuner --help` lists the options"
            raise ConfigError(f"unknown option {text!r}: values are given as key=value, without dashes; {hint}")
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(
                f"{text!r} has no '=': values are given as key=value; a verb such as `show` comes first, before its run folder"
            )
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{text!r} cannot be parsed ({reason}); quote text that holds spaces, commas or brackets, "
                "as in 'name=\"a, b\"'"
            ) from None
    return parsed


def quoted_value(text: str) -> str:
    """The text as a value in an override, whatever quotes, commas and brackets it holds."""
    return QuotedString(text, Quote.single).with_quotes()


QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
VALUES = re.compile(QUOTED + r"""|[^,\[\]{}()'"]+""")  # or text between punctuation
VALUES_OF_KEYS = re.compile(QUOTED + r"""|[^,:\[\]{}()'"]++(?!:)""")


def quoted(override: str) -> str:
    """`data.dataset=我的.json` as `data.dataset='我的.json'`: Hydra parses characters beyond ASCII only in quotes.

    So is one value that Hydra cannot parse, such as `name=it's`; with brackets, quotes around it or commas it may have been
    meant otherwise, and is left to Hydra's error.
    """
    key, sign, value = override.partition("=")
    parsable = _quoted_beyond_ascii(override)
    if not sign or key.startswith("-") or value[:1] in ("[", "{", "'", '"', "") or "," in value or "${" in value:
        return parsable
    return parsable if _parsed_or_none(parsable) is not None else f"{key}={quoted_value(value)}"


def _quoted_beyond_ascii(override: str) -> str:
    key, sign, value = override.partition("=")
    if value.isascii() or "${" in value:
        return override

    def quote(match: re.Match[str]) -> str:
        text = match.group()
        core = text.strip()
        return text if text.isascii() or text[0] in "'\"" else text.replace(core, f"'{core}'")

    return key + sign + (VALUES_OF_KEYS if value.lstrip().startswith("{") else VALUES).sub(quote, value)


def bracket_lists(overrides: Iterable[str], multirun: bool) -> list[str]:
    """Normalized overrides: a list key's `data.dataset=a,b` becomes `data.dataset=[a,b]`, in a sweep `data.dataset=[a],[b]`.

    Brackets always mean one list. Every override is `quoted`, too.
    """
    lists = list_keys()
    rewritten = []
    for text, override in ((text, _parsed_or_none(text)) for text in map(_whole_key, map(quoted, overrides))):
        if override is None or override.key_or_group not in lists:
            rewritten.append(text)
            continue
        key, _, raw = text.partition("=")
        value = override.value()
        if override.is_sweep_override():
            if not isinstance(value, ChoiceSweep) or any(isinstance(item, list) for item in value.list):
                rewritten.append(text)
                continue
            items = [Override._get_value_element_as_str(item) for item in value.list]
            rewritten.append(
                f"{key}={','.join(f'[{item}]' for item in items)}" if multirun else f"{key}=[{','.join(items)}]"
            )
        elif isinstance(value, list) or value is None or raw.startswith("${"):
            rewritten.append(text)
        else:
            rewritten.append(f"{key}=[{raw}]" if raw else f"{key}=[]")
    return rewritten


def _whole_key(override: str) -> str:
    """`benchmark=ceval` as `benchmark.tasks=ceval`."""
    key, sign, value = override.partition("=")
    return f"{BENCHMARKS}{sign}{value}" if key == BENCHMARK else override


def _parsed_or_none(text: str) -> Override | None:
    try:
        return None if text.startswith("-") else OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def check_overrides(parsed: Iterable[Override], presets: Mapping[str, list[str]], multirun: bool) -> None:
    """Raise one ConfigError for all illegal keys and presets; `presets` are the legal names of each group."""
    problems = [problem for override in parsed for problem in _problems(override, presets, multirun)]
    if problems:
        raise ConfigError("; also: ".join(problems))


def _problems(override: Override, presets: Mapping[str, list[str]], multirun: bool) -> Iterable[str]:
    key = override.key_or_group
    value = _value_of(override)
    if key in MOVED:
        yield f"{key}={value} is not a glmtuner key: {MOVED[key].format(value=value)}"
    elif sentence := removed_key(key, value):
        yield sentence
    elif key in OF_OPTUNA_SWEEPER:
        yield f"{key}={value}: {OF_OPTUNA_SWEEPER[key].format(value=value)}"
    elif key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    elif key in presets:
        if not override.is_delete():
            yield from _preset_problems(key, override, presets[key], multirun)
        elif key in needed_groups():
            yield f"{override.input_line}: every run needs a {key}; type {key}=<preset>; {_legal_names(presets[key])}"
    elif (leaf := _dictionary_above(key)) and not (override.is_force_add() or is_dictionary(legal_keys()[leaf])):
        inner = key.removeprefix(f"{leaf}.")
        yield f"{key}={value}: {leaf} can only be set as a whole; type '{leaf}={{{inner}: {value}}}'"
    elif not _is_legal(key):
        yield _unknown(key, presets)
    elif override.is_sweep_override() and not multirun and key not in list_keys():
        yield f"{key}={value}: several values make a sweep; type -m before them, or one value"


def _value_of(override: Override) -> str:
    """The value as the user gave it."""
    return (override.input_line or "").partition("=")[2]


def _preset_problems(group: str, override: Override, legal: list[str], multirun: bool) -> Iterable[str]:
    if override.is_sweep_override() and (not override.is_choice_sweep() or isinstance(override.value(), Glob)):
        return
    if override.is_sweep_override() and not multirun:
        yield f"{group}={_value_of(override)}: several presets make a sweep; type -m before them, or one preset"
        return
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    for name in (each for part in values for each in (part if isinstance(part, list) else [part])):
        name = "null" if name is None else str(name)
        if name not in legal and not (name == "null" and group == "experiment"):
            unknown = f"{group}={name}: no {group} preset of that name{did_you_mean(name, legal, _legal_names(legal))}"
            yield removed_preset(group, name) or unknown


def _legal_names(legal: list[str]) -> str:
    return f"legal: {', '.join(legal)}"


def _is_legal(key: str) -> bool:
    return key in legal_keys() or _dictionary_above(key) is not None


def _dictionary_above(key: str) -> str | None:
    """The legal key of a dictionary that `key` reaches into: trainer.lr_scheduler_kwargs for …kwargs.num_cycles."""
    keys = legal_keys()
    parts = key.split(".")
    return next((".".join(parts[:end]) for end in range(1, len(parts)) if ".".join(parts[:end]) in keys), None)


def _full_key_of(leaf: str) -> str | None:
    """The one legal key whose last part is `leaf`; None where there is none, or several."""
    keys = [key for key in legal_keys() if key.rpartition(".")[2] == leaf]
    return keys[0] if len(keys) == 1 else None


def _unknown(key: str, presets: Mapping[str, list[str]]) -> str:
    """`unknown key 'data.datset'; did you mean 'dataset'? type data.dataset=…`."""
    full_key = _full_key_of(key.rpartition(".")[2])
    of_another_group = f"unknown key {key!r}: it belongs to {(full_key or '').partition('.')[0]}; type {full_key}=…"
    named = key.partition(".")[0]
    if full_key and named != full_key.partition(".")[0] and ("." not in key or named in presets):
        return of_another_group
    legal = [name for name in (*legal_keys(), *presets) if name not in MOVED]
    group, _, leaf = key.partition(".")
    if leaf and group in presets:  # the group is right, so its keys are the candidates
        leaves = [name.partition(".")[2] for name in legal if name.startswith(f"{group}.")]
        candidates = [f"{group}.{name}" for name in nearest(leaf, leaves)]
    else:
        candidates = nearest(key, legal)
    if full_key and not candidates:
        return of_another_group
    message = f"unknown key {key!r}"
    if candidates:
        corrections = list(dict.fromkeys(_correction(key, name) for name in candidates))
        message += f"; did you mean {' or '.join(map(repr, corrections))}?"
        message += f" type {' or '.join(f'{name}=…' for name in candidates)}"
        group = candidates[0].partition(".")[0]
    group_keys = [name.partition(".")[2] for name in legal_keys() if name.startswith(f"{group}.")]
    if group_keys and "." in (candidates[0] if candidates else key) and len(group_keys) <= 40:
        message += f"; the keys of {group}: {', '.join(group_keys)}"
    elif candidates and group in presets and "." not in candidates[0] and len(presets[group]) <= 12:
        message += f"; {_legal_names(presets[group])}"
    elif not candidates:
        message += f"; the groups are {', '.join(presets)}; `python -m glmtuner --help` explains them"
    return message


def _correction(key: str, candidate: str) -> str:
    """The part of `candidate` that differs from `key`; all of it where several parts differ or their number does."""
    parts, correct_parts = key.split("."), candidate.split(".")
    if len(parts) != len(correct_parts):
        return candidate
    wrong = [correct for part, correct in zip(parts, correct_parts, strict=True) if part != correct]
    return wrong[0] if len(wrong) == 1 else candidate


def user_keys_of(parsed: Iterable[Override]) -> set[str]:
    """The keys and groups that the overrides set."""
    return {override.key_or_group for override in parsed}
