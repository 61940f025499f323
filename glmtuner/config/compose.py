"""Overrides -> one validated `Run`, or one ConfigError; nothing is loaded or written here."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from glmtuner.config.explain import explain
from glmtuner.config.new_tokens import KEY as NEW_TOKENS
from glmtuner.config.new_tokens import new_tokens_in
from glmtuner.config.overrides import bracket_lists, check_overrides, parse, user_keys_of
from glmtuner.config.paths import conf_dir, is_run_folder
from glmtuner.config.plugins import load_plugins, plugin_presets
from glmtuner.config.rope import KNOB as ROPE_SCALING
from glmtuner.config.rope import knob_of
from glmtuner.config.run_rules import nested_values, run_errors
from glmtuner.config.schema import Run
from glmtuner.config.search_space import SearchSpace, has_condition
from glmtuner.config.trainer_arguments import WORDS
from glmtuner.config.trainer_fields import field_errors
from glmtuner.config.trainer_rules import trainer_errors
from glmtuner.console import complain
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.names import CONFIG
from glmtuner.run_folder.saved_config import read_config

MOST_SWEEP_JOBS_CHECKED = 64
# Groups whose values come from a checkpoint's own run, and the keys in them that are the new run's all the same.
FROM_CHECKPOINT = ("model", "quant", "finetuning", "generation")
NOT_FROM_CHECKPOINT = {
    "model.checkpoint_dir",
    "model.reward_model",
    "model.resume_lora_training",
    "model.plot_loss",
    "model.cache_dir",
    "model.use_auth_token",
    "quant.quantization_bit",
    "finetuning.finetuning_type",
}
THINKING = "data.thinking"  # comes from a checkpoint's own run, too, unless it is trained further


@dataclass(frozen=True)
class Composed:
    """A validated run, and what it was composed from."""

    run: Run
    config: DictConfig  # the resolved config of the run, without Hydra's own part
    hydra: DictConfig
    overrides: list[str]  # the user's, normalized by `bracket_lists`
    user_keys: set[str]  # the keys and groups that they set
    flags: tuple[str, ...] = ()  # the options that another process needs to compose the same run


def presets(searched: Sequence[Path]) -> dict[str, list[str]]:
    """The names that each config group offers, from the YAML files of the searched folders and from plugins."""
    names_by_group: dict[str, set[str]] = {}
    for folder in searched:
        for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "dataset"):
            names = {str(path.relative_to(group).with_suffix("")) for path in group.rglob("*.yaml")}
            names_by_group.setdefault(group.name, set()).update(names)
    for name, added in plugin_presets().items():
        names_by_group.setdefault(name, set()).update(added)
    return {
        group: sorted(names) for group, names in names_by_group.items() if not group.startswith((".", "hydra", "_"))
    }


def searched_dirs(config_dir: str | None) -> list[Path]:
    """The folders that presets are looked up in: conf/ of the package, then the user's `--config-dir`.

    Raises ConfigError where that is not a folder, or where Hydra would ignore a preset in it.
    """
    if config_dir is None:
        return [conf_dir()]
    extra = Path(config_dir).expanduser().resolve()
    if not extra.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder; it holds presets such as finetuning/mine.yaml")
    _check_not_shadowed(config_dir, extra)
    return [conf_dir(), extra]


def _check_not_shadowed(config_dir: str, extra: Path) -> None:
    """Raise for the presets in `extra` that have the group and name of a shipped one: Hydra takes the first that it finds.

    dataset/ is not Hydra's: in the catalogue, the user's entries come first.
    """
    conf = conf_dir()
    shipped = sorted(path.relative_to(conf).with_suffix("") for path in conf.glob("*/**/*.yaml"))
    shadowed = [
        preset.as_posix()
        for preset in shipped
        if preset.parts[0] != "dataset" and extra != conf and (extra / preset).with_suffix(".yaml").is_file()
    ]
    if shadowed:
        group, _, name = shadowed[0].rpartition("/")
        raise ConfigError(
            f"--config-dir {config_dir}: {', '.join(f'{preset}.yaml' for preset in shadowed)} would be ignored, since the shipped "
            f"preset of the same name is used instead; rename it to {group}/my_{name}.yaml, say, and type {group}=my_{name} (it may "
            f"start from the shipped one, with defaults: [/{shadowed[0]}@_here_])"
        )


def parse_and_check(
    overrides: Sequence[str], searched: Sequence[Path], multirun: bool
) -> tuple[list[str], list[Override]]:
    """The overrides, normalized by `bracket_lists`, and Hydra's parse of them; raises ConfigError for illegal ones."""
    normalized = bracket_lists(overrides, multirun)
    parsed = parse(normalized)
    load_plugins([name for override in parsed if override.key_or_group == "plugins" for name in _plugins_in(override)])
    check_overrides(parsed, presets(searched), multirun)
    return normalized, parsed


