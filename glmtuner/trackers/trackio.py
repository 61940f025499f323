"""trackio."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.trackers.client import ClientSession, Description
from glmtuner.trackers.experiment import ExperimentTracker, pictures, report_page, tables

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


@preset("tracker", "trackio")
@dataclass(kw_only=True)
class Trackio(ExperimentTracker):
    """Logs to trackio's database on this machine, from which `trackio sync` uploads. A resumed run replaces what it has logged."""

    title: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"
    variables: ClassVar[dict[str, str]] = {"HF_HUB_OFFLINE": "1"}  # else the hub is asked who the user is


class Session(ClientSession):
    """A run of trackio, whose name is in trackio/run.json.

    trackio's functions only print where they fail: what is stored is compared with what was logged at the end.
    """

    def __init__(self, about: Description, note: Callable[[str], None]) -> None:
        super().__init__(about, note)
        for variable in REMOTE:
            if os.environ.pop(variable, None):
                note(
                    f"trackio: {variable} is not used: the run is logged on this machine, and `trackio sync` uploads it"
                )
        import trackio

        file = self.logs / "run.json"
        earlier = read_object(file) if file.is_file() else {}
        name, taken = about.name, set[str]()
        for run in runs_of(about.project):
            if run.id == earlier.get("run_id"):
                run.delete()  # the whole history is logged again
                name = earlier["name"]
            else:
                taken.add(run.name)
        number = 2
        while name in taken:  # two runs of one name would be drawn as one
            name, number = f"{about.name}-{number}", number + 1
        config = {**about.config, "job_type": about.job_type, "tags": about.tags}
        self.run = trackio.init(
            about.project, name=name, group=about.group, config=config, resume="never", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip
        write_json(file, {"project": about.project, "name": name, "run_id": self.run.id})
        self._rows, self._names = 0, set[str]()

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)
        self._rows += 1
        self._names |= values.keys()

    def finish(self, metrics: dict[str, float]) -> str | None:
        import trackio

        shown: dict[str, Any] = {name: trackio.Image(str(path)) for name, path in pictures(self.folder).items()}
        for name, (columns, rows) in tables(self.folder).items():
            shown[name] = trackio.Table(columns=columns, data=rows)
        if self.about.is_report and (page := report_page(self.folder)):
            shown["report"] = trackio.Html(page)
        if metrics or shown:
            self.log(self.last_step, {**metrics, **shown})
        trained = RunFolder(self.folder).trained()
        if self.about.log_artifact and trained is not None:
            artifact = trackio.Artifact(name=f"{trained.name}-{self.run.id}", type="model")
            artifact.add_dir(str(trained))
            self.run.log_artifact(artifact)
        self._close()
        return f"trackio show --project {shlex.quote(self.about.project)}"

    def abandon(self, preempted: bool) -> None:
        """Store what has been logged; trackio has no states."""
        self._close()

    def _close(self) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self.run.finish()
        stored = SQLiteStorage.get_logs(self.about.project, self.run.name, run_id=self.run.id)
        if len(stored) < self._rows:
            raise RuntimeError(f"{self._rows - len(stored)} of {self._rows} rows were not stored")
        if lost := self._names.difference(*stored):
            raise RuntimeError(f"{', '.join(sorted(lost))} were not stored")


def runs_of(project: str) -> list[Any]:
    """The runs of a project; none if it does not exist."""
    import trackio

    try:
        return list(trackio.Api().runs(project))
    except ValueError:
        return []
