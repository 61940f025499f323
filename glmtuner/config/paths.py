"""Where the package finds its own files, in a checkout and in an installed wheel alike, and which folders are runs."""

import os
from pathlib import Path

from glmtuner.errors import ConfigError
from glmtuner.run_folder.names import CONFIG, OVERRIDES, PROVENANCE

PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"
PACKAGE_DATA = ASSETS / "data"
PACKAGE_MODEL = "package://"  # model.model_name_or_path=package://tiny_glm is glmtuner/assets/tiny_glm


def conf_dir() -> Path:
    """`conf/` of the wheel (`glmtuner/conf`) or of the checkout (beside the package)."""
    for candidate in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf/config.yaml in {PACKAGE} or beside it; install glmtuner again")


def is_run_folder(folder: Path) -> bool:
    """Whether the folder has at least two of the three files that describe a run: one of them may be lost, or damaged."""
    return sum(os.path.lexists(folder / name) for name in (CONFIG, OVERRIDES, PROVENANCE)) >= 2


def model_source(name_or_path: str) -> str:
    """The folder or hub id that transformers understands for a `model.model_name_or_path`."""
    if name_or_path.startswith(PACKAGE_MODEL):
        return str(ASSETS / name_or_path.removeprefix(PACKAGE_MODEL))
    expanded = Path(name_or_path).expanduser()
    return str(expanded) if expanded.exists() else name_or_path


def cache_root() -> Path:
    """`$GLMTUNER_CACHE`, or ~/.cache/glmtuner."""
    return Path(os.environ.get("GLMTUNER_CACHE") or Path.home() / ".cache" / "glmtuner")