def _plugins_in(override: Override) -> list[str]:
    """The modules that a `plugins=` override names, in a sweep those of all its values."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [str(name) for part in values for name in (part if isinstance(part, list) else [part]) if part]


def compose(overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config") -> Composed:
    """The run that the overrides describe, validated; raises ConfigError or CheckpointError."""
    searched = searched_dirs(config_dir)
    normalized, parsed = parse_and_check(overrides, searched, multirun=False)
    user_keys = user_keys_of(parsed)
    flags: tuple[str, ...] = ("--config-dir", str(config_dir)) if config_dir else ()
    flags += ("--config-name", config_name) if config_name != "config" else ()
    if (checked := _CHECKED_JOBS.pop(_identity(normalized, config_dir, config_name), None)) is not None:
        return replace(checked, overrides=normalized, user_keys=user_keys, flags=flags)
    with Composer(searched) as composer:
        config = composer(config_name, normalized)
        config = with_checkpoint(config, user_keys, lambda extra: composer(config_name, [*extra, *normalized]))
        return replace(validate(config, normalized, user_keys), flags=flags)


def validate(config: DictConfig, overrides: list[str], user_keys: set[str]) -> Composed:
    """The composed config as a validated `Run`; Hydra's own part, `config.hydra`, is moved out of it."""
    HydraConfig.instance().set_config(config)
    hydra = config.hydra
    with read_write(config), open_dict(config):
        del config["hydra"]
    try:
        run = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value yet; type {error.full_key}=…") from None
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(run, Run)
    if wrong := [*field_errors(run.trainer), *trainer_errors(run.trainer), *run_errors(run)]:
        raise ConfigError("; also: ".join(wrong))
    resolved = OmegaConf.create(config)
    OmegaConf.resolve(resolved)
    for name in WORDS:
        resolved.trainer[name] = getattr(run.trainer, name)  # "no" where YAML read false
    return Composed(run=run, config=resolved, hydra=hydra, overrides=overrides, user_keys=user_keys)


class Composer:
    """A context in which Hydra is initialised on the searched folders; calling it composes, and raises ConfigErrors.

    Hydra's globals are restored afterwards: inside a job of a sweep they belong to the sweep.
    """

    def __init__(self, searched: Sequence[Path]) -> None:
        self.conf, *self.extra = searched

    def __enter__(self) -> "Composer":
        setup_globals()
        self.outer = (GlobalHydra.instance().hydra, HydraConfig.instance().cfg)
        GlobalHydra.instance().clear()
        self.context = initialize_config_dir(str(self.conf), version_base="1.3", job_name="glmtuner")
        self.context.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self.context.__exit__(*reason)
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = self.outer

    def __call__(self, config_name: str, overrides: Sequence[str]) -> DictConfig:
        extra = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in self.extra)}]"] if self.extra else []
        try:
            kept = [
                item for item in overrides if item != "experiment=null"
            ]  # the default; Hydra refuses it as an override
            config = hydra_compose(config_name, overrides=[*extra, *kept], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, OverflowError) as error:
            message = explain(error)
            recipe = next((item for item in overrides if item.startswith("experiment=")), None)
            dotted_keys = [item.partition("=")[0] for item in overrides if "." in item]
            if recipe and "unknown key" in message and not any(key in message for key in dotted_keys):
                message = f"{recipe} sets a value that does not fit the other overrides: {message}"
            raise ConfigError(message) from None
        if nested := [*nested_values(config)]:
            raise ConfigError("; also: ".join(nested))
        return config


def compose_every_job(
    overrides: Sequence[str],
    *,
    config_dir: str | None = None,
    config_name: str = "config",
    seen: Callable[[Composed], None] = lambda job: None,
) -> list[str]:
    """The normalized overrides of a sweep, after each job (the first 64 of many) was composed, validated and `seen`."""
    searched = searched_dirs(config_dir)
    normalized, parsed = parse_and_check(overrides, searched, multirun=True)
    user_keys = user_keys_of(parsed)
    _CHECKED_JOBS.clear()
    with Composer(searched) as composer:
        for job in islice(_jobs(normalized, parsed, presets(searched)), MOST_SWEEP_JOBS_CHECKED):
            try:
                config = composer(config_name, job)
            except ConfigError as error:
                hint = _search_hint(error) if any("hydra/sweeper" in text for text in normalized) else ""
                raise ConfigError(f"{error}{hint}") from None
            config = with_checkpoint(config, user_keys, lambda extra, job=job: composer(config_name, [*extra, *job]))
            checked = validate(config, job, user_keys)
            seen(checked)
            if not any(text.startswith("hydra.job.env_set") for text in job):  # its variables may be part of the values
                _CHECKED_JOBS[_identity(job, config_dir, config_name)] = checked
    return normalized


