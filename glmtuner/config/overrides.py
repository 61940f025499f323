"""What the user typed: the comma rule, words that live elsewhere, and words that do not exist.

All of it works on Hydra's own parse of the words, before anything is composed.
"""

import re
from collections.abc import Iterable, Mapping

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from glmtuner.config.schema import legal_keys, list_keys
from glmtuner.errors import ConfigError, did_you_mean, nearest

# Words of other tools and of CET, with what to type here instead.
MOVED = {
    "model.quantization_bit": "type quant=int4, quant=int8 or quant=none",
    "quant.quantization_bit": "the preset chooses the bits: type quant=int4, quant=int8 or quant=none",
    "model.quantization_type": "type quant.quantization_type=… with quant=int4",
    "model.double_quantization": "type quant.double_quantization=… with quant=int4",
    "finetuning.finetuning_type": "the preset is the method: type finetuning={value}",
    "stage.name": "the preset is the stage: type stage={value}",
    "tracker.name": "the preset is the tracker: type tracker={value}",
    "metric.name": "the preset is the metric: type metric={value}",
    "trainer.report_to": "type tracker=wandb, tracker=tensorboard or tracker=none",
    "trainer.fsdp": "type parallel=fsdp2",
    "trainer.fsdp_config": "type parallel=fsdp2, and parallel.reshard_after_forward or parallel.cpu_offload",
    "trainer.deepspeed": "type parallel=zero2 or parallel=zero3; a file of your own is parallel.deepspeed_config={value}",
    "parallel.name": "the preset is the way: type parallel={value}",
    "trainer.generation_num_beams": "type data.eval_num_beams={value}",
    "trainer.generation_max_length": "answers have up to data.max_target_length tokens: type data.max_target_length={value}",
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
}


def parse(overrides: Iterable[str]) -> list[Override]:
    """Hydra's parse of each word; a word it cannot read is an error that says where it stopped."""
    parser = OverridesParser.create()
    found = []
    for word in overrides:
        if word.startswith("-"):
            name = word.lstrip("-").partition("=")[0]
            place = _home_of(name)
            hint = f"type {place}=…" if place else "`python -m glmtuner --help` lists the options"
            raise ConfigError(f"unknown option {word!r}: values are given as key=value, without dashes; {hint}")
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(
                f"{word!r} has no '=': values are given as key=value; a verb such as `show` comes first, before its run folder"
            )
        try:
            found.append(parser.parse_override(word))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{word!r} cannot be read ({reason}); quote text that holds spaces, commas or brackets, "
                "as in 'name=\"a, b\"'"
            ) from None
    return found


QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
VALUES = re.compile(QUOTED + r"""|[^,\[\]{}()'"]+""")  # and text between signs
VALUES_OF_KEYS = re.compile(QUOTED + r"""|[^,:\[\]{}()'"]++(?!:)""")


def quoted(word: str) -> str:
    """`data.dataset=我的.json` as `data.dataset='我的.json'`: Hydra reads no character beyond ASCII that is not quoted."""
    key, sign, value = word.partition("=")
    if value.isascii() or "${" in value:
        return word

    def quote(found: re.Match[str]) -> str:
        text = found.group()
        core = text.strip()
        return text if text.isascii() or text[0] in "'\"" else text.replace(core, f"'{core}'")

    return key + sign + (VALUES_OF_KEYS if value.lstrip().startswith("{") else VALUES).sub(quote, value)


def bracket_lists(overrides: Iterable[str], multirun: bool) -> list[str]:
    """`data.dataset=a,b` as `data.dataset=[a,b]`; in a sweep as `data.dataset=[a],[b]`. Brackets always mean one mix.

    Every word comes back `quoted`.
    """
    lists = list_keys()
    rewritten = []
    for word, override in ((word, _readable(word)) for word in map(quoted, overrides)):
        if override is None or override.key_or_group not in lists:
            rewritten.append(word)
            continue
        key, _, raw = word.partition("=")
        value = override.value()
        if override.is_sweep_override():
            mixed = not override.is_choice_sweep() or any(isinstance(item, list) for item in value.list)
            if mixed:
                rewritten.append(word)
                continue
            items = [Override._get_value_element_as_str(item) for item in value.list]
            rewritten.append(
                f"{key}={','.join(f'[{item}]' for item in items)}" if multirun else f"{key}=[{','.join(items)}]"
            )
        elif isinstance(value, list) or value is None or raw.startswith("${"):
            rewritten.append(word)
        else:
            rewritten.append(f"{key}=[{raw}]" if raw else f"{key}=[]")
    return rewritten


def _readable(word: str) -> Override | None:
    try:
        return None if word.startswith("-") else OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def check_overrides(parsed: Iterable[Override], presets: Mapping[str, list[str]], multirun: bool) -> None:
    """Raise one ConfigError for all words that no run could mean; `presets` are the legal names of each group."""
    wrong = [told for override in parsed for told in _wrong(override, presets, multirun)]
    if wrong:
        raise ConfigError("; also: ".join(wrong))


