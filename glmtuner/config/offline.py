"""`GLMTUNER_OFFLINE=FOLDER`: everything that `prefetch` has put there is read from there, and the network is not asked for anything.

The other libraries are told by their own environment variables, which they read when they are imported.
"""

import os
from pathlib import Path

from glmtuner.errors import ConfigError

VARIABLE = "GLMTUNER_OFFLINE"
MANIFEST = "manifest.json"
# What the libraries read where; relative to the folder.
PLACES = {"HF_HOME": ".", "HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "GLMTUNER_CACHE": "."}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OTHER_NAMES = (
    "HUGGINGFACE_HUB_CACHE",
    "TRANSFORMERS_CACHE",
    "HF_XET_CACHE",
)  # older ones, and one inside of the folder's
LOCAL = "GLMTUNER_LOCAL_CACHE"  # where what the folder lacks is written if the folder cannot be written


def offline_folder() -> Path | None:
    """The folder of GLMTUNER_OFFLINE; None if runs may use the network."""
    value = os.environ.get(VARIABLE, "")
    return Path(value).expanduser() if value else None


def advice() -> str:
    """What to type so that the folder gets what a run lacks."""
    return (
        f"{VARIABLE}={os.environ.get(VARIABLE)} is set, so the network is not asked; where there is one, type python -m glmtuner "
        f"prefetch --folder {os.environ.get(VARIABLE)} and the arguments of this run"
    )


def adopt_offline() -> None:
    """Point every library to the folder of GLMTUNER_OFFLINE, if it is set, and keep it from the network.

    Raises ConfigError if `prefetch` has not filled the folder.
    """
    folder = offline_folder()
    if folder is None:
        return
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{VARIABLE}={folder}: {f'it has no {MANIFEST}' if folder.is_dir() else 'no such folder'}; type python -m glmtuner prefetch "
            f"--folder {folder} and the arguments of the run where there is a network, or unset {VARIABLE}"
        )
    folder = folder.resolve()
    local = os.environ.get(LOCAL) or os.environ.get("GLMTUNER_CACHE") or str(Path.home() / ".cache" / "glmtuner")
    os.environ |= {VARIABLE: str(folder), LOCAL: local}  # for the processes that this one starts
    place_caches(folder)
    if not os.access(folder, os.W_OK):
        os.environ |= {"GLMTUNER_CACHE": local, "HF_DATASETS_CACHE": str(Path(local) / "datasets")}
    os.environ |= OFFLINE
    if os.environ.get("WANDB_MODE") != "disabled":
        os.environ["WANDB_MODE"] = "offline"
    if os.environ.get("SWANLAB_MODE") not in ("disabled", "local"):
        os.environ["SWANLAB_MODE"] = "offline"


def place_caches(folder: Path) -> None:
    """Make `folder` the cache of every library that downloads for a run; the token of `hf auth login` is still found."""
    home = os.environ.get("HF_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    os.environ.setdefault("HF_TOKEN_PATH", str(Path(home).expanduser() / "token"))
    for name in OTHER_NAMES:
        os.environ.pop(name, None)
    os.environ |= {name: str(folder / place) for name, place in PLACES.items()}