def check_search_space(space: SearchSpace, *, config_dir: str | None = None, config_name: str = "config") -> None:
    """Compose and validate trials with the extreme values of every searched key; raises ConfigError for the first that cannot be."""
    for searched in islice(space.corners(), MOST_SWEEP_JOBS_CHECKED):
        try:
            compose([*space.fixed, *searched], config_dir=config_dir, config_name=config_name)
        except ConfigError as error:
            raise ConfigError(f"{error}; that is of the trial with {' '.join(searched)}{_search_hint(error)}") from None


def _search_hint(error: ConfigError) -> str:
    if "it belongs to" in str(error):
        return "; a key that one choice alone has takes it as a condition, as in 'finetuning.lora_rank=tag(\"finetuning=lora\", choice(8, 16))'"
    return (
        "; a search draws whole numbers by int(interval(1, 8)), or range(1, 9)"
        if "expected a whole number" in str(error)
        else ""
    )


# Jobs of this process's sweep that were composed before the first one started, until each is run.
_CHECKED_JOBS: dict[tuple[str | None, ...], Composed] = {}


def _identity(overrides: Sequence[str], config_dir: str | None, config_name: str) -> tuple[str | None, ...]:
    """What a run is composed of, without Hydra's own keys."""
    return (
        os.getcwd(),
        config_dir,
        config_name,
        *(text for text in overrides if not text.startswith(("hydra.", "hydra/"))),
    )


