"""Comet."""

import secrets
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from zipfile import ZipFile

from glmtuner.config.groups import preset
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.trackers.client import ClientSession, Description
from glmtuner.trackers.experiment import ExperimentTracker, pictures, report_page, tables

# Comet's own records hold the command line, the environment, the code and git's diff; what they are for is in the config.
OFF = dict.fromkeys(
    ("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging", "log_env_details",
     "log_git_metadata", "log_git_patch", "auto_histogram_tensorboard_logging", "auto_histogram_weight_logging",
     "auto_histogram_gradient_logging", "auto_histogram_activation_logging"), False
)  # fmt: skip


@preset("tracker", "comet")
@dataclass(kw_only=True)
class Comet(ExperimentTracker):
    """Writes an archive of an offline experiment into the run folder, which `comet upload` sends. It never prompts."""

    workspace: str | None = None

    title: ClassVar[str] = "Comet"
    package: ClassVar[str] = "comet_ml"
    variables: ClassVar[dict[str, str]] = {"COMET_DISABLE_AUTO_LOGGING": "1"}


class Session(ClientSession):
    """An offline experiment of Comet, whose key is in comet/run_id.txt.

    A resumed run writes the whole history again; its archive replaces the earlier ones.
    """

    def __init__(self, about: Description, note: Callable[[str], None]) -> None:
        super().__init__(about, note)
        import comet_ml

        self._earlier = sorted(self.logs.glob("session-*"))
        number = max((int(folder.name.rpartition("-")[2]) for folder in self._earlier), default=0) + 1
        session = self.logs / f"session-{number}"
        key_file = self.logs / "run_id.txt"
        if not key_file.is_file():
            write_text(key_file, secrets.token_hex(16))
        key = key_file.read_text(encoding="utf-8").strip()
        self._archive = session / f"{key}.zip"
        self.experiment = comet_ml.OfflineExperiment(
            project_name=about.project, workspace=about.options["workspace"], offline_directory=str(session),
            experiment_key=key, display_summary_level=0, **OFF,
        )  # fmt: skip
        self.experiment.set_name(about.name)
        self.experiment.add_tags(about.tags)
        self.experiment.log_parameters(about.config)
        for name, value in {"group": about.group, "job_type": about.job_type}.items():
            if value:
                self.experiment.log_other(name, value)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.experiment.log_metrics(values, step=step)

    def finish(self, metrics: dict[str, float]) -> str | None:
        experiment = self.experiment
        experiment.log_metrics(metrics, step=self.last_step)
        for name, path in pictures(self.folder).items():
            experiment.log_image(str(path), name=name)
        for name, (columns, rows) in tables(self.folder).items():
            experiment.log_table(f"{name}.csv", tabular_data=rows, headers=columns)
        if self.about.is_report and (page := report_page(self.folder)):
            experiment.log_html(page.read_text(encoding="utf-8"))
        trained = RunFolder(self.folder).trained()
        if self.about.log_artifact and trained is not None:
            experiment.log_model(trained.name, str(trained))
        return f"offline; upload it with `comet upload {shlex.quote(self._close('finished'))}`"

    def abandon(self, preempted: bool) -> None:
        self._close("preempted" if preempted else "failed")

    def _close(self, state: str) -> str:
        """Write the archive, and remove those of earlier sessions; returns its path."""
        self.experiment.log_other("state", state)
        self.experiment.end()
        with ZipFile(self._archive) as archive:  # Comet creates an empty one first, and only logs what goes wrong later
            archive.getinfo("messages.json")
        for folder in self._earlier:
            shutil.rmtree(folder, ignore_errors=True)
        return str(self._archive)
