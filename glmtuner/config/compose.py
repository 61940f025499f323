"""Words -> one validated `Run`, or one ConfigError; nothing is loaded or written here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from glmtuner.config.explain import explain
from glmtuner.config.overrides import bracket_lists, check_overrides, parse, user_keys_of
from glmtuner.config.paths import conf_dir
from glmtuner.config.schema import Run
from glmtuner.config.trainer_arguments import WORDS
from glmtuner.errors import CheckpointError, ConfigError

MOST_SWEEP_JOBS_CHECKED = 64
# What a checkpoint's own run decides, and the values in it that belong to the new run all the same.
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


@dataclass(frozen=True)
class Composed:
    """A validated run with what it was made from."""

    run: Run
    config: DictConfig  # the resolved config of the run, without Hydra's own part
    hydra: DictConfig
    overrides: list[str]  # as typed, commas expanded
    user_keys: set[str]  # the keys among them
    flags: tuple[str, ...] = ()  # the options that the same words need in another process


def presets(searched: Sequence[Path]) -> dict[str, list[str]]:
    """The names that each config group offers, from the YAML files of the searched folders."""
    found: dict[str, set[str]] = {}
    for folder in searched:
        for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "dataset"):
            names = {str(path.relative_to(group).with_suffix("")) for path in group.rglob("*.yaml")}
            found.setdefault(group.name, set()).update(names)
    return {group: sorted(names) for group, names in found.items() if not group.startswith((".", "hydra", "_"))}


def searched_dirs(config_dir: str | None) -> list[Path]:
    """conf/ of the package, then the user's `--config-dir`."""
    if config_dir is None:
        return [conf_dir()]
    extra = Path(config_dir).expanduser().resolve()
    if not extra.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder; it holds presets such as finetuning/mine.yaml")
    return [conf_dir(), extra]


def parse_and_check(
    overrides: Sequence[str], searched: Sequence[Path], multirun: bool
) -> tuple[list[str], list[Override]]:
    """The words with their commas settled, and Hydra's parse of them; raises on words that mean nothing."""
    settled = bracket_lists(overrides, multirun)
    parsed = parse(settled)
    check_overrides(parsed, presets(searched), multirun)
    return settled, parsed


def compose(overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config") -> Composed:
    """The run that these words mean."""
    searched = searched_dirs(config_dir)
    settled, parsed = parse_and_check(overrides, searched, multirun=False)
    with _composer(searched) as composed:
        config = composed(config_name, settled)
        config = with_checkpoint(config, user_keys_of(parsed), lambda extra: composed(config_name, [*extra, *settled]))
        flags = ("--config-dir", str(config_dir)) if config_dir else ()
        flags += ("--config-name", config_name) if config_name != "config" else ()
        return replace(validate(config, settled, user_keys_of(parsed)), flags=flags)


def validate(config: DictConfig, overrides: list[str], user_keys: set[str]) -> Composed:
    """The composed config as a validated `Run`; `config` has Hydra's own part under `hydra`."""
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
    resolved = OmegaConf.create(config)
    OmegaConf.resolve(resolved)
    for name in WORDS:
        resolved.trainer[name] = getattr(run.trainer, name)  # the word `no` where YAML read false
    return Composed(run=run, config=resolved, hydra=hydra, overrides=overrides, user_keys=user_keys)


class _composer:
    """Hydra, initialised on the searched folders; calling it composes, with errors in our words.

    Hydra's globals are put back afterwards: inside a job of a sweep they belong to the sweep.
    """

    def __init__(self, searched: Sequence[Path]) -> None:
        self.conf, *self.extra = searched

    def __enter__(self) -> "_composer":
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
            kept = [word for word in overrides if word != "experiment=null"]  # the default; Hydra takes no null typed
            return hydra_compose(config_name, overrides=[*extra, *kept], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            message, recipe = explain(error), next((word for word in overrides if word.startswith("experiment=")), None)
            if (
                recipe
                and "unknown key" in message
                and not any(word.partition("=")[0] in message for word in overrides if "." in word)
            ):
                message = f"{recipe} sets what does not fit the other overrides: {message}"
            raise ConfigError(message) from None


def compose_every_job(
    overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config"
) -> list[str]:
    """The words of a sweep with their commas settled, after every combination (the first ones of many) was composed."""
    searched = searched_dirs(config_dir)
    settled, parsed = parse_and_check(overrides, searched, multirun=True)
    with _composer(searched) as composed:
        for job in islice(_jobs(settled, parsed, presets(searched)), MOST_SWEEP_JOBS_CHECKED):
            user_keys = user_keys_of(parsed)
            config = composed(config_name, job)
            config = with_checkpoint(config, user_keys, lambda extra, job=job: composed(config_name, [*extra, *job]))
            validate(config, job, user_keys)
    return settled


def first_job(overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config") -> Composed:
    """The first run of a sweep whose words `check_sweep` has settled."""
    searched = searched_dirs(config_dir)
    job = next(_jobs(overrides, parse(overrides), presets(searched)))
    return compose(job, config_dir=config_dir, config_name=config_name)


def _jobs(overrides: Sequence[str], parsed: Sequence[Override], known: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """The words of each job of the basic sweeper's product; sweeps that only a sweeper can draw are left out."""
    choices: list[list[str]] = []
    for word, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            choices.append([word])
        elif isinstance(override.value(), Glob):
            names = override.value().filter(known.get(override.key_or_group, []))
            choices.append([f"{override.key_or_group}={name}" for name in names])
        elif override.is_discrete_sweep():
            choices.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
    for job in product(*choices):
        yield list(job)


def run_folder_of(checkpoint: str) -> Path | None:
    """The run folder that a checkpoint is, or lies in: the one with a config.yaml of ours."""
    folder = Path(checkpoint).expanduser()
    for candidate in (folder, folder.parent, folder.parent.parent):
        if (candidate / "config.yaml").is_file() and (candidate / "provenance.json").is_file():
            return candidate
    return None


def with_checkpoint(config: DictConfig, user_keys: set[str], recompose: Any) -> DictConfig:
    """The config with the model, quantization, method and generation of the last checkpoint's run, typed words aside.

    `recompose(words)` composes again with more group choices in front of the typed ones.
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
        return config
    saved = OmegaConf.load(source / "config.yaml")
    bits = saved.quant.get("quantization_bit")
    chosen = {"finetuning": saved.finetuning.finetuning_type, "quant": f"int{bits}" if bits else "none"}
    config = recompose([f"{group}={name}" for group, name in chosen.items() if group not in user_keys])
    for group in FROM_CHECKPOINT:
        if group == "finetuning" and config.finetuning.finetuning_type != chosen["finetuning"]:
            continue
        if group in user_keys and group in ("model", "generation"):
            continue
        for name, value in saved[group].items():
            key = f"{group}.{name}"
            if key not in user_keys and key not in NOT_FROM_CHECKPOINT and name in config[group]:
                OmegaConf.update(config, key, value)
    wanted, found = saved.model.model_name_or_path, config.model.model_name_or_path
    if wanted != found and not Path(found).expanduser().is_dir():
        raise CheckpointError(
            f"model.model_name_or_path={found} does not fit model.checkpoint_dir={checkpoints[-1]}, which was trained on "
            f"{wanted}; leave the model out, and the checkpoint's own is used"
        )
    return config
