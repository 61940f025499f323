"""Plugins: a user's own metric, method, stage, tracker, reward or dataset format, in a module outside of the package.

A plugin is a module that registers its classes as glmtuner's own modules do, with `@preset(group, name)`, its rewards with
`reward_function(name)`, or its record format with `register_format`. It is named by `plugins=[my_module]`, or by the entry-point group `glmtuner.plugins` of an
installed package, and imported before the configuration is composed, so that its keys are checked like all others. A
preset without a YAML file is selected by its name and has the defaults of its class.
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore

from glmtuner.config.groups import SCHEMA_CLASSES, preset_key
from glmtuner.config.paths import is_run_folder
from glmtuner.config.rewards import GROUP as REWARD
from glmtuner.errors import ConfigError

GROUP = "glmtuner.plugins"  # of entry points


@dataclass(frozen=True)
class Plugin:
    """An imported plugin, and the presets that it registered, as (group, name)."""

    module: ModuleType
    presets: tuple[tuple[str, str], ...]

    def about(self) -> dict[str, Any]:
        """Its entry in provenance.json: its name, its presets, and its file with the SHA-256."""
        path = Path(self.module.__file__ or "")
        about: dict[str, Any] = {
            "name": self.module.__name__,
            "presets": [f"{group}={name}" for group, name in self.presets],
        }
        if path.is_file():
            about |= {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return about


_loaded: dict[str, Plugin] = {}


def load_plugins(names: Sequence[str], *, named_by_run: bool = False) -> None:
    """Import these modules and those of the entry points, once each; raises ConfigError if an import fails.

    `named_by_run` says that a run folder names them, not the user: code that came with a run folder is not executed then.
    """
    for name in (*installed_plugins(), *names):
        if name not in _loaded:
            if (working_dir := str(Path.cwd())) not in sys.path:  # `python -m` adds it, the console script does not
                sys.path.append(working_dir)
            if named_by_run and _lies_in_a_run(name):
                raise ConfigError(
                    f"plugins=[{name}]: the run names it, and the module lies in a run folder; code that came with a run is not "
                    f"executed: type plugins={name} if you trust it"
                )
            _loaded[name] = _imported(name)


def _lies_in_a_run(name: str) -> bool:
    """Whether the module, or the package it is in, would be imported from a run folder."""
    spec = find_spec(name.partition(".")[0])  # of the package: a submodule's would import it
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    folders = [folder for place in places for folder in (Path(place).resolve(), *Path(place).resolve().parents)]
    return any(map(is_run_folder, folders))


@cache
def installed_plugins() -> tuple[str, ...]:
    """The modules that installed packages offer as plugins."""
    return tuple(dict.fromkeys(entry.module for entry in entry_points(group=GROUP)))


def loaded_plugins(names: Iterable[str]) -> list[Plugin]:
    """The plugins of a run: those that it names, and those of installed packages."""
    return [_loaded[name] for name in dict.fromkeys((*installed_plugins(), *names)) if name in _loaded]


def plugin_presets() -> dict[str, list[str]]:
    """The preset names that plugins add to each group."""
    added: dict[str, list[str]] = {}
    for plugin in _loaded.values():
        for group, name in plugin.presets:
            added.setdefault(group, []).append(name)
    return added


def _imported(name: str) -> Plugin:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.partition(".")[0] != error.name.partition(".")[0]:
            raise _failed(name, error) from error
        raise ConfigError(
            f"plugins=[{name}]: no such module; put {name.replace('.', '/')}.py into the working directory ({Path.cwd()}), or "
            "install its package"
        ) from None
    except ConfigError as error:  # of a preset's registration
        raise ConfigError(f"plugins=[{name}]: {error}") from None
    except Exception as error:
        raise _failed(name, error) from error
    # not what this import added: the module may be imported already, as in a process that unpickles one of its classes
    package = name.partition(".")[0]
    added = sorted(
        (group, preset)
        for group, classes in SCHEMA_CLASSES.items()
        for preset, cls in classes.items()
        if cls.__module__.partition(".")[0] == package
    )
    for group, preset in added:
        node = {"defaults": [f"/schema/{group}/{preset}@_here_"], preset_key(group): preset}
        place = f"{group}.{preset}" if group == REWARD else None  # a run has several rewards
        ConfigStore.instance().store(group=group, name=preset, node=node, package=place)
    return Plugin(module, tuple(added))


def _failed(name: str, error: Exception) -> ConfigError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ConfigError(
        f"plugins=[{name}]: importing it failed ({reason}, at {last.filename}:{last.lineno}); fix it, or leave it out"
    )
