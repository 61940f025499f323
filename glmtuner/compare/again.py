"""The configuration of a finished run, composed again: its overrides, and the values of config.yaml where today's presets differ."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from glmtuner.compare.facts import Difference, flat, is_irrelevant, shown
from glmtuner.compare.loaded import LoadedRun
from glmtuner.config.compose import Composed, compose
from glmtuner.config.overrides import parse, quoted_value
from glmtuner.config.removed import PRESETS, removed_key, removed_preset
from glmtuner.config.schema import key_defaults, legal_keys
from glmtuner.errors import CheckpointError, ConfigError, GlmtunerError
from glmtuner.launch.resume import lies_in
from glmtuner.run_folder.acquire import differing_keys
from glmtuner.run_folder.files import require_file
from glmtuner.run_folder.names import OVERRIDES
from glmtuner.run_folder.redaction import HIDDEN

# A repetition publishes nothing, and runs in a folder of its own.
INSTEAD = ("tracker=none", "trainer.push_to_hub=false")
LEFT_OUT = (
    "plugins",
    "tracker",
    "trainer.push_to_hub",
    "trainer.hub_",
    "trainer.output_dir",
    "trainer.overwrite_output_dir",
    "hydra",
)
RESUME = "trainer.resume_from_checkpoint"


@dataclass(frozen=True)
class Recomposed:
    """A run that is to be repeated, what must be known of how it was composed, and the settings that are not as they were."""

    composed: Composed
    notes: list[str]
    differences: list[Difference]


def recompose(run: LoadedRun, typed: Sequence[str]) -> Recomposed:
    """The run's configuration, with the overrides `typed` now behind it; the current folder is that of the run.

    Raises ConfigError where this version of glmtuner cannot compose it, and CheckpointError where overrides.txt is missing.
    """
    require_trusted_plugins(run, typed)
    replaced = replaced_groups(run, typed)
    overrides, notes = stored_overrides(run, replaced)
    options = stored_options(run)
    choices = [override for override in typed if _group_of(override) in replaced]
    first = _composed(run, [*overrides, *INSTEAD, *choices], options)
    corrections = []
    saved, known = flat(run.config), legal_keys()
    for key in differing_keys(run.config, first.config, key_defaults()):
        if is_irrelevant(key) or key.startswith(LEFT_OUT) or key == RESUME or key.partition(".")[0] in replaced:
            continue
        value = saved.get(key, key_defaults().get(key))
        if key not in flat(first.config) and key not in known:
            notes.append(
                f"{key}={shown(value, 'configuration')}: this version of glmtuner does not have the key, so it is left out"
            )
            continue
        corrections.append(f"{key}={override_text(value)}")
        now = shown(flat(first.config).get(key), "configuration")
        notes.append(
            f"{key} is {shown(value, 'configuration')} in its config.yaml, and {now} by its overrides today; the former is used"
        )
    composed = _composed(run, [*overrides, *INSTEAD, *corrections, *typed], options)
    return Recomposed(composed, notes, typed_differences(run.config, composed.config))


def require_trusted_plugins(run: LoadedRun, typed: Sequence[str]) -> None:
    """Raise ConfigError where the run has plugins and the user has not typed them: they are code, which a run folder alone may name."""
    plugins = run.values.get("plugins")
    if plugins and not any(override.partition("=")[0] == "plugins" for override in typed):
        listed = ",".join(map(str, plugins))
        raise ConfigError(
            f"reproduce {run.folder.path}: the run was made with plugins=[{listed}], and code is executed only where you name it; type "
            f"plugins={listed} behind the run if you trust it, as it is in {run.cwd or Path.cwd()} or installed"
        )


def replaced_groups(run: LoadedRun, typed: Sequence[str]) -> set[str]:
    """The groups whose preset this version of glmtuner no longer has, and for which the user types another one."""
    named = {override.partition("=")[0] for override in typed}
    return {group for group, name in PRESETS if group in named and run.values.get(f"{group}.name") == name}


def _group_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition(".")[0]


def stored_overrides(run: LoadedRun, replaced: Collection[str]) -> tuple[list[str], list[str]]:
    """The overrides of overrides.txt that a repetition takes, and what must be known of the others.

    Of a `replaced` group, those that this version of glmtuner no longer has are left out.
    """
    path = run.folder / OVERRIDES
    require_file(path)
    kept, notes = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        key, _, value = line.partition("=")
        if not line or key.lstrip("+~").startswith(LEFT_OUT):
            continue
        if _group_of(line) in replaced and (why := removed_preset(key, value) or removed_key(key, value)):
            notes.append(f"left out: {why}")
        elif HIDDEN in value:
            notes.append(
                f"{key} was a secret, which is stored nowhere, and is left out; type {key}=… behind the run if it needs it"
            )
        elif key.lstrip("+") == RESUME and _is_own(run, value):
            notes.append(f"{line} is left out: it resumed the run itself, which is repeated as a whole")
        elif _parses(line):
            kept.append(line)
        else:
            notes.append(f"{line!r} in its overrides.txt is no override, and is left out; config.yaml has all values")
    return kept, notes


def _parses(line: str) -> bool:
    try:
        parse([line])
    except (ConfigError, ValueError):
        return False
    return True


def _is_own(run: LoadedRun, value: str) -> bool:
    """Whether a value of trainer.resume_from_checkpoint means the run's own checkpoint."""
    text = value.strip("'\"")
    return text.lower() == "true" or lies_in(Path(text).expanduser(), run.folder.path)


def stored_options(run: LoadedRun) -> dict[str, Any]:
    """The options of `compose` that the run was started with."""
    flags = run.provenance.get("flags", [])
    pairs = dict(zip(flags[::2], flags[1::2], strict=False))
    options = {"config_dir": pairs.get("--config-dir"), "config_name": pairs.get("--config-name")}
    return {name: value for name, value in options.items() if isinstance(value, str)}


def _composed(run: LoadedRun, overrides: list[str], options: dict[str, Any]) -> Composed:
    try:
        return compose(overrides, **options)
    except CheckpointError:
        raise
    except GlmtunerError as error:
        raise ConfigError(f"reproduce {run.folder.path}: its configuration cannot be composed today: {error}") from None


def typed_differences(saved: DictConfig, config: DictConfig) -> list[Difference]:
    """The settings of the repetition that are not those of the run, those aside on which no result depends."""
    keys = [
        key
        for key in differing_keys(saved, config, key_defaults())
        if not is_irrelevant(key) and not key.startswith(LEFT_OUT)
    ]
    before, now, defaults = flat(saved), flat(config), key_defaults()
    return [
        Difference("configuration", key, (before.get(key, defaults.get(key)), now.get(key, defaults.get(key))))
        for key in keys
        if key != RESUME
    ]


def override_text(value: Any) -> str:
    """The value as Hydra's grammar writes it in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(override_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {override_text(each)}' for key, each in value.items())}}}"
    return quoted_value(str(value))