def first_job(overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config") -> Composed:
    """The first job of a sweep, from the overrides that `compose_every_job` returned."""
    searched = searched_dirs(config_dir)
    job = next(_jobs(overrides, parse(overrides), presets(searched)))
    return compose(job, config_dir=config_dir, config_name=config_name)


def every_job(
    overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config"
) -> Iterator[Composed]:
    """Each job of a sweep, composed and validated, in the order of the basic sweeper."""
    searched = searched_dirs(config_dir)
    normalized, parsed = parse_and_check(overrides, searched, multirun=True)
    for job in _jobs(normalized, parsed, presets(searched)):
        yield compose(job, config_dir=config_dir, config_name=config_name)


def composed_jobs(
    overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config"
) -> list[Composed]:
    """The jobs of a sweep, the first 64 of many, from the overrides that `compose_every_job` returned."""
    jobs = _jobs(overrides, parse(overrides), presets(searched_dirs(config_dir)))
    return [
        compose(job, config_dir=config_dir, config_name=config_name) for job in islice(jobs, MOST_SWEEP_JOBS_CHECKED)
    ]


def count_jobs(overrides: Sequence[str], *, config_dir: str | None = None) -> int:
    """The number of combinations of the swept values; what a search samples counts as one value."""
    return sum(1 for _ in combinations(overrides, config_dir=config_dir))


def combinations(overrides: Sequence[str], *, config_dir: str | None = None) -> Iterator[list[str]]:
    """The overrides of each job of a grid, in its order."""
    return _jobs(overrides, parse(overrides), presets(searched_dirs(config_dir)))


def _jobs(overrides: Sequence[str], parsed: Sequence[Override], known: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """The overrides of each job of the basic sweeper's product; keys that only a search can draw (`interval`) are left out.

    So are those on a condition: see `check_search_space`.
    """
    choices: list[list[str]] = []
    for text, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            choices.append([text])
        elif has_condition(override):
            continue
        elif isinstance(value := override.value(), Glob):
            legal = known.get(override.key_or_group, [])
            names = value.filter(legal)
            if not names:
                raise ConfigError(
                    f"{text}: no {override.key_or_group} preset matches; legal: {', '.join(legal) or 'none'}"
                )
            choices.append([f"{override.key_or_group}={name}" for name in names])
        elif override.is_discrete_sweep():
            choices.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
    for job in product(*choices):
        yield list(job)


def run_folder_of(checkpoint: str) -> Path | None:
    """The run folder that a checkpoint is, or is inside of; None for others.

    A damaged run folder is one, too: as another program's, its checkpoint would be taken for one of the default model.
    """
    folder = Path(checkpoint).expanduser()
    return next(filter(is_run_folder, (folder, folder.parent, folder.parent.parent)), None)


@cache
def _complain_once(sentence: str) -> None:
    complain(sentence)


def _take(config: DictConfig, key: str, value: Any, source: Path) -> None:
    """Set a value of the config to that of the run in a folder; raises CheckpointError if it is not legal."""
    try:
        OmegaConf.update(config, key, value, force_add=True)  # entries of dictionaries, too
    except (OmegaConfBaseException, OverflowError) as error:
        raise CheckpointError(f"{source / CONFIG} is damaged ({key}: {explain(error)})") from None


def with_checkpoint(config: DictConfig, user_keys: set[str], recompose: Any) -> DictConfig:
    """The config with the model, quantization, method and generation of the last checkpoint's run, except for user keys.

    And with its data.thinking, unless it is trained further.

    `recompose(choices)` composes again with more group choices in front of the user's overrides. Raises CheckpointError where
    a checkpoint is not found, or where its run was trained on another model than the user names.
    """
    checkpoints = OmegaConf.select(config, "model.checkpoint_dir") or []
    for checkpoint in checkpoints:
        if not Path(checkpoint).expanduser().is_dir():
            raise CheckpointError(
                f"model.checkpoint_dir={checkpoint}: no such folder; name a run folder such as outputs/<date>/<time>_<name>, "
                "or a folder with an adapter_config.json or a config.json"
            )
    source = run_folder_of(checkpoints[-1]) if checkpoints else None
    if source is None:
        return (
            _with_tokens(config, new_tokens_in(Path(checkpoints[-1]).expanduser()), checkpoints)
            if checkpoints
            else config
        )
    saved = read_config(source / CONFIG)
    load_plugins(saved.get("plugins", []), named_by_run=True)
    bits = saved.quant.get("quantization_bit")
    chosen = {"finetuning": saved.finetuning.finetuning_type, "quant": f"int{bits}" if bits else "none"}
    config = recompose([f"{group}={name}" for group, name in chosen.items() if group not in user_keys])
    if not config.trainer.do_train and THINKING not in user_keys and "thinking" in saved.get("data", {}):
        _take(config, THINKING, saved.data.thinking, source)
    for group in FROM_CHECKPOINT:
        if group == "finetuning" and config.finetuning.finetuning_type != chosen["finetuning"]:
            continue
        of_user = group in user_keys and group in ("model", "generation")
        known = [*config[group]]  # also those without a value yet
        for name, value in saved[group].items():
            key = f"{group}.{name}"
            if of_user and key != ROPE_SCALING:  # without which an adapter would be put on other positions than its own
                continue
            if key not in user_keys and key not in NOT_FROM_CHECKPOINT and name in known:
                _take(config, key, value, source)
            elif name not in known and value not in (None, False):
                _complain_once(f"{source / CONFIG}: {key}={value} is unknown to this version of glmtuner and left out")
    if ROPE_SCALING in user_keys and (trained := saved.model.get("rope_scaling")) != config.model.rope_scaling:
        _complain_once(
            f"{knob_of(config.model.rope_scaling)}, as typed: {checkpoints[-1]} was trained with {knob_of(trained)}"
        )
    trained_on, base = saved.model.model_name_or_path, config.model.model_name_or_path
    if base != trained_on and not Path(base).expanduser().is_dir():
        raise CheckpointError(
            f"model.model_name_or_path={base} does not fit model.checkpoint_dir={checkpoints[-1]}, which was trained on "
            f"{trained_on}; leave the model out to use the checkpoint's own"
        )
    return _with_tokens(config, saved.get("data", {}).get("new_tokens") or [], checkpoints)


def _with_tokens(config: DictConfig, trained_with: Sequence[str], checkpoints: Sequence[str]) -> DictConfig:
    """The config with the new tokens that the last checkpoint was trained with; raises ConfigError where others are typed."""
    typed = [*config.data.new_tokens]
    if typed and typed[: len(trained_with)] != [*trained_with]:
        listed = ",".join(trained_with)
        raise ConfigError(
            f"{NEW_TOKENS}=[{','.join(typed)}] with model.checkpoint_dir={checkpoints[-1]}, which was trained with [{listed}]: the "
            f"rows of its tokens come first; type {NEW_TOKENS}=[{listed},…], or leave it out"
        )
    if trained_with and not typed:
        OmegaConf.update(config, NEW_TOKENS, [*trained_with])
    return config