def _wrong(override: Override, presets: Mapping[str, list[str]], multirun: bool) -> Iterable[str]:
    key = override.key_or_group
    value = _value_of(override)
    if key in MOVED:
        yield f"{key}={value} is no key here: {MOVED[key].format(value=value)}"
    elif key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    elif key in presets:
        if not override.is_delete():
            yield from _wrong_preset(key, override, presets[key], multirun)
    elif (leaf := _dictionary_above(key)) and not override.is_force_add():
        inner = key.removeprefix(f"{leaf}.")
        yield f"{key}={value}: {leaf} is given whole; type '{leaf}={{{inner}: {value}}}'"
    elif not _is_legal(key):
        yield _unknown(key, presets)
    elif override.is_sweep_override() and not multirun and key not in list_keys():
        yield f"{key}={value}: several values are a sweep; type -m before them, or one value"


def _value_of(override: Override) -> str:
    """The value as it was typed."""
    return (override.input_line or "").partition("=")[2]


def _wrong_preset(group: str, override: Override, legal: list[str], multirun: bool) -> Iterable[str]:
    if override.is_sweep_override() and (not override.is_choice_sweep() or isinstance(override.value(), Glob)):
        return
    if override.is_sweep_override() and not multirun:
        yield f"{group}={_value_of(override)}: several presets are a sweep; type -m before them, or one preset"
        return
    value = override.value()
    for name in value.list if override.is_choice_sweep() else [value]:
        name = "null" if name is None else str(name)
        if name not in legal and not (name == "null" and group == "experiment"):
            yield f"{group}={name}: no {group} preset of that name{did_you_mean(name, legal, _sentence(legal))}"


def _sentence(legal: list[str]) -> str:
    return f"legal: {', '.join(legal)}"


def _is_legal(key: str) -> bool:
    return key in legal_keys() or _dictionary_above(key) is not None


def _dictionary_above(key: str) -> str | None:
    """The leaf that a key goes further into, such as trainer.lr_scheduler_kwargs of …kwargs.num_cycles."""
    keys = legal_keys()
    parts = key.split(".")
    return next((".".join(parts[:end]) for end in range(1, len(parts)) if ".".join(parts[:end]) in keys), None)


def _home_of(leaf: str) -> str | None:
    """The dotted key of a bare word that stands in exactly one place."""
    places = [key for key in legal_keys() if key.rpartition(".")[2] == leaf]
    return places[0] if len(places) == 1 else None


def _unknown(key: str, presets: Mapping[str, list[str]]) -> str:
    """`unknown key 'data.datset'; did you mean 'dataset'? type data.dataset=…`."""
    home = _home_of(key.rpartition(".")[2])
    elsewhere = f"unknown key {key!r}: it belongs to {(home or '').partition('.')[0]}; type {home}=…"
    if home and ("." not in key or key.partition(".")[0] in presets):
        return elsewhere
    places = [place for place in (*legal_keys(), *presets) if place not in MOVED]
    group, _, leaf = key.partition(".")
    if leaf and group in presets:  # the group is right, so the word is one of its own
        own = [place.partition(".")[2] for place in places if place.startswith(f"{group}.")]
        near = [f"{group}.{word}" for word in nearest(leaf, own)]
    else:
        near = nearest(key, places)
    if home and not near:
        return elsewhere
    told = f"unknown key {key!r}"
    if near:
        overrides = list(dict.fromkeys(_differing(key, place) for place in near))
        told += (
            f"; did you mean {' or '.join(map(repr, overrides))}? type {' or '.join(f'{place}=…' for place in near)}"
        )
        group = near[0].partition(".")[0]
    inside = [place.partition(".")[2] for place in legal_keys() if place.startswith(f"{group}.")]
    if inside and "." in (near[0] if near else key) and len(inside) <= 40:
        told += f"; {group} knows: {', '.join(inside)}"
    elif near and group in presets and "." not in near[0] and len(presets[group]) <= 12:
        told += f"; {_sentence(presets[group])}"
    elif not near:
        told += f"; the groups are {', '.join(presets)}; `python -m glmtuner --help` explains them"
    return told


def _differing(key: str, place: str) -> str:
    """The word of `place` that `key` got wrong; the whole place when they split differently."""
    typed, right = key.split("."), place.split(".")
    if len(typed) != len(right):
        return place
    wrong = [want for got, want in zip(typed, right, strict=True) if got != want]
    return wrong[0] if len(wrong) == 1 else place


def user_keys_of(parsed: Iterable[Override]) -> set[str]:
    """The keys and groups that stand on the command line."""
    return {override.key_or_group for override in parsed}
