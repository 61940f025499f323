"""What the trackers of experiments share: how runs are named and grouped, and what of a folder is shown."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from glmtuner.config.schema import Run, Tracker
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.run_folder.files import read_lines
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PREDICTIONS, REPORT_PAGE, SAMPLED, SWEEP
from glmtuner.run_folder.provenance import PACKAGES
from glmtuner.run_folder.redaction import redact_text, redact_value
from glmtuner.trackers.client import ClientFailed, ClientProcess, Description

MAX_ROWS = 1000  # of the table of predictions, and of that of sampled answers
OPEN_SECONDS = 120.0  # a new SQLite database of MLflow takes ten
FINISH_SECONDS = 300.0  # without limit where weights are uploaded
ABANDON_SECONDS = 20.0  # of the time that a scheduler leaves to a preempted run


@dataclass(kw_only=True)
class ExperimentTracker(Tracker):
    """Logs through a client library in a process of its own; where that fails, the run continues without it.

    A subclass stands in a module with the class `Session`, a `ClientSession`, and is told by `title`, `package` and `variables`
    what it is called, what it imports, and which environment variables the client's process gets unless the user has set them.
    """

    project: str
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    log_artifact: bool = False

    title: ClassVar[str]
    package: ClassVar[str]
    variables: ClassVar[dict[str, str]] = {}
    defaults: ClassVar[dict[str, str]] = {}  # environment variables of the tracker for the name, group and job_type

    def __post_init__(self) -> None:
        self._client: ClientProcess | None = None
        self._without_it = "the run continues without it"

    def check_machine(self) -> None:
        if find_spec(self.package) is None:
            raise ConfigError(
                f"tracker={self.name} needs the package {self.package.replace('_', '-')}, which is not installed; type pip install "
                f"'glmtuner[{self.name}]', or tracker=none"
            )

    def start(self, run: Run, folder: Path) -> None:
        sweep = sweep_of(folder)
        self._open(
            self._described(
                folder, name=run_name(run, folder, self._default("name")), group=self._group(sweep),
                job_type=self.job_type or self._default("job_type") or job_type_of(run), config=described_config(folder),
            )
        )  # fmt: skip

    def log(self, line: dict[str, float]) -> None:
        """Log one line under the names of transformers (train/loss, eval/loss, …); returns at once."""
        from transformers.integrations import rewrite_logs

        if self._client is None:
            return
        values = {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}
        with self._surviving_failures():
            self._client.check()
            self._client.send("log", step=line["step"], values=rewrite_logs(values))

    def abandon(self, preempted: bool = False) -> None:
        self._close("abandon", ABANDON_SECONDS, preempted=preempted)

    def finish(self, folder: Path, metrics: dict[str, float]) -> str | None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        return self._close("finish", None if self.log_artifact else FINISH_SECONDS, metrics=numbers)

    def publish(self, sweep: Path) -> str | None:
        """Log the sweep's plots, leaderboard and report as a run of its group, the same one each time."""
        if not (pictures(sweep) or tables(sweep) or (sweep / REPORT_PAGE).is_file()):
            return None
        self._without_it = f"the report of the sweep is in {sweep} alone"
        self._open(
            self._described(
                sweep, name=f"{sweep.resolve().name} report", group=self._group(sweep), job_type="report", config={}, is_report=True
            )
        )  # fmt: skip
        return self._close("finish", FINISH_SECONDS, metrics={})

    def _default(self, key: str) -> str | None:
        return os.environ.get(self.defaults.get(key, ""))

    def _group(self, sweep: Path | None) -> str | None:
        return self.group or self._default("group") or (sweep.resolve().name if sweep else None)

    def _described(self, folder: Path, **values: Any) -> Description:
        shared = {field.name for field in fields(ExperimentTracker)}
        options = {name: value for name, value in asdict(self).items() if name not in shared}
        values = redact_value({"project": self.project, "tags": self.tags or [], **values}, assignments=False)
        return Description(
            tracker=self.name,
            folder=str(folder.resolve()),
            log_artifact=self.log_artifact,
            options=options,
            **values,
        )

    def _open(self, description: Description) -> None:
        """Start the client for a run and print where it can be seen."""
        with self._surviving_failures():
            self._client = ClientProcess(type(self).__module__, self.variables)
            self._client.send("open", **asdict(description))
            address = self._client.receive(OPEN_SECONDS)
            if address:
                say(f"{self.title}: {address}")

    def _close(self, call: str, timeout_s: float | None, **arguments: Any) -> str | None:
        if self._client is None:
            return None
        closing, timeout_to_end = None, ABANDON_SECONDS
        with self._surviving_failures():
            self._client.send(call, **arguments)
            try:
                closing = self._client.receive(timeout_s)
            except TimeoutError:
                if call == "finish":
                    raise
                say(f"{self.title} is still storing the run after {timeout_s:g} s: its process ends by itself")
                timeout_to_end = 0.0
        if self._client is not None:
            self._client.close(timeout_to_end)
        self._client = None
        return f"{self.title}: {closing}" if closing else None

    @contextmanager
    def _surviving_failures(self) -> Iterator[None]:
        """On a failure of the client, print it once and continue the run without the tracker."""
        try:
            yield
        except (ClientFailed, TimeoutError, OSError) as error:
            say(f"{self.title} failed ({redact_text(str(error))}): {self._without_it}")
            if self._client is not None:
                self._client.kill()
            self._client = None


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that this job's folder belongs to; None for a single run."""
    parent = folder.resolve().parent
    return parent if (parent / SWEEP).is_file() else None


