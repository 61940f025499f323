"""The folders of a run: its dataset catalogues and its run folder."""

from pathlib import Path

from glmtuner.config.compose import Composed
from glmtuner.config.paths import conf_dir
from glmtuner.run_folder.acquire import default_folder


def catalogue_dirs(composed: Composed) -> list[Path]:
    """The folders of dataset entries: the user's first, then the package's."""
    searched = [str(path).removeprefix("file://") for path in composed.hydra.searchpath or []]
    return [*(Path(path) / "dataset" for path in searched if not path.startswith("pkg:")), conf_dir() / "dataset"]


def output_folder(composed: Composed) -> Path:
    """The path of the run folder: trainer.output_dir, or hydra.run.dir as a user key, or outputs/<date>/<time>_<name>."""
    run = composed.run
    if run.trainer.output_dir:
        return Path(run.trainer.output_dir).expanduser()
    if "hydra.run.dir" in composed.user_keys:
        return Path(composed.hydra.run.dir)
    name = run.name or f"{Path(run.model.model_name_or_path).name}_{run.finetuning.finetuning_type}"
    return default_folder(Path("outputs"), name.replace("/", "_").replace(" ", "_"))
