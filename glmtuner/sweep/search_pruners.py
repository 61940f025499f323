"""Optuna's pruners, by `hydra.sweeper.pruner`."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

ADVICE = "type hydra/sweeper/pruner=median, percentile or halving"


def pruner_of(options: Any) -> "BasePruner":
    """The pruner that `hydra.sweeper.pruner` describes; raises ConfigError for a class that is none, or for its options."""
    from hydra.utils import get_class
    from optuna.pruners import BasePruner

    if not isinstance(options, Mapping):
        raise ConfigError(f"hydra.sweeper.pruner={options}: a pruner is a preset; type hydra/sweeper/pruner={options}")
    name = str(options.get("_target_"))
    try:
        found: Any = get_class(name)
    except Exception as error:  # whatever the import of a user's module raises
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"hydra.sweeper.pruner._target_={name}: there is no such class ({reason}); {ADVICE}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, BasePruner)):
        raise ConfigError(f"hydra.sweeper.pruner._target_={name} is no pruner of Optuna; {ADVICE}")
    given = {key: value for key, value in options.items() if key != "_target_"}
    legal = [key for key in inspect.signature(found.__init__).parameters if key != "self"]
    for key in given:
        if key not in legal:
            raise ConfigError(
                f"hydra.sweeper.pruner.{key}: {found.__name__} has no such option"
                + did_you_mean(str(key), legal, f"legal: {', '.join(legal)}")
            )
    try:
        made: BasePruner = found(**given)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"hydra.sweeper.pruner={name}: {reason}; type another value") from None
    return made
