"""MLflow."""

import getpass
import os
import posixpath
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.offline import VARIABLE, offline_folder
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CONFIG
from glmtuner.run_folder.redaction import flatten, redact_text
from glmtuner.trackers.client import ClientSession, Description, one_line
from glmtuner.trackers.experiment import ExperimentTracker, pictures, report_page, tables

ILLEGAL = re.compile(r"[^\w\-. :/]")  # in names of metrics and parameters
PARAMS_PER_CALL = 100  # MLflow's limit
# Of the first request alone, which decides between the server and a local store.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@preset("tracker", "mlflow")
@dataclass(kw_only=True)
class Mlflow(ExperimentTracker):
    """Logs to an MLflow server, or to MLflow's local database; a server that does not answer is replaced by one in the run folder.

    `project` is the experiment; group, job type and tags are tags of the run. A resumed run resumes its MLflow run.
    """

    tracking_uri: str | None = None

    title: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"
    variables: ClassVar[dict[str, str]] = {"MLFLOW_DISABLE_TELEMETRY": "true"}


class Session(ClientSession):
    """A run of MLflow. MLflow cannot take values back: what is there of the history is not logged again."""

    def __init__(self, about: Description, note: Callable[[str], None]) -> None:
        super().__init__(about, note)
        self._renamed: dict[str, str] = {}
        self._connect()
        self._resume_or_create()
        self._describe()
        self.address = self._where() if is_remote(self.uri) and not about.is_report else None

    def _connect(self) -> None:
        """Choose the store: the user's if it answers, else a database in the run folder."""
        import mlflow

        uri = self.about.options["tracking_uri"] or mlflow.get_tracking_uri()
        self.uri, self.artifacts = uri, None
        if not is_remote(uri):
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            return
        if offline_folder() is not None:
            problem = f"{VARIABLE} is set, so {redact_text(uri)} is not asked"
        else:
            before = {name: os.environ.get(name) for name in IMPATIENT}
            os.environ.update({name: value for name, value in IMPATIENT.items() if before[name] is None})
            try:
                self.client = mlflow.MlflowClient(tracking_uri=uri)
                self.client.search_experiments(max_results=1)
                return
            except Exception as error:
                problem = f"{redact_text(uri)} does not answer ({one_line(error)})"
            finally:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
        self.note(f"MLflow: {problem}: this run is written to {self.logs}")
        self.uri, self.artifacts = f"sqlite:///{self.logs / 'mlflow.db'}", (self.logs / "artifacts").as_uri()
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)

    def _experiment(self) -> str:
        """The id of the experiment, created if there is none."""
        name = self.about.project
        for attempt in range(2):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                    self.note(f"MLflow: the experiment {name} was deleted and is restored")
                return found.experiment_id
            try:
                return self.client.create_experiment(name, artifact_location=self.artifacts)
            except Exception:  # another job has just created it
                if attempt:
                    raise
        raise AssertionError

    def _resume_or_create(self) -> None:
        from mlflow.exceptions import MlflowException

        file = self.logs / "run.json"
        store = redact_text(self.uri)
        earlier = read_object(file) if file.is_file() else {}
        self._stored: Counter[tuple[str, int]] = Counter()  # values that the run has, by name and step
        if earlier.get("tracking_uri") == store:
            with suppress(MlflowException):  # it was removed
                run = self.client.get_run(earlier["run_id"])
                if run.info.lifecycle_stage == "active":
                    self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
                    for name in run.data.metrics:
                        history = self.client.get_metric_history(self.run_id, name)
                        self._stored.update((name, metric.step) for metric in history)
                    self._params = dict(run.data.params)
                    self.client.update_run(self.run_id, status="RUNNING", name=self.about.name)
                    for tag in {"preempted"} & run.data.tags.keys():
                        self.client.delete_tag(self.run_id, tag)
                    return
        self.experiment_id = self._experiment()
        run = self.client.create_run(self.experiment_id, run_name=self.about.name)
        self.run_id, self._params = run.info.run_id, dict[str, str]()
        write_json(file, {"tracking_uri": store, "experiment_id": self.experiment_id, "run_id": self.run_id})

    def _describe(self) -> None:
        """Tags, and the config: as parameters, and as the file of the run folder."""
        from mlflow.entities import Param, RunTag

        about = self.about
        git = about.config.get("provenance", {}).get("git") or {}
        tags = {"group": about.group, "job_type": about.job_type, "mlflow.source.git.commit": git.get("commit")}
        tags |= {"mlflow.source.name": "glmtuner", "mlflow.source.type": "LOCAL", "mlflow.user": user_name()}
        tags |= dict.fromkeys(about.tags, "true")
        self.client.log_batch(
            self.run_id, tags=[RunTag(self._legal(name), str(value)) for name, value in tags.items() if value]
        )
        config = flatten(about.config) if about.config else {}
        params = {self._legal(name): str(value)[:6000] for name, value in config.items()}
        changed = sorted(name for name in params.keys() & self._params.keys() if params[name] != self._params[name])
        if changed:
            self.note(
                f"MLflow: parameters of a run cannot change, and those of before remain: {', '.join(changed[:5])}"
            )
        new = iter([Param(name, value) for name, value in params.items() if name not in self._params])
        while batch := list(islice(new, PARAMS_PER_CALL)):
            self.client.log_batch(self.run_id, params=batch)
        if (self.folder / CONFIG).is_file():
            self.client.log_artifact(self.run_id, str(self.folder / CONFIG))

    def _legal(self, name: str) -> str:
        """The name with underscores in place of characters that MLflow refuses; the first time, that is printed."""
        legal = ILLEGAL.sub("_", name)
        if posixpath.normpath(legal) != legal:  # MLflow takes names for paths
            legal = legal.replace("/", "_").replace(".", "_")
        if legal != name and name not in self._renamed:
            self._renamed[name] = legal
            self.note(f"MLflow: {name} is called {legal}, since names have letters, digits and _-. :/ alone")
        return legal

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = []
        for name, value in values.items():
            key = (self._legal(name), step)
            if self._stored[key]:
                self._stored[key] -= 1
            else:
                metrics.append(Metric(key[0], value, now, step))
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self, metrics: dict[str, float]) -> str | None:
        self.log(self.last_step, metrics)
        for path in pictures(self.folder).values():
            self.client.log_artifact(self.run_id, str(path), "pictures")
        shown = tables(self.folder)
        for name, (columns, rows) in shown.items():
            self.client.log_dict(self.run_id, {"columns": columns, "data": rows}, f"{name}.json")
        if shown:  # how MLflow's pages know which files are tables
            listed = [f'{{"path": "{name}.json", "type": "table"}}' for name in shown]
            self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", f"[{', '.join(listed)}]")
        if self.about.is_report:
            if page := report_page(self.folder):
                self.client.log_artifact(self.run_id, str(page))
            self._adopt_jobs()
        trained = RunFolder(self.folder).trained()
        if self.about.log_artifact and trained is not None:
            self.client.log_artifacts(self.run_id, str(trained), trained.name)
        self.client.set_terminated(self.run_id, "FINISHED")
        return self._where()

    def _adopt_jobs(self) -> None:
        """Nest the runs of the sweep's jobs below this one, the report."""
        for file in self.folder.glob(f"*/{self.about.tracker}/run.json"):
            job = read_object(file)
            if job.get("tracking_uri") == redact_text(self.uri):
                self.client.set_tag(job["run_id"], "mlflow.parentRunId", self.run_id)

    def abandon(self, preempted: bool) -> None:
        if preempted:
            self.client.set_tag(self.run_id, "preempted", "true")
        self.client.set_terminated(self.run_id, "KILLED" if preempted else "FAILED")

    def _where(self) -> str:
        if is_remote(self.uri):
            return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"


def is_remote(uri: str) -> bool:
    """Whether the store is one that is asked over the network."""
    return uri.startswith(("http://", "https://", "databricks"))


def user_name() -> str | None:
    """Who runs this; None for a user without a name, as in a container."""
    with suppress(Exception):
        return getpass.getuser()
    return None