def run_name(run: Run, folder: Path, default: str | None) -> str:
    """What a tracker calls the run: its `name`, the `default`, or the folder's; a job of a sweep is called by what is swept.

    One `default` cannot name all jobs of a sweep, and its `name` is the sweep's.
    """
    if sweep_of(folder) is not None:
        return folder.name.rpartition("_")[0] or folder.name
    return run.name or default or folder.name


def job_type_of(run: Run) -> str:
    """The first thing the run does: train, predict or evaluate."""
    return "train" if run.trainer.do_train else "predict" if run.trainer.do_predict else "evaluate"


def described_config(folder: Path) -> dict[str, Any]:
    """The resolved config of the run folder, with the git commit and the versions of packages under `provenance`."""
    config = OmegaConf.to_container(RunFolder(folder).config())
    assert isinstance(config, dict)
    provenance = RunFolder(folder).provenance()
    packages = {name: version for name, version in provenance.get("packages", {}).items() if name in PACKAGES}
    return {**{str(name): value for name, value in config.items()}, "provenance": {"git": provenance.get("git"), "packages": packages}}  # fmt: skip


def pictures(folder: Path) -> dict[str, Path]:
    """The plots in the folder of a run or a sweep, by their names pictures/<name>."""
    paths = [*sorted(folder.glob("*.png")), *sorted(folder.glob("pictures/*.png"))]
    return {f"pictures/{path.stem}": path for path in paths}


def tables(folder: Path) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows by name: predictions and sampled answers of a run, the leaderboard of a sweep; without empty ones."""
    found = {}
    for name, file in (("predictions", PREDICTIONS), ("sampled", SAMPLED)):
        lines = list(islice(read_lines(folder / file), MAX_ROWS))
        if lines:
            columns = list(lines[0])
            found[name] = (columns, [[line.get(column) for column in columns] for line in lines])
    if (folder / "leaderboard.csv").is_file():
        import pandas

        table = pandas.read_csv(folder / "leaderboard.csv").astype(object)
        table = table.where(table.notna(), None)
        found["leaderboard"] = ([*map(str, table.columns)], table.to_numpy().tolist())
    return found


def report_page(folder: Path) -> Path | None:
    """report.html of a sweep; None if it has none."""
    page = folder / REPORT_PAGE
    return page if page.is_file() else None
