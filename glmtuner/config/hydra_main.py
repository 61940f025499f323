"""Hydra's own command line."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def hydra_main(arguments: list[str], task: "Callable[[DictConfig], Any] | None" = None) -> int:
    """Run Hydra's own command line with these arguments, and `task` on what it composes; its errors become ConfigErrors."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from glmtuner.config.explain import explain
    from glmtuner.config.paths import conf_dir

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of being printed
    argv, sys.argv = sys.argv, ["glmtuner", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
            task or (lambda config: None)
        )()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    finally:
        sys.argv = argv
    return 0
